"""Whisper's timestamp tokens: the rules for predicting them, and the segments that they delimit.

Both use the exact range of timestamp tokens. transformers treats every token from the first timestamp on as a timestamp, so
a tokenizer with words after them (added for another language, for example) loses these words and the segments around them.
"""

from __future__ import annotations

import torch
from transformers.generation import LogitsProcessor

STEP_S = 0.02


class TimestampRules(LogitsProcessor):
    """Whisper's rules for timestamps (arXiv 2212.04356; openai/whisper, `ApplyTimestampRules`).

    Timestamps come in pairs and do not decrease. A hypothesis begins with one. If all timestamps together are more likely than
    any text token, a timestamp is predicted.

    Arguments
    ---------
    timestamps : range
        The timestamp tokens, starting at 0 s.
    end : int
        The end-of-text token; the tokens below it are text.
    no_timestamps : int
        The token that disables timestamps, which must not be predicted.
    begin : int
        Position of the first predicted token.
    first_max : int or None
        Maximum index of the first timestamp, counted from 0 s.
    """

    def __init__(self, timestamps: range, end: int, no_timestamps: int, begin: int, first_max: int | None) -> None:
        self.timestamps, self.end, self.no_timestamps = timestamps, end, no_timestamps
        self.begin, self.first_max = begin, first_max

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [rows, vocabulary] with forbidden tokens at minus infinity, for tokens [rows, positions]."""
        scores, start, stop = scores.clone(), self.timestamps.start, self.timestamps.stop
        forbidden = -torch.inf
        scores[:, self.no_timestamps] = forbidden
        for row, tokens in zip(scores, input_ids[:, self.begin :].tolist(), strict=True):
            found = [token for token in tokens if token in self.timestamps]
            last = bool(tokens) and tokens[-1] in self.timestamps
            before = len(tokens) < 2 or tokens[-2] in self.timestamps
            if last and before:  # a pair is complete: text must follow
                row[start:stop] = forbidden
            elif last:  # the first of a pair: no text
                row[: self.end] = forbidden
                row[stop:] = forbidden
            if found:  # they do not decrease; a segment is not empty
                row[start : found[-1] + (0 if last and not before else 1)] = forbidden
        if input_ids.shape[1] == self.begin:
            scores[:, :start] = forbidden
            scores[:, stop:] = forbidden
            if self.first_max is not None:
                scores[:, min(stop, start + self.first_max + 1) : stop] = forbidden
        log_probs = scores.float().log_softmax(dim=-1)
        text = log_probs.clone()
        text[:, start:stop] = forbidden
        certain = log_probs[:, start:stop].logsumexp(dim=-1) > text.max(dim=-1).values
        mask = torch.ones(scores.shape[1], dtype=torch.bool, device=scores.device)
        mask[start:stop] = False
        return scores.masked_fill(certain[:, None] & mask, forbidden)


def split_segments(tokens: list[int], timestamps: range, length_s: float) -> list[tuple[float, float, list[int]]]:
    """Return start, end (seconds) and text tokens of each segment of a hypothesis; no token is lost.

    Arguments
    ---------
    tokens : list of int
        The tokens of the hypothesis, without the prompt and the end token.
    timestamps : range
        The timestamp tokens, starting at 0 s.
    length_s : float
        Length of the audio in seconds, at which a last segment without an end timestamp ends.
    """
    segments: list[tuple[float, float, list[int]]] = []
    start_s, words = 0.0, []
    for token in tokens:
        if token not in timestamps:
            words.append(token)
            continue
        time_s = (token - timestamps.start) * STEP_S
        if words:
            segments.append((start_s, max(start_s, time_s), words))
            words = []
        start_s = time_s
    if words:
        segments.append((start_s, max(start_s, length_s), words))
    return segments
