"""Whisper as a recogniser: from 30 s windows to hypotheses, in two separate steps.

`encode` runs the encoder once; everything after it (language detection, greedy or beam search, repeated decoding at higher
temperatures) uses its states, so that nothing is encoded twice. `labels.py` handles tokens; `search.py` decodes encoder states
to text.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer
from transformers.modeling_outputs import BaseModelOutput

from efficient_asr.data import SAMPLE_RATE
from efficient_asr.models.backends import ENTRY, backend_class, own_folder
from efficient_asr.models.int8 import quantise
from efficient_asr.models.loading import is_adapter, load_config, load_network
from efficient_asr.models.log_mel import HOP, LogMel, mask_features
from efficient_asr.models.parts import describe, find_class
from efficient_asr.models.sources import read_config
from efficient_asr.models.whisper.adapters import load_adapted
from efficient_asr.models.whisper.decoding import DecodingOptions, Encoded, Hypothesis
from efficient_asr.models.whisper.greedy import Decoder, Found, Steps
from efficient_asr.models.whisper.labels import WhisperLabels
from efficient_asr.models.whisper.own_length import OwnLength
from efficient_asr.models.whisper.tokens import complete_generation_config
from efficient_asr.utils import distributed
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.files import atomic_write

PADDING = "encoder_padding"  # entry of config.json in a model folder


class Whisper(nn.Module):
    """A Whisper with its tokenizer.

    Techniques subclass it. Besides `encode` and `predict` they may override the methods under "for techniques" below.

    Arguments
    ---------
    network : WhisperForConditionalGeneration
        The network; its generation configuration defines the special tokens.
    tokenizer : WhisperTokenizer
        The tokenizer.

    Attributes
    ----------
    technique, label : str
        Technique and variant, for Results and tables.
    history : dict
        Changes made by techniques when the network was created, by technique; plain data.
    encoder_padding : OwnLength or None
        Encodes each utterance on its own length; None to encode the whole window.
    quantised : str or None
        Label of the int8 quantisation (`efficient_asr.models.int8.quantise`); None for float.
    stored_parameters : int or None
        Number of parameters before quantisation, whose weights are no parameters any more.
    spec_augment : tuple of int or None
        Masks, and greatest widths in frames and in mel bands, of SpecAugment in training; None for none.
    training_modules : torch.nn.ModuleDict
        Modules trained with the network but not saved in the model folder, such as a loss with learned weights.
    """

    technique, label = "none", "baseline"
    backend = "torch"  # engine that runs the network
    samples = True  # decoding can sample, for the fallback at temperatures above 0
    token_scores = True  # decoding reports the log-probability of every token, not only of all
    network_class = WhisperForConditionalGeneration
    encodes_alone = True  # an utterance of a batch can be encoded without the others
    sequential = True  # transformers' sequential decoding of long audio computes the same
    beam_search = True  # decoding can use several beams
    cost_is_fixed = True  # the cost of greedy decoding depends only on the number of tokens

    def __init__(self, network: WhisperForConditionalGeneration, tokenizer: WhisperTokenizer) -> None:
        super().__init__()
        self.network, self.tokenizer = network, tokenizer
        self.labels = WhisperLabels(tokenizer, network.config, network.generation_config)
        self.log_mel = LogMel(network.config.num_mel_bins)
        self.training_modules = nn.ModuleDict()
        self.encoder_padding: OwnLength | None = None
        self.quantised: str | None = None
        self.spec_augment: tuple[int, int, int] | None = None
        self.stored_parameters: int | None = None
        self.history: dict[str, Any] = {}
        about = getattr(network.config, "about", None) or {}  # in model folders written by a recipe
        if about.get("technique"):
            self.technique, self.label = about["technique"], about["variant"]
            self.history = {"trained": about["details"]}
        self.window_samples = network.config.max_source_positions * 2 * HOP

    # ------------------------------------------------------------ model folders

    @classmethod
    def from_source(cls, source: str, with_padding: bool = True) -> Whisper:
        """Load a Hugging Face directory or hub id in float32, as the technique's class if the folder names one.

        A peft adapter is merged into its base model. Without `with_padding`, the `encoder_padding` of a model folder is ignored.

        Raises
        ------
        UserError
            If it cannot be loaded.
        """
        source = os.fspath(source)
        if is_adapter(source):
            return load_adapted(cls, source)
        if os.path.isfile(os.path.join(source, "config.json")):
            own = read_config(source)
            if own.get("format") == "efficient_asr":
                raise UserError(
                    f"'{source}' is a model of efficient_asr of the kind '{own.get('kind')}'; it is not a Whisper"
                )
        config = load_config(own_folder(source))
        if config.model_type != "whisper":
            raise UserError(f"'{source}' is of type '{config.model_type}', not a Whisper model")
        backend = getattr(config, ENTRY, None)
        if backend is not None:
            backend = backend if isinstance(backend, dict) else {"name": backend}
            return backend_class(str(backend.get("name")), f"{source}/config.json").open(source, config)
        adapter = getattr(config, "adapter", None)
        kind = find_class(adapter, source) if adapter else cls
        if not issubclass(kind, Whisper):
            raise UserError(f"{source}: '{adapter}' is not a Whisper; the model folder is damaged or cannot be trusted")
        tokenizer = load_config(source, WhisperTokenizer)
        network = load_network(kind.network_class, source)
        complete_generation_config(network.generation_config, tokenizer, source)
        whisper = kind(network, tokenizer).load_parts(source).eval()
        stored = getattr(config, PADDING, None)
        if stored and with_padding:
            whisper.encoder_padding = OwnLength.stored(stored, source, whisper)
        return whisper

    def save(self, folder: Path, about: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32) -> None:
        """Write a directory in Hugging Face's layout, atomically; `about` is stored in its config.json."""
        if self.quantised:
            raise UserError(
                f"{folder}: a quantised model ({self.quantised}) cannot be saved; quantise it after loading instead"
            )
        with atomic_write(Path(folder)) as partial:
            self.write_network(partial, dtype)
            self.write_processor(partial)
            config = json.loads((partial / "config.json").read_text(encoding="utf-8")) | {"about": about or {}}
            config.pop(PADDING, None)
            if self.encoder_padding is not None:
                config[PADDING] = describe(self.encoder_padding)
                self.encoder_padding.save(partial)
            (partial / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

    def reset_metadata(self) -> None:
        """Discard the record of the recipe and technique that produced the weights, before another one starts."""
        self.network.config.about, self.history = None, {}
        self.encoder_padding = None  # what belongs to the padding depends on the weights
        for name in ("technique", "label"):
            self.__dict__.pop(name, None)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that identify this network, as plain data."""
        found: dict[str, Any] = {"network": self.network.config.to_diff_dict()}
        found["network"].pop(PADDING, None)
        if self.encoder_padding is not None:
            found[PADDING] = describe(self.encoder_padding)
        return found | ({"quantised": self.quantised} if self.quantised else {})

    @property
    def changes(self) -> list[str]:
        """What encodes and computes differently from the stored network: labels for the tables."""
        padding = [] if self.encoder_padding is None else [self.encoder_padding.label]
        return padding + ([self.quantised] if self.quantised else [])

    def quantise(self, mode: str) -> None:
        """Replace linear layers with int8 ones; see `efficient_asr.models.int8.quantise`.

        Raises
        ------
        UserError
            If the model cannot be quantised in this mode.
        """
        count = sum(parameter.numel() for parameter in self.network.parameters())
        self.quantised, self.stored_parameters = quantise(self.network, mode), count

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.network.device

    # ------------------------------------------------------------ for techniques

    def plain(self) -> Whisper:
        """Return the model with nothing but a plain Whisper's layers, for other engines.

        Raises
        ------
        UserError
            If that is impossible.
        """
        if type(self) is not Whisper:
            raise UserError(
                f"this Whisper has layers of the technique {self.technique}, which other engines do not know; run it with torch"
            )
        return self

    def load_parts(self, source: str) -> Whisper:
        """Load what a technique stores next to the network in a model folder; return the model itself."""
        return self

    def has_encoder_of(self, other: Whisper) -> bool:
        """Return whether another Whisper has the same encoder: the same weights in the same number format."""
        own, others = (model.network.model.encoder.state_dict() for model in (self, other))
        return own.keys() == others.keys() and all(
            value.dtype == others[name].dtype and torch.equal(value.cpu(), others[name].cpu())
            for name, value in own.items()
        )

    def write_network(self, folder: Path, dtype: torch.dtype) -> None:
        """Write the network's weights and configuration."""
        network = copy.deepcopy(self.network).to(dtype) if dtype != torch.float32 else self.network
        network.save_pretrained(folder)

    def write_processor(self, folder: Path) -> None:
        """Write the tokenizer and the settings of the features."""
        self.tokenizer.save_pretrained(folder)
        seconds = self.window_samples // SAMPLE_RATE
        WhisperFeatureExtractor(self.network.config.num_mel_bins, chunk_length=seconds).save_pretrained(folder)

    def prompt_languages(self, tokens: torch.Tensor) -> list[str | None] | None:
        """Return the language in each row of prompts [batch, tokens] if the encoder needs it, otherwise None."""

    def language_of(self, wav: torch.Tensor) -> str | None:
        """Return the language of a recording [time] if it must be known before encoding, otherwise None."""

    def ddp_parameters(self) -> list[nn.Parameter]:
        """Return trainable parameters that are not part of every forward pass."""
        return [p for p in self.training_modules.parameters() if p.requires_grad]

    def search_context(
        self, languages: list[str | None], options: DecodingOptions
    ) -> contextlib.AbstractContextManager[None]:
        """Return a context manager for decoding utterances in these languages [batch]."""
        return contextlib.nullcontext()

    def generate(
        self, encoded: Encoded, prompt: torch.Tensor, limits: torch.Tensor, options: DecodingOptions, temperature: float
    ) -> Found | None:
        """Return the tokens after `prompt` [batch, tokens] if the model has a search of its own, otherwise None.

        See `efficient_asr.models.whisper.greedy.generate` for `limits` and the temperature.
        """

    def annotate(self, hypotheses: list[Hypothesis], encoded: Encoded) -> None:
        """Record in the `details` of each hypothesis what the technique did."""

    def summary(self, records: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Return what the technique did over a whole benchmark, for the `details` of the Result."""
        return {}

    # ------------------------------------------------------------ forward

    def forward(
        self,
        wavs: torch.Tensor,
        lengths: torch.Tensor,
        tokens: torch.Tensor,
        token_lengths: torch.Tensor | None = None,
        with_states: bool = False,
        encoded: Encoded | None = None,
    ) -> Any:
        """Return logits [batch, tokens, vocabulary] for audio [batch, time] with lengths [batch] and tokens [batch, tokens].

        With `with_states`: encoder states [batch, frames, dim], decoder states [batch, tokens, layers + 1, dim], logits.
        With `encoded`, the encoder is not run.
        """
        if encoded is None:
            encoded = self.encode(wavs, lengths, languages=self.prompt_languages(tokens))
        states: list[torch.Tensor] = []
        if with_states:
            logits = Decoder(self.network, encoded, tokens.shape[1]).step(tokens, states)
        else:
            logits = self.predict(encoded, tokens, token_lengths)
        if self.training and distributed.world_size() > 1:
            # DistributedDataParallel must see every trainable parameter in every step.
            for parameter in self.ddp_parameters():
                logits = logits + 0 * parameter.sum()
        return (encoded.states, torch.stack(states, dim=2), logits) if with_states else logits

    def predict(
        self, encoded: Encoded, tokens: torch.Tensor, token_lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return logits [batch, tokens, vocabulary] after each of `tokens` [batch, tokens].

        `token_lengths` [batch] is ignored here; subclasses may use it.
        """
        if encoded.is_ragged:  # transformers has no mask for encoder states
            return Decoder(self.network, encoded, tokens.shape[1]).step(tokens)
        out = self.network(encoder_outputs=BaseModelOutput(encoded.states), decoder_input_ids=tokens, use_cache=False)
        return out.logits.float()

    def encode(
        self,
        wavs: torch.Tensor,
        lengths: torch.Tensor,
        hidden_states: bool = False,
        languages: list[str | None] | None = None,
    ) -> Encoded:
        """Compute log-mel features of whole windows, each utterance normalised separately, and run the encoder.

        Arguments
        ---------
        wavs : torch.Tensor
            [batch, time] at 16 kHz, zero past the end of each utterance, at most one window long.
        lengths : torch.Tensor
            Number of unpadded samples, [batch].
        hidden_states : bool
            Whether to return the states of all layers.
        languages : list of str or None, optional
            Code of each utterance's language, for techniques that need it; a plain Whisper's encoder does not.

        Raises
        ------
        UserError
            If an utterance is longer than the window.
        """
        if self.encoder_padding is not None:
            return self.encoder_padding.encode(self, wavs, lengths, hidden_states)
        out = self.network.model.encoder(self.features(wavs, lengths), output_hidden_states=hidden_states)
        return Encoded(out.last_hidden_state, lengths, out.hidden_states if hidden_states else None)

    @contextlib.contextmanager
    def whole_window(self) -> Iterator[None]:
        """Encode the whole window within the context, whatever `encoder_padding` is."""
        padding, self.encoder_padding = self.encoder_padding, None
        try:
            yield
        finally:
            self.encoder_padding = padding

    def features(self, wavs: torch.Tensor, lengths: torch.Tensor, frames: int | None = None) -> torch.Tensor:
        """Return the log-mel features [batch, mels, frames] of [batch, time] with lengths [batch]; see `encode`.

        Features of whole windows [batch, mels, frames] are taken as they are. `frames` are those to compute, at least those of
        the audio; by default those of the window.
        """
        window = self.window_samples
        if int(lengths.max()) >= window + HOP:  # less than a frame more is cut off
            raise UserError(
                f"an utterance has {int(lengths.max()) / SAMPLE_RATE:.1f} s of audio; this Whisper takes at most "
                f"{window / SAMPLE_RATE:.0f} s; split the audio"
            )
        window = window if frames is None else frames * HOP
        if wavs.dim() == 3:
            mel = wavs.to(self.device)
        else:
            wavs = nn.functional.pad(wavs[:, :window].to(self.device), (0, max(0, window - wavs.shape[1])))
            mel = self.log_mel(wavs, torch.full((len(wavs),), window, device=self.device))
        if self.training and self.spec_augment is not None:
            mel = mask_features(mel, *self.spec_augment, lengths // HOP)
        return mel.to(self.network.dtype)

    def decoder(self, encoded: Encoded, room: int) -> Steps:
        """Return the decoder for encoder states, with room for so many tokens."""
        return Decoder(self.network, encoded, room)

    def first_step(self, encoded: Encoded) -> torch.Tensor:
        """Return the logits [batch, vocabulary] after the start token, which give language and silence."""
        tokens = torch.full((len(encoded.states), 1), self.labels.start, device=self.device)
        return self.predict(encoded, tokens)[:, -1]

    def detect_languages(self, logits: torch.Tensor) -> list[str]:
        """Return the most likely language of each row of `first_step` [batch, vocabulary]."""
        indices = torch.tensor(list(self.labels.languages.values()), device=logits.device)
        return [list(self.labels.languages)[i] for i in logits[:, indices].argmax(1).tolist()]
