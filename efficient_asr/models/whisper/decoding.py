"""What goes into decoding with Whisper and what comes out: options, encoder states, hypotheses."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from transformers.generation import StoppingCriteria

from efficient_asr.utils.errors import UserError, did_you_mean

WHISPER_TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # arXiv 2212.04356, section 4.5
_LOOP_TOKENS, _LOOP_ROUNDS, _LONGEST_ROUND = 24, 4, 32  # what counts as a loop: so many tokens, and so often the same


@dataclass(frozen=True)
class DecodingOptions:
    """How hypotheses are searched for.

    Attributes
    ----------
    task : str
        `transcribe`, or `translate` (into English).
    num_beams : int
        Beams; 1 decodes greedily.
    length_penalty : float
        Of beam search: scores are divided by length to this power.
    max_new_tokens : int or None
        Most tokens of a hypothesis; None for as many as the model has positions.
    max_tokens_per_s : float or None
        Ends a hypothesis after ten tokens and so many for each second of its audio, so that a model which loops costs
        neither time nor hundreds of errors. None for no such limit.
    timestamps : bool
        Predict timestamps; hypotheses then have segments.
    suppress : bool
        Keep the model from tokens that its generation configuration bans, such as music signs.
    temperatures : tuple of float or None
        The first is for search (0: the most likely); where a hypothesis fails a threshold below, the next one is tried, by
        sampling. One alone means no fallback. None means none for what fits into the window, and Whisper's own
        (`WHISPER_TEMPERATURES`) for the pieces of longer audio.
    compression_ratio_threshold : float
        A text that zlib shortens more than this repeats itself and fails.
    logprob_threshold : float
        A mean log-probability below this fails.
    no_speech_threshold : float or None
        Where the model finds silence likelier than this and the hypothesis fails `logprob_threshold`, the text is empty.
        None never asks.
    cut_loops : bool
        End a hypothesis that repeats itself word for word, keep what it repeats once, and count it as failed. Done for the pieces
        of long audio.
    """

    task: str = "transcribe"
    num_beams: int = 1
    length_penalty: float = 1.0
    max_new_tokens: int | None = None
    max_tokens_per_s: float | None = None
    timestamps: bool = False
    suppress: bool = True
    temperatures: tuple[float, ...] | None = None
    compression_ratio_threshold: float = 2.4
    logprob_threshold: float = -1.0
    no_speech_threshold: float | None = None
    cut_loops: bool = False

    @property
    def schedule(self) -> tuple[float, ...]:
        """The temperatures that are tried, in order."""
        return (0.0,) if self.temperatures is None else self.temperatures

    def for_long_audio(self) -> DecodingOptions:
        """Return the options for pieces of long audio: loops are cut, and Whisper's temperatures tried where none are named."""
        return replace(self, temperatures=self.temperatures or WHISPER_TEMPERATURES, cut_loops=True)

    def __post_init__(self) -> None:
        if self.task not in ("transcribe", "translate"):
            raise UserError(f"task: '{self.task}' is not transcribe or translate")
        if self.num_beams < 1:
            raise UserError(f"num_beams: {self.num_beams} is less than 1")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens: {self.max_new_tokens} is less than 1")
        if self.max_tokens_per_s is not None and not self.max_tokens_per_s > 0:
            raise UserError(f"max_tokens_per_s: {self.max_tokens_per_s} is not above 0")
        if not self.schedule or any(not 0 <= t <= 2 for t in self.schedule):
            raise UserError(f"temperatures: {list(self.temperatures)} are not numbers between 0 and 2")

    @classmethod
    def of(cls, options: dict[str, Any]) -> DecodingOptions:
        """Make them of keys and values.

        Raises
        ------
        UserError
            For an unknown key or a value that makes no sense.
        """
        known = [f.name for f in fields(cls)]
        for key in options:
            if key not in known:
                raise UserError(f"'{key}' is not a decoding option of Whisper.{did_you_mean(key, known)}")
        if options.get("temperatures") is not None:
            options = options | {"temperatures": tuple(float(t) for t in options["temperatures"])}
        return cls(**options)


