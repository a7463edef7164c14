r"""A recogniser with language experts: every utterance is handled by the expert of its language.

"Multilingual DistilWhisper" (arXiv 2311.01070): the blocks, the gates and the equation
:math:`h = g \, \mathrm{FFN}_l(x) + (1 - g) \, \mathrm{FFN}_{shared}(x)` are in `experts.py`,
the network and its files in `network.py`.

Deviations: if the language of an utterance is unknown, a first pass through the shared blocks detects it. If that language
has an expert, a second pass uses the expert.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from efficient_asr.models.log_mel import encoder_frames
from efficient_asr.models.parts import stable_name
from efficient_asr.models.whisper.decoding import DecodingOptions, Encoded, Hypothesis
from efficient_asr.models.whisper.greedy import Steps
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.techniques.clsr.experts import SIDES, ExpertSettings, Routing
from efficient_asr.techniques.clsr.network import DistilWhisperForConditionalGeneration


class CountedSteps:
    """Steps of a decoder; those of hypotheses that have ended, while others of the batch go on, are not counted by the gates.

    Arguments
    ---------
    steps : Steps
        The decoder's.
    routing : Routing
        Counts gates.
    end : int
        The token that ends a hypothesis.
    """

    def __init__(self, steps: Steps, routing: Routing, end: int) -> None:
        self.steps, self.routing, self.end, self.vocab_size = steps, routing, end, steps.vocab_size

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append tokens [batch, n]; return the scores of the next one, [batch, 1 or n, vocabulary]."""
        self.routing.real["decoder"] = (tokens != self.end).sum(dim=1)
        return self.steps.step(tokens)


