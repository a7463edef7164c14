"""mini: a synthetic corpus that needs no download.

Spoken English commands and digit strings, synthesised by espeak-ng (from the `espeakng-loader` wheel) with many voices,
speeds, pitches and noise levels. The splits share no voice, and the seed determines everything. The corpus lets newcomers try
every technique on a laptop; results on it are for synthetic speech and are no substitute for results on real speech.
"""

from __future__ import annotations

import ctypes
import functools
import json
import random
import shutil
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio.functional

from efficient_asr.data import SAMPLE_RATE, write_manifest
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.progress import AudioProgress

ACCENTS = ["en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-029"]
VOICES = {  # espeak-ng variants that sound human; splits share neither voices nor similar ones such as steph and steph2
    "train": "m1 m2 m3 m4 m5 m6 m7 m8 f1 f2 f3 f4 f5 Alex Alicia Andrea Andy Annie Denis Gene Gene2 Henrique Jacky "
    "Lee Marco Mario Michael Mike Nguyen Reed RicishayMax RicishayMax2 RicishayMax3 Storm adam anika "
    "announcer aunty belinda benjamin caleb david ed edward edward2 grandma gustave ian iven iven2 iven3 "
    "iven4 kaukovalta linda max miguel mike2 pablo paul pedro quincy rob sandro steph steph2 steph3 "
    "travis zac".split(),
    "dev": "Diogo antonio grandpa michel shelby".split(),
    "test": "Hugo boris fast john marcelo norbert robert victor".split(),
}
SHARES = {"train": 0.75, "dev": 0.08, "test": 0.17}
SNRS_DB = [None, 30.0, 20.0, 12.0]

DIGITS = "zero one two three four five six seven eight nine".split()
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
ROOMS = ["kitchen", "bedroom", "garden", "hall", "office", "garage", "bathroom", "living room"]
THINGS = ["light", "lamp", "heater", "fan", "radio", "music", "television", "alarm"]
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
PEOPLE = "anna peter martha george helen oscar julia frank".split()
ITEMS = "milk bread apples coffee rice sugar butter cheese water paper".split()


def _number(rng: random.Random) -> str:
    kind = rng.randrange(4)
    if kind == 0:
        return rng.choice(DIGITS[1:])
    if kind == 1:
        return rng.choice(TEENS)
    if kind == 2:
        return rng.choice(TENS)
    return f"{rng.choice(TENS)} {rng.choice(DIGITS[1:])}"


def _digits(rng: random.Random, shortest: int, longest: int) -> str:
    return " ".join(rng.choice(DIGITS) for _ in range(rng.randint(shortest, longest)))


def make_sentence(rng: random.Random) -> str:
    """Draw one command or digit string, in lower case without punctuation."""
    pick = rng.choice
    templates = [
        lambda: f"turn {pick(['on', 'off'])} the {pick(ROOMS)} {pick(THINGS)}",
        lambda: f"set the {pick(ROOMS)} {pick(['heater', 'fan'])} to {_number(rng)} {pick(['degrees', 'percent'])}",
        lambda: (
            f"wake me at {pick(DIGITS[1:] + TEENS[:3])} {pick(['fifteen', 'thirty', 'forty five'])} on {pick(DAYS)}"
        ),
        lambda: f"set a timer for {_number(rng)} {pick(['minutes', 'seconds', 'hours'])}",
        lambda: f"call {pick(PEOPLE)} {pick(['at home', 'at work', 'now', 'please'])}",
        lambda: f"dial {_digits(rng, 4, 8)}",
        lambda: f"add {pick(ITEMS)} and {pick(ITEMS)} to the list",
        lambda: f"remind {pick(['me', *PEOPLE])} to buy {pick(ITEMS)} on {pick(DAYS)}",
        lambda: f"{pick(['open', 'close', 'lock'])} the {pick(ROOMS)} {pick(['door', 'window'])}",
        lambda: f"play {pick(['song', 'station', 'track'])} number {_number(rng)}",
        lambda: f"what is {_number(rng)} {pick(['plus', 'minus', 'times'])} {_number(rng)}",
        lambda: _digits(rng, 3, 9),
    ]
    return pick(templates)()


@functools.lru_cache(maxsize=1)
def vocabulary() -> list[str]:
    """Return all words that occur in commands, in alphabetical order."""
    rng = random.Random(0)
    return sorted({word for _ in range(5000) for word in make_sentence(rng).split()})


def make_words(rng: random.Random) -> str:
    """Draw one to three unrelated words. Without the commands' grammar, a model must rely on the audio and learns faster."""
    return " ".join(rng.choice(vocabulary()) for _ in range(rng.randint(1, 3)))


SENTENCES = {"commands": make_sentence, "words": make_words}


