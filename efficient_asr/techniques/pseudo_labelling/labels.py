r"""Pseudo-labels: what a teacher hears, with what is needed to judge it.

Gandhi, von Platen, Rush: "Distil-Whisper: Robust Knowledge Distillation via Large-Scale Pseudo Labelling" (arXiv 2311.00430). The
text of an utterance is replaced by the teacher's transcript :math:`\hat y`. Where the original text :math:`y` is known, the word
error rate between the two, both normalised,

.. math:: \mathrm{WER}(y, \hat y) = \frac{S + D + I}{|y|},

tells whether to trust it (`filtering.py`).

Deviations: audio without texts can be labelled too; it is judged by the mean log-probability of the tokens, the zlib compression
ratio of the text (repetition), and the probability of silence, as in Whisper's own fallback (arXiv 2212.04356, section 4.5).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from efficient_asr.data import ORIGIN, Row
from efficient_asr.evaluation.wer import count_errors, error_rate_percent
from efficient_asr.inference.load import load_transcriber
from efficient_asr.inference.transcriber import MANIFEST, transcribe_rows
from efficient_asr.inference.transcript import Transcript
from efficient_asr.models.whisper.decoding import compression_ratio
from efficient_asr.text.normalise import get_normaliser, join_signs, whisper_normaliser

# What a label says about itself; a row that was labelled before has these fields of the former label.
JUDGED = (
    "origin_text",
    "wer_percent",
    "cer_percent",
    "avg_logprob",
    "compression_ratio",
    "no_speech_prob",
    "unfinished",
    "reasons",
)


class Labeller:
    """Labels batches of utterances with a teacher.

    Arguments
    ---------
    source : str
        The teacher: anything that `load_transcriber` opens.
    options : dict
        Options of `load_transcriber`.
    device : str
        Device to run it on.
    normaliser : str or None
        Normaliser for WER and CER; None for Whisper's own, by language.
    timestamps : bool
        Whether to keep timed `segments`.
    text_columns : list of str
        Columns that the text was read from, and which are dropped: a label must not stand beside them under another name.
    """

    def __init__(
        self,
        source: str,
        options: dict[str, Any],
        device: str,
        normaliser: str | None = None,
        timestamps: bool = False,
        text_columns: Sequence[str] = (),
    ) -> None:
        self.transcriber = load_transcriber(source, **options).to(device)
        self.normaliser, self.timestamps = normaliser, timestamps
        given = options.get("language")
        self.language = None if given == MANIFEST else given
        self.dropped = {"text", "segments", "split", ORIGIN, *JUDGED, *text_columns}

    def __call__(self, rows: Sequence[Row], wavs: torch.Tensor, wav_lens: torch.Tensor) -> list[Row]:
        """Return the labelled rows of a batch, [batch, time] with relative lengths [batch]."""
        found = transcribe_rows(self.transcriber, list(rows), wavs, wav_lens)
        return [self.label(row, transcript) for row, transcript in zip(rows, found, strict=True)]

    def label(self, row: Row, transcript: Transcript) -> Row:
        """Return a row with the teacher's text; `origin_text`, `wer_percent` and `cer_percent` if it had one.

        The text of a row that was labelled before is another teacher's; its `origin_text`, if it has one, is the reference.
        """
        language = self._language(row, transcript)
        labelled = {key: value for key, value in row.items() if key not in self.dropped}
        labelled |= (
            {"origin_split": row["split"]} if "split" in row else {}
        )  # `split` would choose the split of a training
        labelled |= {"text": transcript.text} | ({"language": language} if language else {})
        reference = row.get("origin_text") or (None if "compression_ratio" in row else row.get("text"))
        if str(reference or "").strip():
            labelled |= {"origin_text": reference} | self._rates(reference, transcript.text, language)
        labelled |= confidences(transcript)
        if any(part.get("unfinished") for part in (transcript.details, *transcript.details.get("segments", ()))):
            labelled["unfinished"] = True
        if self.timestamps:
            kept = ("start_s", "end_s", "text")
            segments = transcript.details.get("segments", [])
            labelled["segments"] = [{key: segment[key] for key in kept} for segment in segments]
        return labelled

    def _language(self, row: Row, transcript: Transcript) -> str | None:
        """Return the language that the teacher wrote: the one it was given, or heard."""
        if self.language is not None:
            return self.language
        given = row.get("language")
        return given if given and self.transcriber.takes_languages else _heard_language(transcript) or given

    def _rates(self, text: str, hypothesis: str, language: str | None) -> dict[str, float | None]:
        normalise = get_normaliser(self.normaliser or whisper_normaliser([language or "en"]))
        pair = [normalise(each, language or "en") for each in (text, hypothesis)]
        rates = {}
        for name, characters in (("wer_percent", False), ("cer_percent", True)):
            texts = [join_signs(each) for each in pair] if characters else pair
            rate = error_rate_percent(count_errors([texts[0]], [texts[1]], characters))
            rates[name] = None if rate is None else round(rate, 2)
        return rates


def _heard_language(transcript: Transcript) -> str | None:
    """Return the detected language; of audio that was transcribed in pieces, that of most segments."""
    if transcript.details.get("language"):
        return transcript.details["language"]
    heard = Counter(
        segment["language"] for segment in transcript.details.get("segments", ()) if segment.get("language")
    )
    return heard.most_common(1)[0][0] if heard else None


def confidences(transcript: Transcript) -> dict[str, float | None]:
    """Return `avg_logprob`, `compression_ratio` and `no_speech_prob` of a transcript; None where the model has none.

    Of audio that was transcribed in pieces: the mean over the tokens, and the highest probability of silence.
    """
    parts = [transcript.details] if "avg_logprob" in transcript.details else transcript.details.get("segments", [])
    parts = [part for part in parts if "avg_logprob" in part]
    same = ("avg_logprob", "tokens", "entropy")  # the segments of one piece share what is known of the piece
    parts = [part for i, part in enumerate(parts) if i == 0 or any(part.get(k) != parts[i - 1].get(k) for k in same)]
    weights = [part.get("tokens", 0) + 1 for part in parts]  # and the end token
    mean = sum(w * part["avg_logprob"] for w, part in zip(weights, parts, strict=True)) / max(1, sum(weights))
    silent = [part["no_speech_prob"] for part in parts if part.get("no_speech_prob") is not None]
    return {
        "avg_logprob": round(mean, 4) if parts and math.isfinite(mean) else None,
        "compression_ratio": round(compression_ratio(transcript.text), 3),
        "no_speech_prob": round(max(silent), 4) if silent else None,
    }
