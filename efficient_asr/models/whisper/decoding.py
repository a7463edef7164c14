"""Inputs and outputs of decoding with Whisper: options, encoder states, hypotheses."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from transformers.generation import StoppingCriteria

from efficient_asr.utils.errors import UserError, did_you_mean

WHISPER_TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # arXiv 2212.04356, section 4.5
_LOOP_TOKENS, _LOOP_ROUNDS, _LONGEST_ROUND = 24, 4, 32  # a loop: min tokens, min rounds, max tokens per round


@dataclass(frozen=True)
class DecodingOptions:
    """Options for decoding.

    Attributes
    ----------
    task : str
        `transcribe`, or `translate` (into English).
    num_beams : int
        Number of beams; 1 decodes greedily.
    length_penalty : float
        Of beam search: scores are divided by length to this power.
    max_new_tokens : int or None
        Maximum number of tokens per hypothesis; None for the number of positions in the model.
    max_tokens_per_s : float or None
        Limit a hypothesis to ten tokens plus this many per second of audio, so that a looping model neither wastes time nor
        adds hundreds of errors. None for no such limit.
    timestamps : bool
        Predict timestamps; hypotheses then have segments.
    suppress : bool
        Suppress the tokens banned by the model's generation configuration, such as music symbols.
    temperatures : tuple of float or None
        The first one is used for the search (0: the most likely tokens). If a hypothesis fails a threshold below, the next one
        is tried, by sampling. A single value means no fallback. None means no fallback for audio that fits into the window,
        and Whisper's own temperatures (`WHISPER_TEMPERATURES`) for the pieces of longer audio.
    compression_ratio_threshold : float
        A text with a higher zlib compression ratio is considered repetitive and fails.
    logprob_threshold : float
        A hypothesis with a lower mean log-probability fails.
    no_speech_threshold : float or None
        If the probability of silence exceeds this and the hypothesis fails `logprob_threshold`, the text is empty.
        None disables the check.
    retry_logprob : float or None
        If an utterance was encoded on its own length and its hypothesis has a lower mean log-probability, is repetitive
        (`compression_ratio_threshold`) or fills all positions of the model, the whole window is encoded and decoded. None, or
        minus infinity, disables this.
    cut_loops : bool
        End a hypothesis that repeats itself word for word, keep one copy of the repeated part, and count the hypothesis as
        failed. Enabled for the pieces of long audio.
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
    retry_logprob: float | None = field(default=-1.0, repr=False)
    cut_loops: bool = False

    @property
    def schedule(self) -> tuple[float, ...]:
        """The temperatures to try, in order."""
        return (0.0,) if self.temperatures is None else self.temperatures

    def for_long_audio(self) -> DecodingOptions:
        """Return the options for pieces of long audio: loops are cut, and Whisper's temperatures are the default."""
        return replace(self, temperatures=self.temperatures or WHISPER_TEMPERATURES, cut_loops=True)

    def __post_init__(self) -> None:
        if self.task not in ("transcribe", "translate"):
            raise UserError(f"task: '{self.task}' is invalid; use transcribe or translate")
        if isinstance(self.retry_logprob, bool) or not isinstance(self.retry_logprob, (int, float, type(None))):
            raise UserError(f"retry_logprob: {self.retry_logprob!r} is not a number")
        if self.num_beams < 1:
            raise UserError(f"num_beams: {self.num_beams} is less than 1")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens: {self.max_new_tokens} is less than 1")
        if self.max_tokens_per_s is not None and not self.max_tokens_per_s > 0:
            raise UserError(f"max_tokens_per_s: {self.max_tokens_per_s} is not above 0")
        if not self.schedule or any(not 0 <= t <= 2 for t in self.schedule):
            raise UserError(f"temperatures: {list(self.temperatures)} must be one or more numbers between 0 and 2")

    @classmethod
    def of(cls, options: dict[str, Any]) -> DecodingOptions:
        """Build the options from keys and values.

        Raises
        ------
        UserError
            For an unknown key or an invalid value.
        """
        known = [f.name for f in fields(cls)]
        for key in options:
            if key not in known:
                raise UserError(f"'{key}' is not a decoding option of Whisper.{did_you_mean(key, known)}")
        for key in _NUMBERS:
            value = options.get(key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise UserError(f"{key}: expected a number, got {value!r}")
        if options.get("temperatures") is not None:
            try:
                options = options | {"temperatures": tuple(float(t) for t in options["temperatures"])}
            except (TypeError, ValueError):
                raise UserError(f"temperatures: expected a list of numbers, got {options['temperatures']!r}") from None
        return cls(**options)


_NUMBERS = (
    "num_beams", "length_penalty", "max_new_tokens", "max_tokens_per_s", "compression_ratio_threshold", "logprob_threshold",
    "no_speech_threshold",
)  # fmt: skip


@dataclass
class Tail:
    """Representatives of silence that complete the encoder states of every utterance of a model.

    Attributes
    ----------
    states : torch.Tensor
        [groups, dim]; the mean of the states that a group stands for.
    starts : torch.Tensor
        First position of the window from which on an utterance can do without computing the positions of a group, [groups],
        in ascending order.
    log_weights : torch.Tensor
        Logarithm of the number of positions of each group, [groups].
    projected : dict
        Keys and values of the groups, by attention module; filled by the decoder.
    """

    states: torch.Tensor
    starts: torch.Tensor
    log_weights: torch.Tensor
    projected: dict[Any, Any] = field(default_factory=dict, repr=False)

    def first(self, own: torch.Tensor) -> int:
        """Return the first group that any utterance with `own` positions [batch] needs."""
        return int((self.starts < int(own.min())).sum())


def attention_bias(own: torch.Tensor, tail: Tail | None, states: torch.Tensor) -> torch.Tensor | None:
    """Return what is added to attention scores: minus infinity for what an utterance must not see.

    Arguments
    ---------
    own : torch.Tensor
        Number of positions of each utterance, [batch].
    tail : Tail or None
        Groups that follow the positions, from `tail.first(own)` on; each has its log weight, unless the utterance has computed
        its positions itself.
    states : torch.Tensor
        [batch, longest, dim]; gives shape, device and number format.

    Returns
    -------
    torch.Tensor or None
        [batch, 1, 1, longest + groups]; None if it would be zero.
    """
    device, longest, first = states.device, states.shape[1], 0 if tail is None else tail.first(own)
    own = own.to(device)[:, None]
    places = torch.arange(longest, device=device)
    bias = torch.zeros(len(own), longest, device=device).masked_fill(places >= own, -torch.inf)
    if tail is not None:
        weights = tail.log_weights[first:]
        starts = tail.starts[first:].to(device)
        bias = torch.cat([bias, weights.expand(len(own), -1).masked_fill(starts < own, -torch.inf)], dim=1)
    return bias[:, None, None].to(states.dtype) if bool(bias.count_nonzero()) else None


@dataclass
class Encoded:
    """Encoder output for a batch.

    Attributes
    ----------
    states : torch.Tensor
        [batch, frames, dim], for the whole window, unless `own` is given and `tail` is not: then for the longest utterance.
    lengths : torch.Tensor
        Number of unpadded samples of each utterance, [batch].
    hidden_states : tuple of torch.Tensor or None
        If requested: the input of the first layer and the output of every layer, the last one after the final layer norm
        (transformers' convention), each [batch, frames, dim].
    languages : list of str or None
        Code of each utterance's language, if the encoder needed it.
    notes : dict of torch.Tensor
        Values recorded by a technique for each utterance, [batch, ...].
    own : torch.Tensor or None
        Number of positions that were computed for each utterance, [batch]; None for the whole window.
    tail : Tail or None
        What stands for the positions that were not computed.
    whole : callable or None
        Encodes the whole window of an utterance, given its row.
    """

    states: torch.Tensor
    lengths: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None = None
    languages: list[str] | None = None
    notes: dict[str, torch.Tensor] = field(default_factory=dict)
    own: torch.Tensor | None = None
    tail: Tail | None = None
    whole: Callable[[int], Encoded] | None = field(default=None, repr=False)

    @property
    def is_ragged(self) -> bool:
        """Whether the utterances have different numbers of states, so that a network without a mask takes one at a time."""
        return self.own is not None and self.tail is None and len({*self.own.tolist()}) > 1

    def memory(self) -> tuple[torch.Tensor, torch.Tensor | None, int]:
        """Return what cross-attention sees: states [batch, frames, dim] without those that the tail stands for, the additive
        bias of its scores [batch, 1, 1, frames + groups], and the first group of the tail that belongs to it.
        """
        if self.own is None:
            return self.states, None, 0
        states = self.states[:, : int(self.own.max())]
        first = 0 if self.tail is None else self.tail.first(self.own)
        return states, attention_bias(self.own, self.tail, states), first

    def select(self, rows: torch.Tensor) -> Encoded:
        """Return the selected utterances, indices [n]."""
        hidden, whole, chosen = self.hidden_states, self.whole, rows.tolist()
        return Encoded(
            self.states[rows],
            self.lengths[rows.to(self.lengths.device)],
            hidden and tuple(states[rows] for states in hidden),
            self.languages and [self.languages[i] for i in rows.tolist()],
            {name: note[rows.to(note.device)] for name, note in self.notes.items()},
            None if self.own is None else self.own[rows.to(self.own.device)],
            self.tail,
            whole and (lambda row: whole(chosen[row])),
        ).cut()

    def cut(self) -> Encoded:
        """Drop states past the longest utterance, if the states do not cover the window."""
        if self.own is not None and self.tail is None:
            self.states = self.states[:, : int(self.own.max())]
        return self


@dataclass
class Hypothesis:
    """Recognition result for one utterance.

    Attributes
    ----------
    text : str
        The text as the model writes it.
    tokens : list of int
        Its tokens, without the prompt and the end token.
    avg_logprob : float
        Mean log-probability of the tokens, including the end token, normalised over the allowed tokens.
    entropy : float
        Mean entropy of the distributions the tokens were chosen from, in nats; NaN if the backend does not compute it.
    min_logprob : float
        Log-probability of the least likely token; NaN if the backend knows only the mean.
    language : str or None
        ISO 639-1 code, given or detected; None for a model with one language.
    no_speech_prob : float or None
        Probability of silence, if it was requested.
    temperature : float
        Temperature at which the text was decoded.
    looped : bool
        Whether it repeated itself and was cut.
    cut_off : bool
        Whether it filled all positions of the model.
    unfinished : bool
        Whether a limit came before the end token.
    encoder_s : float
        Seconds of audio and silence that the encoder computed, with those of a first attempt if it was `encoded_again`.
    encoded_again : bool
        Whether the text was decoded again from the whole window.
    segments : list of dict
        `start_s`, `end_s`, `text`, if timestamps were requested.
    details : dict
        What a technique did.
    """

    text: str
    tokens: list[int]
    avg_logprob: float
    entropy: float
    min_logprob: float
    language: str | None = None
    no_speech_prob: float | None = None
    temperature: float = 0.0
    looped: bool = False  # it repeated itself and was cut
    cut_off: bool = False
    unfinished: bool = False
    encoder_s: float = 0.0
    encoded_again: bool = False
    segments: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


def compression_ratio(text: str) -> float:
    """Return the ratio of a text's size to its zlib-compressed size; high for repetitive text."""
    content = text.encode()
    return len(content) / len(zlib.compress(content))


def entropy(scores: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of each row of [batch, vocabulary]; forbidden tokens have a score of minus infinity."""
    log_probs = scores.float().log_softmax(dim=1)
    return -(log_probs.exp() * log_probs.clamp(min=-1e4)).sum(dim=1)


def loop_start(tokens: list[int]) -> int | None:
    """Return the start of the second round of the loop that ends a hypothesis; None if it does not end with a loop."""
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
        Tokens to ignore: timestamps differ from round to round.
    """

    def __init__(self, begin: int, ignored: range) -> None:
        self.begin, self.ignored = begin, ignored

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return which rows loop, [rows]."""
        rows = input_ids[:, self.begin :].tolist()
        found = [loop_start([token for token in row if token not in self.ignored]) is not None for row in rows]
        return torch.tensor(found, device=input_ids.device)


class LengthLimits(StoppingCriteria):
    """Ends each utterance at its own maximum length; beam search has several candidates per utterance."""

    def __init__(self, lengths: torch.Tensor) -> None:
        self.lengths = lengths

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return which rows have reached their limit, [rows]."""
        return input_ids.shape[1] >= self.lengths.repeat_interleave(len(input_ids) // len(self.lengths))
