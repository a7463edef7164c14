"""What all Whispers in other engines share: the folder, the metadata, and a network without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, WhisperForConditionalGeneration, WhisperTokenizer

from efficient_asr.models.backends import ENTRY, own_folder
from efficient_asr.models.int8 import quantise_encoder
from efficient_asr.models.loading import load_config
from efficient_asr.models.parts import describe
from efficient_asr.models.whisper.decoding import Encoded
from efficient_asr.models.whisper.model import PADDING, Whisper
from efficient_asr.models.whisper.own_length import OwnLength
from efficient_asr.models.whisper.tokens import complete_generation_config
from efficient_asr.settings.options import is_selection
from efficient_asr.utils.errors import UserError

ENCODER_WEIGHTS = "encoder.safetensors"


class ConvertedPadding(OwnLength):
    """How much of the window a converted model encodes; what stands for the rest is in the engine's files.

    Arguments
    ---------
    padding_s : float
        Silence behind each utterance in seconds.
    step : int
        The number of positions of an utterance is a multiple of this.
    technique, label : str
        Of the padding that was converted.
    """

    def __init__(self, padding_s: float, step: int, technique: str | None, label: str) -> None:
        super().__init__(padding_s)
        self.step, self.technique, self._label = step, technique, label

    @property
    def label(self) -> str:
        """Variant, for the tables."""
        return self._label

    @classmethod
    def describe(cls, padding: OwnLength | None) -> dict[str, Any] | None:
        """Return the arguments for a padding, as plain data; None for none."""
        if padding is None:
            return None
        return {
            "padding_s": padding.padding_s, "step": padding.step, "technique": padding.technique, "label": padding.label,
        }  # fmt: skip


class ConvertedWhisper(Whisper):
    """A Whisper whose decoder runs in another engine, and its encoder there or in torch.

    Its `network` has a configuration, but no weights other than those of an encoder for torch.

    Attributes
    ----------
    backend : str
        Name of the engine.
    folder : Path
        The converted model.
    torch_encoder : bool
        Whether the encoder runs in torch.
    """

    backend, torch_encoder = "", False

    @classmethod
    def open(cls, source: str, config: Any) -> ConvertedWhisper:
        """Open a converted model; `config` is the network's configuration with the entry `backend`.

        Raises
        ------
        UserError
            If the folder is damaged.
        """
        folder, about = Path(own_folder(source)), getattr(config, ENTRY)
        tokenizer = load_config(str(folder), WhisperTokenizer)
        try:
            with torch.device("meta"):
                network = WhisperForConditionalGeneration(config)
            network.generation_config = GenerationConfig.from_pretrained(folder)
            complete_generation_config(network.generation_config, tokenizer, source)
            model = cls(network, tokenizer)
            model.folder, model.torch_encoder = Path(source), (folder / ENCODER_WEIGHTS).is_file()
            if model.torch_encoder:
                model._load_encoder(folder, about["quantise"])
            elif about[PADDING] is not None:
                model.encoder_padding = ConvertedPadding(**about[PADDING])
            model.quantised, model.stored_parameters = about["quantise"], int(about["parameters"])
            return model.load_engine().eval()
        except (KeyError, TypeError, ValueError, OSError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{source}: the converted model is damaged ({reason}); convert it again") from None

    def _load_encoder(self, folder: Path, mode: str | None) -> None:
        """Load the encoder's weights and its padding from a folder, and quantise it if the mode says so."""
        encoder = self.network.model.encoder
        encoder.load_state_dict(load_file(folder / ENCODER_WEIGHTS), assign=True)
        stored = getattr(self.network.config, PADDING, None)
        if stored:
            self.encoder_padding = OwnLength.stored(stored, str(folder), self)
        if mode in ("encoder-int8", "int8"):
            quantise_encoder(encoder)

    def load_engine(self) -> ConvertedWhisper:
        """Load the engine's files; return the model itself."""
        raise NotImplementedError

    def encode(
        self,
        wavs: torch.Tensor,
        lengths: torch.Tensor,
        hidden_states: bool = False,
        languages: list[str | None] | None = None,
    ) -> Encoded:
        """Run the encoder, utterance by utterance if it is the engine's; see `Whisper.encode`.

        Raises
        ------
        UserError
            If the engine encodes and the states of all layers are requested.
        """
        if self.torch_encoder:
            return super().encode(wavs, lengths, hidden_states, languages)
        if hidden_states:
            raise UserError(
                f"{self.folder}: the backend {self.backend} does not give the states of all layers; use the original model"
            )
        own = torch.full((len(wavs),), self.network.config.max_source_positions)
        if self.encoder_padding is not None:
            own = self.positions(lengths)
        states = wavs.new_zeros(len(wavs), int(own.max()), self.network.config.d_model)
        for row, count in enumerate(own.tolist()):
            samples = wavs[row : row + 1, : max(1, int(lengths[row]))]
            states[row, :count] = self.encode_one(samples, lengths[row : row + 1], count)
        return Encoded(states, lengths, own=None if self.encoder_padding is None else own)

    def positions(self, lengths: torch.Tensor) -> torch.Tensor:
        """Return the number of positions to compute for utterances of `lengths` samples [batch]."""
        return self.encoder_padding.positions(self, lengths)

    def encode_one(self, wavs: torch.Tensor, lengths: torch.Tensor, count: int) -> torch.Tensor:
        """Return the first `count` states [count, dim] of an utterance [1, time] of `lengths` [1] samples, by the engine."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def to(self, *args: Any, **kwargs: Any) -> ConvertedWhisper:
        """Stay on the CPU.

        Raises
        ------
        UserError
            For another device.
        """
        device, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type != "cpu":
            raise UserError(
                f"{self.folder}: models for the backend {self.backend} run on the CPU here; pass --device cpu"
            )
        return self

    @property
    def changes(self) -> list[str]:
        """Labels for the tables."""
        return [*super().changes, self.backend]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that identify this model, as plain data."""
        found = {"network": self.network.config.to_diff_dict(), "quantised": self.quantised}
        found[PADDING] = ConvertedPadding.describe(self.encoder_padding)
        return found

    def quantise(self, mode: str) -> None:
        """Refuse: the weights are fixed.

        Raises
        ------
        UserError
            Unless the model was converted in this mode.
        """
        if mode != self.quantised:
            hint = "a selection of layers needs the original model" if is_selection(mode) else "convert it again"
            raise UserError(f"quantise: {self.folder} was converted with {self.quantised or 'float32'}; {hint}")

    def save(self, folder: Path, about: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32) -> None:
        """Refuse: there are no weights to save.

        Raises
        ------
        UserError
            Always.
        """
        raise UserError(f"{self.folder} is a model for the backend {self.backend}; copy the folder instead")


def write_own_files(
    whisper: Whisper, folder: Path, backend: str, quantise: str | None, torch_encoder: bool = False
) -> None:
    """Write configuration and tokenizer of a Whisper into the folder of a converted model, and its encoder if torch runs it."""
    folder.mkdir(exist_ok=True)
    network = whisper.network
    network.config.save_pretrained(folder)
    network.generation_config.save_pretrained(folder)
    whisper.write_processor(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop(PADDING, None)
    if torch_encoder:
        save_file(
            {name: value.detach().contiguous() for name, value in network.model.encoder.state_dict().items()},
            folder / ENCODER_WEIGHTS,
        )
        if whisper.encoder_padding is not None:
            config[PADDING] = describe(whisper.encoder_padding)
            whisper.encoder_padding.save(folder)
    own = {"technique": whisper.technique, "variant": whisper.label, "details": {}}
    config["about"] = (getattr(network.config, "about", None) or {}) | own
    config[ENTRY] = {
        "name": backend,
        "quantise": quantise,
        "parameters": whisper.stored_parameters or sum(p.numel() for p in network.parameters()),
        PADDING: ConvertedPadding.describe(whisper.encoder_padding),
    }
    path.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