@dataclass
class Encoded:
    """What the encoder made of a batch.

    Attributes
    ----------
    states : torch.Tensor
        [batch, frames, dim], of the whole window.
    lengths : torch.Tensor
        Real samples of each utterance, [batch].
    hidden_states : tuple of torch.Tensor or None
        On request: the input of the first layer and the output of every layer, the last one after the final layer norm
        (transformers' convention), each [batch, frames, dim].
    languages : list of str or None
        Code of each utterance's language, where the encoder had to know it.
    notes : dict of torch.Tensor
        What a technique noted of each utterance, [batch, ...].
    """

    states: torch.Tensor
    lengths: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None = None
    languages: list[str] | None = None
    notes: dict[str, torch.Tensor] = field(default_factory=dict)

    def select(self, rows: torch.Tensor) -> Encoded:
        """Return some utterances, indices [n]."""
        hidden = self.hidden_states
        return Encoded(
            self.states[rows],
            self.lengths[rows.to(self.lengths.device)],
            hidden and tuple(states[rows] for states in hidden),
            self.languages and [self.languages[i] for i in rows.tolist()],
            {name: note[rows.to(note.device)] for name, note in self.notes.items()},
        )


@dataclass
class Hypothesis:
    """What was recognised in one utterance.

    Attributes
    ----------
    text : str
        As the model writes it.
    tokens : list of int
        Without prompt and end.
    avg_logprob : float
        Mean log-probability of the tokens, the end included, among the tokens that were allowed.
    entropy : float
        Mean entropy of the distributions they were chosen from, nats.
    language : str or None
        ISO 639-1 code, given or detected; None for a model of one language.
    no_speech_prob : float or None
        Where it was asked for.
    temperature : float
        At which it was found.
    segments : list of dict
        `start_s`, `end_s`, `text`, where timestamps were asked for.
    details : dict
        What a technique did.
    """

    text: str
    tokens: list[int]
    avg_logprob: float
    entropy: float
    language: str | None = None
    no_speech_prob: float | None = None
    temperature: float = 0.0
    looped: bool = False  # it repeated itself, and was cut
    segments: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


def compression_ratio(text: str) -> float:
    """Bytes of a text to bytes that zlib makes of it: high where it repeats itself."""
    content = text.encode()
    return len(content) / len(zlib.compress(content))


def entropy(scores: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of each row of [batch, vocabulary]; forbidden tokens stand at minus infinity."""
    log_probs = scores.float().log_softmax(dim=1)
    return -(log_probs.exp() * log_probs.clamp(min=-1e4)).sum(dim=1)


def loop_start(tokens: list[int]) -> int | None:
    """Return where the second round of a loop begins with which a hypothesis ends; None where it does not end with one."""
    for size in range(1, _LONGEST_ROUND + 1):
        needed = max(_LOOP_TOKENS, _LOOP_ROUNDS * size)
        if len(tokens) < needed:
            return None
        if all(tokens[i] == tokens[i - size] for i in range(len(tokens) - 1, len(tokens) - 1 - needed + size, -1)):
            start = len(tokens) - needed
            while start > 0 and tokens[start - 1] == tokens[start - 1 + size]:
                start -= 1
            return start + size
    return None


def without_loop(tokens: list[int], ignored: range) -> list[int]:
    """Return a hypothesis without the repetitions at its end; `ignored` tokens do not count (see `LoopStop`)."""
    words = [i for i, token in enumerate(tokens) if token not in ignored]
    start = loop_start([tokens[i] for i in words])
    return tokens if start is None else tokens[: words[start]]


class LoopStop(StoppingCriteria):
    """Ends each hypothesis that has begun to repeat itself.

    Arguments
    ---------
    begin : int
        Length of the prompt.
    ignored : range
        Tokens that do not count: timestamps differ from round to round.
    """

    def __init__(self, begin: int, ignored: range) -> None:
        self.begin, self.ignored = begin, ignored

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return which rows loop, [rows]."""
        rows = input_ids[:, self.begin :].tolist()
        found = [loop_start([token for token in row if token not in self.ignored]) is not None for row in rows]
        return torch.tensor(found, device=input_ids.device)


class LengthLimits(StoppingCriteria):
    """Ends each utterance at a length of its own; beam search asks about several candidates of each."""

    def __init__(self, lengths: torch.Tensor) -> None:
        self.lengths = lengths

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return which rows have come to their end, [rows]."""
        return input_ids.shape[1] >= self.lengths.repeat_interleave(len(input_ids) // len(self.lengths))