class Espeak:
    """The espeak-ng library, called through ctypes.

    The library keeps global state between utterances (resonators, breath noise). Every instance therefore loads its own copy,
    so that the same seed gives the same samples in any process.

    Arguments
    ---------
    seed : int
        Seed of the breath noise.
    """

    SYNCHRONOUS, UTF8, RATE, PITCH = 2, 1, 1, 3

    def __init__(self, seed: int) -> None:
        import espeakng_loader

        with tempfile.TemporaryDirectory() as folder:
            self.library = ctypes.CDLL(shutil.copy(espeakng_loader.get_library_path(), folder))
        data = espeakng_loader.get_data_path().encode()
        self.sample_rate = self.library.espeak_Initialize(self.SYNCHRONOUS, 0, data, 0)
        if self.sample_rate <= 0:
            raise RuntimeError("espeak-ng could not be initialised from the espeakng-loader package")
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        self.chunks: list[np.ndarray] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.callback = kind(self._receive)  # keep a reference, otherwise ctypes frees it
        self.library.espeak_SetSynthCallback(self.callback)

    def _receive(self, samples, count: int, events) -> int:
        if count > 0:
            self.chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, voice: str, words_per_minute: int, pitch: int) -> np.ndarray:
        """Synthesise one sentence and return float samples [time] at `self.sample_rate`."""
        self.chunks = []
        if self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise RuntimeError(f"espeak-ng has no voice '{voice}'")
        self.library.espeak_SetParameter(self.RATE, words_per_minute, 0)
        self.library.espeak_SetParameter(self.PITCH, pitch, 0)
        data = text.encode()
        self.library.espeak_Synth(data, len(data) + 1, 0, 0, 0, self.UTF8, None, None)
        self.library.espeak_Synchronize()
        return np.concatenate(self.chunks).astype(np.float32) / 32768.0


def synthesise(espeak: Espeak, text: str, voice: str, words_per_minute: int, pitch: int) -> torch.Tensor:
    """Return speech [time] at 16 kHz with 0.1 s of silence at both ends and a peak amplitude of 0.5."""
    wav = torch.from_numpy(espeak.say(text, voice, words_per_minute, pitch))
    wav = torchaudio.functional.resample(wav, espeak.sample_rate, SAMPLE_RATE)
    loud = (wav.abs() > 0.01 * wav.abs().max()).nonzero()
    wav = wav[loud[0] : loud[-1] + 1]
    wav = torch.nn.functional.pad(wav, (SAMPLE_RATE // 10, SAMPLE_RATE // 10))
    return 0.5 * wav / wav.abs().max().clamp(min=1e-4)


def add_noise(wav: torch.Tensor, snr_db: float | None, rng: np.random.Generator) -> torch.Tensor:
    """Add pink noise at a signal-to-noise ratio in dB; `None` leaves the speech clean."""
    if snr_db is None:
        return wav
    spectrum = np.fft.rfft(rng.standard_normal(len(wav)))
    spectrum /= np.sqrt(np.maximum(np.arange(len(spectrum)), 1))
    noise = torch.from_numpy(np.fft.irfft(spectrum, len(wav)).astype(np.float32))
    scale = wav.pow(2).mean().sqrt() / noise.pow(2).mean().sqrt() * 10 ** (-snr_db / 20)
    noisy = wav + scale * noise
    return noisy / max(1.0, float(noisy.abs().max()))


def prepare(
    data_folder: str | None,
    out_folder: Path,
    minutes: float = 20.0,
    corpus_seed: int = 1986,
    sentences: str = "commands",
) -> dict[str, Path]:
    """Synthesise the corpus.

    Arguments
    ---------
    data_folder : str or None
        Ignored: there is nothing to download.
    out_folder : Path
        Output folder for `audio/*.flac` and one manifest per split.
    minutes : float
        Total minutes of speech.
    corpus_seed : int
        Random seed. Another seed gives other sentences, speeds and noise for the same voices.
    sentences : str
        `commands`, or `words` for unrelated words (for pretraining).

    Returns
    -------
    dict
        Manifest paths of `train`, `dev` and `test`.

    Raises
    ------
    UserError
        If an option is invalid.
    """
    if sentences not in SENTENCES:
        raise UserError(f"corpus_options: invalid sentences '{sentences}'; choose from {', '.join(SENTENCES)}")
    if not minutes > 0:
        raise UserError(f"corpus_options: minutes must be greater than 0, got {minutes}")
    out_folder = Path(out_folder)
    manifests = {split: out_folder / f"{split}.jsonl" for split in VOICES}
    marker = out_folder / "prepared.json"
    wanted = {"corpus": "mini", "version": 5, "minutes": minutes, "corpus_seed": corpus_seed, "sentences": sentences}
    if marker.is_file() and json.loads(marker.read_text()) == wanted:
        return manifests
    marker.unlink(missing_ok=True)  # an interrupted synthesis must not look complete
    (out_folder / "audio").mkdir(parents=True, exist_ok=True)
    espeak = Espeak(corpus_seed)
    with AudioProgress(60 * minutes, "synthesising mini (espeak-ng)") as progress:
        for split, voices in VOICES.items():
            rng = random.Random(f"{corpus_seed}/{split}")
            noise_rng = np.random.default_rng([corpus_seed, *split.encode()])
            rows, total_s = [], 0.0
            while total_s < SHARES[split] * minutes * 60:
                text, accent, variant = SENTENCES[sentences](rng), rng.choice(ACCENTS), rng.choice(voices)
                snr_db = rng.choice(SNRS_DB)
                wav = synthesise(espeak, text, f"{accent}+{variant}", rng.randint(130, 200), rng.randint(30, 70))
                wav = add_noise(wav, snr_db, noise_rng)
                name = f"{split}-{len(rows):05d}"
                soundfile.write(out_folder / "audio" / f"{name}.flac", wav.numpy(), SAMPLE_RATE, subtype="PCM_16")
                duration = len(wav) / SAMPLE_RATE
                rows.append(
                    {"id": name, "audio": f"audio/{name}.flac", "duration": duration, "text": text, "language": "en",
                     "speaker": f"{accent}+{variant}", "snr_db": snr_db, "synthetic": True}
                )  # fmt: skip
                total_s += duration
                progress.advance(duration)
            write_manifest(manifests[split], rows)
    marker.write_text(json.dumps(wanted))
    return manifests
