r"""Speculative decoding: a small assistant proposes tokens, the model checks several of them at once.

Leviathan, Kalman, Matias: "Fast Inference from Transformers via Speculative Decoding" (arXiv 2211.17192), with a distilled
student as in Distil-Whisper (arXiv 2311.00430, section 5). The assistant proposes :math:`\gamma` tokens :math:`d_1 \dots
d_\gamma`; one pass of the model gives the scores after each of them. The longest prefix that the model would have chosen itself
is kept,

.. math:: n = \max \{ i : d_j = \arg\max_v p(v \mid y, d_1 \dots d_{j-1}) \; \forall j \le i \},

and the model's own next token after it. A token therefore costs between :math:`1 / (\gamma + 1)` and one pass of the model. On a
CPU at batch 1 a pass is bound by reading the weights, so that checking a few tokens takes hardly longer than one.

The scores that the search sees are those of the model. Timestamps, suppressed tokens, thresholds and the fallback work as without
an assistant, and the text is the same.

Deviations: greedy acceptance only, also while sampling (the paper's rule for samples needs the assistant's distribution). One
utterance at a time; batches are decoded without the assistant. An assistant with the same encoder uses the model's states; any
other one encodes the audio too. Scores of several tokens at once differ from those of single tokens in the last bits: a tie
could fall differently.
"""

from __future__ import annotations

import itertools
from collections import deque
from typing import Any

import torch

from efficient_asr.models.hub import model_source
from efficient_asr.models.whisper.decoding import Encoded, Hypothesis
from efficient_asr.models.whisper.greedy import Decoder, Steps
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.settings.options import is_selection
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.technique import Column, Key, Technique

TECHNIQUE = Technique(
    name="speculative_decoding",
    keys=(Key("assistant", text=True, eval_only=True),),
    load_options={"assistant": ":with_assistant"},
    columns=(Column("tokens per pass", "tokens_per_pass"),),
)
DRAFT = 5  # tokens that the assistant proposes
STATES = "assistant"  # entry of `Encoded.notes`