class CLSRWhisper(Whisper):
    """A recogniser whose network has language experts; each utterance is handled by the expert of its language."""

    technique, label = "clsr", "experts"
    network_class = DistilWhisperForConditionalGeneration
    encodes_alone = False  # `routing` holds the languages of the whole batch
    cost_is_fixed = False  # the cost of a token depends on the gates

    def __init__(self, network: DistilWhisperForConditionalGeneration, tokenizer: Any) -> None:
        super().__init__(network, tokenizer)
        network.config.adapter = stable_name(CLSRWhisper)

    def ddp_parameters(self) -> list[torch.nn.Parameter]:
        """Return the parameters that every DDP step must use; one trained parameter is added since experts may be idle."""
        learned = (parameter for parameter in self.network.parameters() if parameter.requires_grad)
        return [*super().ddp_parameters(), *itertools.islice(learned, 1)]

    @property
    def routing(self) -> Routing:
        """Routing state shared by all expert layers."""
        return self.network.routing

    def prompt_languages(self, tokens: torch.Tensor) -> list[str | None]:
        """Return the language given in each prompt [batch, tokens], or None for a prompt without a language."""
        if not self.labels.languages:
            return ["en"] * len(tokens)
        if tokens.shape[1] < 2:
            return [None] * len(tokens)
        codes = {index: code for code, index in self.labels.languages.items()}
        return [codes.get(index) for index in tokens[:, 1].tolist()]

    def language_of(self, wav: torch.Tensor) -> str | None:
        """Detect the language of a recording [time] on its first window, so that its expert is known before encoding."""
        if not self.labels.languages:
            return None
        first = wav[None, : self.window_samples]
        with self.routing.using("encoder", None):
            plain = super().encode(first, torch.tensor([first.shape[1]]))
        return self.detect_languages(self.first_step(plain))[0]

    def encode(
        self,
        wavs: torch.Tensor,
        lengths: torch.Tensor,
        hidden_states: bool = False,
        languages: list[str | None] | None = None,
    ) -> Encoded:
        """Run the encoder as `Whisper.encode` does, each utterance with the expert of its language [batch].

        If a language is None, it is detected with the shared blocks, and the batch is encoded again if any language has an
        expert.
        """
        if not self.labels.languages:
            languages = ["en"] * len(wavs)
        elif languages is None or None in languages:
            languages = languages or [None] * len(wavs)
            with self.routing.using("encoder", None):
                plain = super().encode(wavs, lengths, hidden_states)
            found = self.detect_languages(self.first_step(plain))
            languages = [given or detected for given, detected in zip(languages, found, strict=True)]
            if not {*languages} & {*self.network.languages}:
                plain.languages = languages
                return plain
        with self.routing.using("encoder", languages, encoder_frames(lengths)):
            encoded = super().encode(wavs, lengths, hidden_states)
        encoded.languages = languages
        counts = self.routing.counts
        encoded.notes = {f"{side}.{i}": count for (side, i), count in counts.items() if side == "encoder"}
        return encoded

    def decoder(self, encoded: Encoded, room: int) -> Steps:
        """Return the decoder for encoder states; gates count the tokens of each hypothesis up to its end."""
        return CountedSteps(super().decoder(encoded, room), self.routing, self.labels.end)

    def predict(
        self, encoded: Encoded, tokens: torch.Tensor, token_lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return logits [batch, tokens, vocabulary]; the languages are read from the prompt tokens."""
        with self.routing.using("decoder", self.prompt_languages(tokens), token_lengths):
            return super().predict(encoded, tokens)

    @contextlib.contextmanager
    def search_context(self, languages: list[str | None], options: DecodingOptions) -> Iterator[None]:
        """Search with the expert of each utterance's language; translation uses the shared blocks."""
        routed = languages if self.labels.languages else ["en"] * len(languages)
        with self.routing.using("decoder", [None] * len(routed) if options.task == "translate" else routed):
            yield

    def annotate(self, hypotheses: list[Hypothesis], encoded: Encoded) -> None:
        """Record how many frames and tokens each layer's expert handled."""
        counts = encoded.notes | {f"{s}.{i}": count for (s, i), count in self.routing.counts.items() if s == "decoder"}
        for row, hypothesis in enumerate(hypotheses):
            usage = {place: count[row].tolist() for place, count in sorted(counts.items()) if int(count[row, 1])}
            if usage:
                hypothesis.details["gate_usage"] = usage

    def summary(self, records: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Return the share of frames and tokens routed to an expert, per layer, over utterances that have an expert."""
        totals: dict[str, list[int]] = {}
        parts = itertools.chain.from_iterable([record, *record.get("segments", ())] for record in records)
        for place, (opened, seen) in itertools.chain.from_iterable(
            part.get("gate_usage", {}).items() for part in parts
        ):
            total = totals.setdefault(place, [0, 0])
            total[0], total[1] = total[0] + opened, total[1] + seen
        order = sorted(totals, key=lambda place: (SIDES.index(place.split(".")[0]), int(place.split(".")[1])))
        return {"gate_usage": {place: totals[place][0] / totals[place][1] for place in order}} if totals else {}


def add_experts(
    whisper: Whisper,
    languages: list[str],
    settings: ExpertSettings,
    skip_gate_prob: float = 0.2,
    expert_dropout: float = 0.3,
    gate_dropout: float = 0.1,
    gate_noise: float = 5.0,
) -> CLSRWhisper:
    """Add new experts to a plain Whisper and freeze all other parameters.

    A model that already has experts keeps them: experts of `languages` are trained further, all others stay frozen.

    Raises
    ------
    UserError
        If Whisper does not support a language.
    """
    if isinstance(whisper, CLSRWhisper):
        network = whisper.network
    else:
        with torch.device("meta"):  # skips a random initialisation that would be overwritten
            network = DistilWhisperForConditionalGeneration(whisper.network.config)
        network.load_state_dict(whisper.network.state_dict(), assign=True)
        network.tie_weights()
        network.generation_config = whisper.network.generation_config
        network._wrap()
    network.requires_grad_(False)
    network.settings = settings
    routing = network.routing
    routing.skip_gate_prob, routing.expert_dropout = skip_gate_prob, expert_dropout
    routing.gate_dropout, routing.gate_noise = gate_dropout, gate_noise
    for language in languages:
        if language not in network.languages:
            network.add_language(language)
        for part in network.expert(language).values():
            part.requires_grad_(True)
    model = CLSRWhisper(network, whisper.tokenizer)
    model.reset_metadata()
    return model.eval()
