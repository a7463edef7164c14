"""Transcribe a manifest with one model and record the cost of every utterance, to train deciders and evaluate cascades.

    python recipes/decider/label.py WHISPER --manifest train.jsonl --out labels/tiny-train.jsonl
    python recipes/decider/label.py WHISPER --manifest train.jsonl --out labels/tiny-train.jsonl --states states/tiny-train

Run it once per model; rerun the command to resume an interrupted run. Each line contains `id, duration, reference, hypothesis,
text, errors, reference_words, time_s, macs_g` and the model's own statistics (`avg_logprob`, `min_logprob`, `entropy`,
`tokens`). Two such files for the same manifest give the labels: 1 if the smaller model makes more errors, or the difference in
errors. With --states, the encoder states are saved too, so that an epoch of decider training takes seconds. Times are
wall-clock times of this machine at batch 1. MACs are profiled separately and cached by token count when the cost depends on
nothing else; on a split that is only trained on, --count_macs False saves that second transcription. Without --language, the
language of a row is used, and detected if the row has none.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from efficient_asr import load_transcriber
from efficient_asr.data import SAMPLE_RATE, FeatureStore, Row, Rows
from efficient_asr.evaluation.benchmark import Benchmark
from efficient_asr.evaluation.macs import count_macs
from efficient_asr.evaluation.wer import count_errors
from efficient_asr.inference.manifest_pass import pass_over
from efficient_asr.inference.transcriber import Transcriber
from efficient_asr.inference.transcript import Transcript
from efficient_asr.models.hub import model_source
from efficient_asr.models.log_mel import encoder_frames
from efficient_asr.models.sources import fingerprint
from efficient_asr.settings.options import (
    add_whisper_options,
    measuring_parser,
    parse_columns,
    whisper_options,
    yes_or_no,
)
from efficient_asr.techniques.decider.data import about_labels, open_states
from efficient_asr.utils.devices import choose_device, clock
from efficient_asr.utils.errors import UserError, check_writable, exit_code
from efficient_asr.utils.files import LineStore, atomic_write_text, sha256_of
from efficient_asr.utils.locks import FolderLock

CHANGES_STATES = ("encoder_padding", "padding_s", "quantise")  # options that encoder states depend on


class Pass:
    """Inference run of one model over one manifest.

    Arguments
    ---------
    transcriber : Transcriber
        The model.
    benchmark : Benchmark
        The utterances.
    states : FeatureStore or None
        Store for the encoder states; None to save none.
    unpadded : bool
        Whether to save only the states of the audio, instead of the whole window.
    costs_file : Path or None
        JSON cache of MACs, by cost key; None to count none.
    """

    def __init__(
        self,
        transcriber: Transcriber,
        benchmark: Benchmark,
        states: FeatureStore | None,
        unpadded: bool,
        costs_file: Path | None,
    ) -> None:
        self.transcriber, self.benchmark, self.states, self.unpadded = transcriber, benchmark, states, unpadded
        self.language, self.warm = transcriber.language, False
        self.costs_file = costs_file
        known = costs_file is not None and costs_file.is_file()
        self._costs = json.loads(costs_file.read_text(encoding="utf-8")) if known else {}

    def __call__(self, rows: list[Row], wavs: torch.Tensor, wav_lens: torch.Tensor) -> list[dict[str, Any]]:
        """Return the record of one utterance."""
        if not self.warm:
            self.transcriber.transcribe(wavs, wav_lens)  # the first call in a process is slow
            self.warm = True
        return [self.transcribe(rows[0], wavs, wav_lens)]

    def transcribe(self, row: Row, wavs: torch.Tensor, wav_lens: torch.Tensor) -> dict[str, Any]:
        """Return the record of one utterance."""
        if self.transcriber.languages:
            given = row.get("language") if self.language is None else None
            self.transcriber.language = given if given in self.transcriber.languages else self.language
        started = clock()
        if self.states is None:
            transcript = self.transcriber.transcribe(wavs, wav_lens)[0]
        else:
            encoded = self.transcriber.encode(wavs, wav_lens, hidden_states=True)
            transcript = self.transcriber.decode(encoded)[0]
        time_s = clock() - started
        if self.states is not None and row["id"] not in self.states:
            frames = unpadded_frames(row["duration"]) if self.unpadded else encoded.states.shape[1]
            self.states.write(row["id"], {"states": torch.stack(encoded.hidden_states, dim=2)[0, :frames].half()})
        reference, hypothesis = (self.benchmark.normalise(text, row) for text in (row["text"], transcript.text))
        errors = count_errors([reference], [hypothesis])[0]
        return {
            "id": row["id"], "duration": row["duration"], "reference": reference, "hypothesis": hypothesis,
            "text": transcript.text, "errors": errors.total, "reference_words": errors.reference_length,
            "time_s": round(time_s, 4), "macs_g": self._macs_g(transcript, wavs, wav_lens), **transcript.details,
        }  # fmt: skip

    def _macs_g(self, transcript: Transcript, wavs: torch.Tensor, wav_lens: torch.Tensor) -> float | None:
        """Return the GMACs of the utterance, from the cache if its cost key was counted before."""
        if self.costs_file is None:
            return None
        key = self.transcriber.cost_key(transcript)
        if key is None:
            return count_macs(self.transcriber.transcribe, wavs, wav_lens).macs / 1e9
        name = " ".join(map(str, key))
        if name not in self._costs:
            self._costs[name] = count_macs(self.transcriber.transcribe, wavs, wav_lens).macs
            atomic_write_text(self.costs_file, json.dumps(self._costs, indent=1) + "\n")
        return self._costs[name] / 1e9


def unpadded_frames(duration_s: float) -> int:
    """Return the number of encoder frames that an utterance fills."""
    return max(1, encoder_frames(round(duration_s * SAMPLE_RATE)))


def main() -> None:
    parser = measuring_parser(__doc__, repeats=None)
    parser.add_argument("--out", type=Path, required=True, help="JSON Lines file for the records")
    parser.add_argument("--states", type=Path, help="folder for the encoder states")
    parser.add_argument(
        "--frames",
        type=lambda value: {"own": "unpadded", "window": "padded"}.get(value, value),
        choices=("padded", "unpadded"),
        default="padded",
        help="states to save: of the padded window, as in the paper, or of the audio only",
    )
    parser.add_argument(
        "--count_macs", type=yes_or_no, default=True, help="False: for splits that are only trained on (default True)"
    )
    add_whisper_options(parser)
    args = parser.parse_args()
    check_writable(args.out.parent, "--out")
    device = choose_device(args.device)
    source = model_source(args.model)
    transcriber = load_transcriber(source, **whisper_options(args)).to(device)
    if not transcriber.counts_macs:
        raise UserError(
            f"{args.model}: the MACs of a backend other than torch are not known; label with the original model"
        )
    normaliser = args.normaliser or transcriber.normaliser
    benchmark = Benchmark.from_manifest(
        args.manifest, normaliser=normaliser, columns=parse_columns(args.columns), skip_bad=args.skip_bad,
        skipped_file=args.out.with_suffix(".skipped.jsonl"), check_audio="samples", language=args.language,
    )  # fmt: skip
    key = key_of(args, source, benchmark, device)
    sum_of_key = hashlib.sha256(json.dumps([key["model"], key["decoding"]]).encode()).hexdigest()[:12]
    costs_file = args.out.with_name(f"costs-{sum_of_key}.json")
    lock = FolderLock(args.out.with_suffix(".lock"), option="--out")  # held until the end of this function
    done: set[str] = set()

    def accept(record: dict[str, Any], *_: Any) -> None:
        if record["macs_g"] is not None or not args.count_macs:
            done.add(record["id"])

    lines = LineStore(args.out, key, accept, args.out.with_suffix(".meta.json"))
    states = states_store(args, transcriber, benchmark.rows, key["model"]) if args.states else None
    whole = done if states is None else {name for name in done if name in states}
    left = [i for i, row in enumerate(benchmark.rows) if row["id"] not in whole]
    if len(left) < len(benchmark.rows):
        print(f"{len(benchmark.rows) - len(left)} of {len(benchmark.rows)} utterances are already done")
    work = Pass(transcriber, benchmark, states, args.frames == "unpadded", costs_file if args.count_macs else None)
    with lines:
        pass_over(benchmark.rows, [[i] for i in left], done, work, lines.append, args.out.stem)
    lock.release()
    print(f"{len(benchmark.rows)} utterances: {args.out}" + (f"; states: {args.states}" if states is not None else ""))


def key_of(args: Any, source: str, benchmark: Benchmark, device: str) -> dict[str, Any]:
    """Return what the records depend on; of records of former versions, only what these have noted."""
    key = {"model": fingerprint(source), "benchmark": benchmark.hash, "decoding": whisper_options(args)}
    noted = about_labels(args.out)
    since = {"audio": digest_of_audio(benchmark.rows), "device": device.partition(":")[0]}
    return key | {name: value for name, value in since.items() if not noted or name in noted}


def digest_of_audio(rows: Rows, most: int = 100) -> str:
    """Return a checksum of the content of some audio files, wherever they lie: recordings may move, but not change."""
    digest = hashlib.sha256()
    for i in sorted({round(i * (len(rows) - 1) / (most - 1)) for i in range(most)}):
        digest.update(sha256_of(Path(rows[i]["audio"])).encode())
    return digest.hexdigest()[:16]


def digest_of_segments(rows: Rows) -> str:
    """Return a checksum of the ids of all utterances and of the parts of their audio files."""
    parts = "\n".join(f"{row['id']}\0{row.get('offset', 0)}\0{row['duration']}" for row in rows)
    return hashlib.sha256(parts.encode(errors="surrogateescape")).hexdigest()[:16]


def states_store(args: Any, transcriber: Transcriber, rows: Rows, model: str) -> FeatureStore:
    """Open the store of encoder states, check that it fits on the disk, and print its size."""
    if not transcriber.shows_encoder:
        raise UserError("--states: only Whisper models provide encoder states")
    if args.frames == "padded" and transcriber.model.encoder_padding is not None:
        raise UserError("--frames padded: this model encodes the audio's own length; pass --frames unpadded")
    states, dim, window = transcriber.encoder_shape()
    changes = {name: getattr(args, name) for name in CHANGES_STATES}
    changes["quantise"] = None if args.quantise == "decoder-int8" else args.quantise
    about = {"states": states, "dim": dim, "model": model, "frames": args.frames, "audio": digest_of_audio(rows)}
    about["segments"] = digest_of_segments(rows)
    about |= {name: value for name, value in changes.items() if value is not None}
    store = open_states(args.states, about)
    long = [row["id"] for row in rows if row["duration"] * 50 > window + 1]
    if long:
        raise UserError(
            f"--states: {len(long)} utterances are longer than the window of {window / 50:.0f} s, for example '{long[0]}'; "
            "split them, or omit --states"
        )
    missing = [row for row in rows if row["id"] not in store]
    unpadded = args.frames == "unpadded"
    frames = sum(min(window, unpadded_frames(row["duration"])) if unpadded else window for row in missing)
    needed = 2 * frames * states * dim  # bytes, in half precision
    store.check_room(
        needed,
        "save only the frames of the audio (--frames unpadded), use fewer utterances, or compute states during training "
        "(states_folder: null)",
    )
    print(f"encoder states of {len(missing)} utterances: {needed / 1e9:.2f} GB in {args.states}")
    return store


if __name__ == "__main__":
    sys.exit(exit_code(main))