class SpeculativeSteps:
    """Steps of a model that are computed several at a time where the assistant guesses the tokens.

    Arguments
    ---------
    model, assistant : Decoder
        Their decoders, for one utterance.
    room : int
        Maximum number of tokens, including the prompt.
    end : int
        The token that ends a hypothesis.
    banned : list of int
        Tokens that the assistant does not propose.

    Attributes
    ----------
    passes, chosen : int
        Passes of the model, and tokens that they gave.
    """

    def __init__(self, model: Decoder, assistant: Decoder, room: int, end: int, banned: list[int]) -> None:
        self.model, self.assistant, self.room, self.end = model, assistant, room, end
        self.vocab_size = model.vocab_size
        self.banned = torch.tensor(sorted({token for token in banned if token < self.vocab_size}), dtype=torch.long)
        self.tokens: list[int] = []  # chosen so far
        self.heard: list[int] = []  # tokens in the assistant's cache
        self.checked: deque[tuple[int, torch.Tensor]] = deque()  # proposed token, scores after it
        self.passes = self.chosen = 0

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append tokens [1, n]; return the scores of the next one, [1, 1 or n, vocabulary]."""
        new = tokens[0].tolist()
        self.chosen += 1
        if len(new) == 1 and self.checked and self.checked[0][0] == new[0]:
            self.tokens += new
            return self.checked.popleft()[1]
        self.model.used = len(self.tokens)
        self.tokens += new
        self.passes += 1
        proposed = self._propose(min(DRAFT, self.room - len(self.tokens)), tokens.device)
        scores = self.model.step(torch.tensor([new + proposed], device=tokens.device))
        after = scores[:, len(new) :].split(1, dim=1) if proposed else ()
        self.checked = deque(zip(proposed, after, strict=True))
        return scores[:, : len(new)]

    def _propose(self, count: int, device: torch.device) -> list[int]:
        """Return up to `count` tokens that the assistant expects next; it stops at the end token."""
        known = 0
        limit = min(len(self.heard), len(self.tokens) - 1)
        while known < limit and self.heard[known] == self.tokens[known]:
            known += 1
        self.assistant.used, self.heard = known, self.heard[:known]
        found, new = [], self.tokens[known:]
        while len(found) < count and (not found or found[-1] != self.end):
            scores = self.assistant.step(torch.tensor([new], device=device))[0, -1]
            self.heard += new
            scores[self.banned.to(device)] = -torch.inf
            new = [int(scores.argmax())]
            found += new
        return found


class SpeculativeWhisper(Whisper):
    """A Whisper with an assistant.

    Arguments
    ---------
    model : Whisper
        The model, whose texts are returned.
    assistant : Whisper
        A faster one with the same vocabulary.

    Raises
    ------
    UserError
        If the two do not fit together.
    """

    technique = "speculative_decoding"
    cost_is_fixed = False
    beam_search = False
    sequential = False
    steps: SpeculativeSteps | None = None  # of the search that is under way

    def __init__(self, model: Whisper, assistant: Whisper) -> None:
        super().__init__(model.network, model.tokenizer)
        if assistant.tokenizer.get_vocab() != model.tokenizer.get_vocab():
            raise UserError(
                "assistant: its vocabulary differs from the model's; use an assistant with the same vocabulary"
            )
        if assistant.window_samples != model.window_samples:
            raise UserError("assistant: its window is not as long as the model's")
        self.__dict__.pop("technique", None)  # of what the model was trained with
        self.encoder_padding, self.history = model.encoder_padding, model.history
        self.assistant = assistant
        self.same_encoder = model.has_encoder_of(assistant)
        if not self.same_encoder and self.encoder_padding is not None:
            raise UserError("assistant: with encoder_padding, the assistant must have the same encoder as the model")

    @property
    def changes(self) -> list[str]:
        """Those of the model, and the assistant."""
        return [*super().changes, f"assistant with {self.assistant.network.config.decoder_layers} decoder layers"]

    def quantise(self, mode: str) -> None:
        """Compute with int8 weights, and let the assistant do so too.

        Raises
        ------
        UserError
            If the mode is a selection of layers, which is that of one model.
        """
        if is_selection(mode):
            raise UserError(
                f"quantise: {mode} selects layers of one model; with an assistant, use decoder-int8 or int8"
            )
        super().quantise(mode)
        self.assistant.quantise(mode)
        self.stored_parameters += self.assistant.stored_parameters

    def encode(
        self,
        wavs: torch.Tensor,
        lengths: torch.Tensor,
        hidden_states: bool = False,
        languages: list[str | None] | None = None,
    ) -> Encoded:
        """Run the encoder, and that of an assistant whose encoder is another one."""
        encoded = super().encode(wavs, lengths, hidden_states, languages)
        if not self.same_encoder and len(wavs) == 1:
            encoded.notes[STATES] = self.assistant.encode(wavs, lengths).states
        return encoded

    def decoder(self, encoded: Encoded, room: int) -> Steps:
        """Return the decoder for encoder states; with the assistant if they are of one utterance."""
        decoder = super().decoder(encoded, room)
        if len(encoded.states) > 1 or (not self.same_encoder and STATES not in encoded.notes):
            return decoder
        own = encoded if self.same_encoder else Encoded(encoded.notes[STATES], encoded.lengths)
        generation = self.network.generation_config
        self.steps = SpeculativeSteps(
            decoder, Decoder(self.assistant.network, own, room), room, self.labels.end, generation.suppress_tokens or []
        )
        return self.steps

    def annotate(self, hypotheses: list[Hypothesis], encoded: Encoded) -> None:
        """Record how many tokens a pass of the model gave on average."""
        super().annotate(hypotheses, encoded)
        if len(hypotheses) == 1 and self.steps is not None and self.steps.passes:
            hypotheses[0].details["tokens_per_pass"] = round(self.steps.chosen / self.steps.passes, 3)
        self.steps = None

    def summary(self, records: Any) -> dict[str, Any]:
        """Return the mean number of tokens per pass over utterances and pieces of long recordings."""
        records = list(records)
        own = ([record] if "tokens_per_pass" in record else record.get("segments", ()) for record in records)
        parts = itertools.chain.from_iterable(own)
        rates = [part["tokens_per_pass"] for part in parts if "tokens_per_pass" in part]
        return super().summary(records) | ({"tokens_per_pass": sum(rates) / len(rates)} if rates else {})

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the model, and the assistant's network."""
        return super().settings | {"assistant": self.assistant.settings["network"], "draft": DRAFT}


def with_assistant(model: Whisper, source: str) -> SpeculativeWhisper:
    """Return a Whisper with the assistant in a model folder.

    Raises
    ------
    UserError
        If that is impossible.
    """
    if model.backend != "torch":
        raise UserError(f"assistant: the backend {model.backend} has its own search; use torch")
    if type(model) is not Whisper:
        raise UserError(f"assistant: not for a Whisper with layers of the technique {model.technique}")
    try:
        assistant = Whisper.from_source(model_source(source), with_padding=False)
    except UserError as error:
        raise UserError(f"assistant: {error}") from None
    if type(assistant) is not Whisper:
        raise UserError(f"assistant: '{source}' has {assistant.technique}; use a plain Whisper")
    return SpeculativeWhisper(model, assistant.eval().requires_grad_(False))
