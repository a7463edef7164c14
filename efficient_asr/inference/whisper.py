"""Transcriber for Whisper models.

Every utterance has its own window and its own log-mel normalisation, so that its transcript does not depend on the rest of the
batch.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch

from efficient_asr.data import SAMPLE_RATE, Row, absolute_lengths, check_wavs, zero_padding
from efficient_asr.inference.transcriber import MANIFEST, Transcriber
from efficient_asr.inference.transcript import Transcript
from efficient_asr.models.backends import converted
from efficient_asr.models.log_mel import HOP
from efficient_asr.models.whisper import search
from efficient_asr.models.whisper.decoding import DecodingOptions, Encoded, Hypothesis
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.models.whisper.own_length import OwnLength
from efficient_asr.text.languages import normalise_or_keep
from efficient_asr.utils.errors import UserError, did_you_mean
from efficient_asr.utils.technique import find, merged


def set_padding(model: Whisper, padding: float | str | None, padding_s: float | None, language: str | None) -> None:
    """Choose what a model encodes behind the audio: a number of seconds, a technique, or what is stored; see `load_transcriber`.

    Raises
    ------
    UserError
        If a value is invalid.
    """
    stored = model.encoder_padding
    if model.backend != "torch" and not (isinstance(padding, float) and padding >= model.window_samples / SAMPLE_RATE):
        raise UserError(
            f"encoder_padding, padding_s: fixed when the model was converted for the backend {model.backend}; only 30 (the whole "
            "window) can be chosen. Convert the model again"
        )
    if isinstance(padding, float):
        if padding_s is not None:
            raise UserError("padding_s: encoder_padding is a number of seconds already; give one of the two")
        model.encoder_padding = None if padding >= model.window_samples / SAMPLE_RATE else OwnLength(padding)
    elif padding is None or (stored is not None and padding == stored.technique):
        if stored is None:
            raise UserError("padding_s: the model encodes the whole window; pass encoder_padding as well")
        model.encoder_padding = stored if padding_s is None else stored.with_padding(padding_s)
    else:
        kind = find("encoder_paddings", str(padding))
        if kind is None:
            names = merged("encoder_paddings")
            raise UserError(
                f"encoder_padding: {padding!r} is neither a number of seconds nor one of {', '.join(names)}."
                f"{did_you_mean(str(padding), names)}"
            )
        given = {} if padding_s is None else {"padding_s": padding_s}
        language = language if language != MANIFEST else None
        model.encoder_padding = kind.calibrate(model, language=language, **given)


class WhisperTranscriber(Transcriber):
    """Whisper with decoding options; transcribes in one step or in two.

    Arguments
    ---------
    model : Whisper
        The model; it is set to evaluation mode.
    language : str, optional
        Language of the audio as an ISO 639-1 code. If None, Whisper detects it for each utterance. With `manifest`,
        `transcribe` expects `languages` and detects those that are not given.
    options : DecodingOptions, optional
        Decoding options; greedy by default.

    Raises
    ------
    UserError
        If the model does not support the language.
    """

    shows_encoder = True
    normaliser = None

    def __init__(self, model: Whisper, language: str | None = None, options: DecodingOptions | None = None) -> None:
        self.takes_languages = language == MANIFEST
        language = None if self.takes_languages else normalise_or_keep(language)
        model.labels.check_language(language)
        self.model, self.language, self.options = model.eval(), language, options or DecodingOptions()
        if not model.samples and max(self.options.schedule) > 0:
            raise UserError(f"temperatures: the backend {model.backend} cannot sample; leave them at null")
        if not model.beam_search and self.options.num_beams > 1:
            raise UserError(f"num_beams: a Whisper with {model.technique} decodes greedily; leave it at 1")
        self.window_s = model.window_samples / SAMPLE_RATE

    @classmethod
    def from_source(cls, source: str, language: str | None = None, **options: Any) -> WhisperTranscriber:
        """Load a Hugging Face directory or hub id in float32.

        `options` are those of DecodingOptions, those that techniques declare (`load_options`), and `encoder_padding`,
        `padding_s`, `quantise` and `backend` of `load_transcriber`.

        Raises
        ------
        UserError
            If the model cannot be loaded or an option is unknown.
        """
        names = ("encoder_padding", "padding_s", "quantise", "backend")
        padding, padding_s, mode, backend = (options.pop(key, None) for key in names)
        declared = {key: options.pop(key, None) for key in merged("load_options")}
        decoding = DecodingOptions.of(options)
        with contextlib.suppress(TypeError, ValueError):
            padding = float(padding)
        model = Whisper.from_source(source, with_padding=not isinstance(padding, float))
        if padding is not None or padding_s is not None:
            set_padding(model, padding, padding_s, normalise_or_keep(language))
        convert = backend not in (None, model.backend)
        if convert:
            model = converted(model, source, backend, mode)
        for key, value in declared.items():
            model = model if value is None else find("load_options", key)(model, value)
        if mode is not None and not convert:
            model.quantise(mode)
        return cls(model, language, decoding).prepare()

    def check_rows(self, rows: Iterable[Row], split: str) -> None:
        """Reject utterances in a language that the model does not support, before the first one is transcribed.

        Raises
        ------
        UserError
            Naming the first such utterance.
        """
        for row in rows if self.takes_languages else ():
            try:
                self.model.labels.check_language(row.get("language"))
            except UserError as error:
                raise UserError(f"utterance '{row['id']}' of '{split}': {error}") from None

    def encode(
        self,
        wavs: torch.Tensor,
        wav_lens: torch.Tensor | None = None,
        hidden_states: bool = False,
        languages: list[str | None] | None = None,
    ) -> Encoded:
        """Run the encoder on [batch, time] at 16 kHz with relative lengths [batch], at most one window each (first step)."""
        wavs, wav_lens = check_wavs(wavs, wav_lens)
        lengths = absolute_lengths(wavs, wav_lens.to(wavs.device))
        languages = languages or [self.language] * len(wavs)
        wavs = zero_padding(wavs, lengths)
        with torch.no_grad():
            encoded = self.model.encode(wavs, lengths, hidden_states, languages)
        if encoded.own is not None:

            def whole(row: int) -> Encoded:
                known = encoded.languages or languages
                with self.model.whole_window():
                    return self.model.encode(wavs[row : row + 1], lengths[row : row + 1], False, known[row : row + 1])

            encoded.whole = whole
        return encoded

    def decode(self, encoded: Encoded, languages: list[str | None] | None = None) -> list[Transcript]:
        """Decode encoder outputs to text (second step)."""
        with torch.no_grad():
            languages = languages or [self.language] * len(encoded.states)
            hypotheses = search.decode(self.model, encoded, languages, self.options)
        return [Transcript(hypothesis.text, self._details(hypothesis)) for hypothesis in hypotheses]

    def transcribe(
        self, wavs: torch.Tensor, wav_lens: torch.Tensor | None = None, languages: list[str | None] | None = None
    ) -> list[Transcript]:
        """Transcribe a batch, [batch, time] at 16 kHz with relative lengths [batch], at most one window each.

        `languages` [batch], if given, override the transcriber's language.
        """
        languages = languages and [normalise_or_keep(language) for language in languages]
        return self.decode(self.encode(wavs, wav_lens, languages=languages), languages)

    def with_times(self) -> WhisperTranscriber | None:
        """Return a transcriber that also predicts timestamps; None if the model has no timestamp tokens."""
        if not self.model.labels.timestamp_tokens:
            return None
        timed = copy.copy(self)
        timed.options = dataclasses.replace(self.options, timestamps=True)
        return timed

    def for_long_audio(self) -> WhisperTranscriber:
        """Return a transcriber of the same model for the pieces of long audio; see `DecodingOptions.for_long_audio`."""
        pieces = copy.copy(self)
        options = self.options if self.model.samples else dataclasses.replace(self.options, temperatures=(0.0,))
        pieces.options = options.for_long_audio()
        return pieces

    def cost_key(self, transcript: Transcript) -> tuple | None:
        """Return a key that determines MACs: with greedy decoding of one window, the token count; None if unknown.

        With languages from the manifest, it is unknown whether the language was detected; with a limit that depends on the
        duration, whether the last step was that of the end token.
        """
        if self.takes_languages or self.options.max_tokens_per_s is not None:
            return None
        greedy = self.options.num_beams == 1 and len(self.options.schedule) == 1 and self.model.cost_is_fixed
        tokens = transcript.details.get("tokens")  # of a single window
        if not greedy or tokens is None or transcript.details.get("encoded_again"):
            return None
        return (tokens, self.language is None, transcript.details.get("encoder_s"))

    @property
    def languages(self) -> tuple[str, ...]:
        """Codes of the languages that the model supports; empty for a monolingual model."""
        return tuple(self.model.labels.languages)

    @property
    def technique(self) -> str:
        """Technique of the model, or that of its padding."""
        padding = self.model.encoder_padding
        if padding is None or not padding.technique:
            return super().technique
        return padding.technique if super().technique == "none" else f"{super().technique} + {padding.technique}"

    @property
    def changes(self) -> list[str]:
        """What is computed differently from the stored network."""
        return self.model.changes

    @property
    def label(self) -> str:
        """Variant: what the model was trained with, and how it is computed."""
        own = [super().label] if super().label != "baseline" else []
        return " + ".join(own + self.changes) or "baseline"

    def parameters_count(self) -> int | None:
        """Return the number of weights, also of quantised ones."""
        return self.model.stored_parameters or super().parameters_count()

    @property
    def counts_macs(self) -> bool:
        """Whether PyTorch runs the whole model."""
        return self.model.backend == "torch"

    @property
    def thop_counts(self) -> bool:
        """Whether thop knows all layers: not the int8 ones."""
        return self.model.quantised is None

    @property
    def settings(self) -> dict[str, Any]:
        """Network, language and decoding options."""
        decoding = {"language": self.language, "takes_languages": self.takes_languages, "options": str(self.options)}
        if self.model.encoder_padding is not None:
            decoding["retry_logprob"] = self.options.retry_logprob
        return self.model.settings | decoding

    def encoder_shape(self) -> tuple[int, int, int]:
        """Return the hidden states per frame (number of layers plus one), their dimension, and the frames per window."""
        config = self.model.network.config
        return config.encoder_layers + 1, config.d_model, config.max_source_positions

    def _details(self, hypothesis: Hypothesis) -> dict[str, Any]:
        """Return the details recorded next to the text."""
        details = {
            "avg_logprob": hypothesis.avg_logprob, "entropy": hypothesis.entropy, "min_logprob": hypothesis.min_logprob,
            "tokens": len(hypothesis.tokens),
        }  # fmt: skip
        for key in ("entropy", "min_logprob"):  # not every backend computes them
            if math.isnan(details[key]):
                del details[key]
        if self.model.labels.languages and self.language is None:
            details["language"] = hypothesis.language
        if hypothesis.unfinished:
            details["unfinished"] = True
        if self.options.no_speech_threshold is not None:
            details["no_speech_prob"] = hypothesis.no_speech_prob
        if len(self.options.schedule) > 1:
            details["temperature"] = hypothesis.temperature
        if self.options.timestamps:
            details["segments"] = hypothesis.segments
        if self.model.encoder_padding is not None:
            details["encoder_s"] = hypothesis.encoder_s
            if hypothesis.encoded_again:
                details["encoded_again"] = True
        return details | hypothesis.details

    def summary(self, records: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Summarise the technique's decisions over a whole benchmark, and how much of the window was encoded."""
        if self.model.encoder_padding is None:
            return self.model.summary(records)
        records = list(records)
        own_parts = ([record] if "encoder_s" in record else record.get("segments", ()) for record in records)
        parts = [part for each in own_parts for part in each if "encoder_s" in part]
        again = sum(bool(part.get("encoded_again")) for part in parts)
        own = {
            "encoder_s": sum(part["encoder_s"] for part in parts) / max(1, len(parts)),
            "encoded_again_percent": 100 * again / max(1, len(parts)),
        }
        return own | self.model.summary(records)

    def check_sequential(self) -> None:
        """Reject settings that sequential decoding, which is that of transformers, does not have.

        Raises
        ------
        UserError
            Naming the setting.
        """
        if self.model.backend != "torch":
            raise UserError(
                f"long_audio: the backend {self.model.backend} has no sequential decoding; use pauses or overlap"
            )
        padding = self.model.encoder_padding
        no = None
        if padding is not None and padding.padding_s < self.model.window_samples / SAMPLE_RATE:
            no = f"encodes whole windows, and this model has '{padding.label}': pass encoder_padding 30"
        elif not self.model.sequential:
            no = "is done by the model alone: leave out the assistant"
        elif not self.options.suppress:
            no = "suppresses what the model's configuration bans: set suppress to True"
        elif self.options.task == "translate" and not self.model.labels.languages:
            raise UserError("task: this Whisper is English-only and cannot translate")
        if no is not None:
            raise UserError(f"long_audio: sequential decoding {no}, or use pauses or overlap")

    def transcribe_sequentially(self, wav: torch.Tensor, language: str | None = None) -> Transcript:
        """Transcribe long audio [time] window by window, each starting at the last timestamp of the previous one.

        This is Whisper's own algorithm (arXiv 2212.04356, section 3.8) as implemented in transformers. `language` defaults to
        that of the transcriber; if both are None, the language is detected on the first window.
        """
        self.model.labels.check_timestamps()
        if len(self.model.tokenizer) > self.model.labels.timestamp_tokens.stop:
            # transformers would treat these tokens as timestamps and drop them
            raise UserError(
                "long_audio: the tokenizer has tokens after the timestamps, which sequential decoding would drop; use pauses"
            )
        network, options = self.model.network, self.options
        samples = torch.nn.functional.pad(wav.to(self.model.device), (0, -len(wav) % HOP))
        samples = torch.nn.functional.pad(samples, (0, max(0, self.model.window_samples - len(samples))))
        features = self.model.log_mel(samples[None], torch.tensor([len(samples)], device=samples.device))
        with torch.no_grad():
            language = language or self.language or self.model.language_of(wav.to(self.model.device))
        chosen: dict[str, Any] = {"num_beams": options.num_beams, "length_penalty": options.length_penalty}
        if self.model.labels.languages:
            chosen |= {"language": language, "task": options.task}
        limits = [options.max_new_tokens] if options.max_new_tokens is not None else []
        if options.max_tokens_per_s is not None:
            limits.append(10 + math.ceil(options.max_tokens_per_s * self.window_s))
        if limits:  # of each window; with timestamps, the prompt is one token shorter
            room = network.config.max_target_positions - (self.model.labels.prompt_length - 1)
            chosen["max_new_tokens"] = min(*limits, room)
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(0)  # temperature fallback samples tokens
            tokens = network.generate(
                features,
                attention_mask=torch.ones(features.shape[::2], dtype=torch.long, device=features.device),
                return_timestamps=True,
                return_segments=True,
                temperature=options.schedule if len(options.schedule) > 1 else options.schedule[0],
                compression_ratio_threshold=options.compression_ratio_threshold,
                logprob_threshold=options.logprob_threshold,
                no_speech_threshold=options.no_speech_threshold,
                **chosen,
            )
        segments = [
            {
                "start_s": float(part["start"]), "end_s": float(part["end"]),
                "text": self.model.labels.text(part["tokens"].tolist()),
            }
            for part in tokens["segments"][0]
        ]  # fmt: skip
        text = " ".join(segment["text"] for segment in segments if segment["text"])
        return Transcript(text, {"long_audio": "sequential", "segments": segments})

    def to(self, device: str) -> WhisperTranscriber:
        """Move to a device and return self.

        Raises
        ------
        UserError
            If the model is quantised and the device is not the CPU.
        """
        if self.model.backend == "torch" and self.model.quantised and torch.device(device).type != "cpu":
            raise UserError(
                f"quantise: {self.model.quantised} runs on the CPU only; pass --device cpu, or do not quantise"
            )
        self.model.to(device)
        return self.prepare()

    def prepare(self) -> WhisperTranscriber:
        """Let the padding make what it keeps for all utterances, so that no utterance counts or pays for it; return self."""
        if self.model.encoder_padding is not None:
            first = DecodingOptions(max_new_tokens=1)
            languages = [next(iter(self.model.labels.languages), "en")]
            with torch.no_grad():
                encoded = self.model.encode(torch.zeros(1, HOP), torch.tensor([HOP]), False, languages)
                search.search(self.model, encoded, languages, first, 0.0)
        return self
