r"""LoRA: low-rank updates of frozen weights, the baseline for language experts.

Hu et al.: "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685), implemented with peft. A linear layer
learns an update of rank :math:`r` to its frozen weight,

.. math::
    h = W x + \frac{\alpha}{r} B A x, \qquad A \sim \text{Kaiming}, \; B = 0 \text{ at first},

applied here to both linear layers of every feed-forward block, with the settings of "Multilingual DistilWhisper" (arXiv
2311.01070): rank 64, alpha 64, dropout 0.05. After training, the update can be merged into the weights,
:math:`W + \frac{\alpha}{r} B A`, at no inference cost, or stored separately as an adapter of a few megabytes.

Deviations: the DistilWhisper code adapts its own model with experts and scores it with teacher forcing on the reference text.
Here a plain Whisper is adapted and scored by actual decoding. Computation is in float32 by default.
"""

from __future__ import annotations

import copy
import importlib
import pickle
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import WhisperForConditionalGeneration

from efficient_asr.models.parts import stable_name
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.technique import Key, Technique

TECHNIQUE = Technique(
    name="lora",
    parts={"lora_whisper": ":LoraWhisper"},
    former_names={"techniques.lora.LoraWhisper": "lora_whisper"},
    keys=(Key("lora_rank", least=1), Key("lora_alpha", least=0.0), Key("lora_dropout", least=0.0, most=1.0)),
)
ADAPTER = "lora"


def import_peft() -> ModuleType:
    """Return the package peft.

    Raises
    ------
    UserError
        If it is not installed.
    """
    try:
        return importlib.import_module("peft")
    except ImportError:
        raise UserError("LoRA needs the package peft; install it with: pip install 'efficient_asr[lora]'") from None


class LoraWhisper(Whisper):
    """A Whisper model with LoRA matrices in its network.

    Arguments
    ---------
    network : WhisperForConditionalGeneration
        The plain network.
    tokenizer : WhisperTokenizer
        The tokenizer.
    """

    technique, label = "lora", "lora"

    def __init__(self, network: WhisperForConditionalGeneration, tokenizer: Any) -> None:
        super().__init__(network, tokenizer)
        self.merge = True
        self._peft: list[Any] = []  # peft's wrapper of the network; in a list, so its weights register once

    @classmethod
    def adapt(
        cls,
        whisper: Whisper,
        rank: int = 64,
        alpha: float = 64,
        dropout: float = 0.05,
        targets: tuple[str, ...] | list[str] = ("fc1", "fc2"),
        merge: bool = True,
    ) -> LoraWhisper:
        """Add new LoRA matrices to a plain Whisper, as its only trainable parameters; its output does not change yet.

        Arguments
        ---------
        whisper : Whisper
            The model to adapt, modified in place.
        rank, alpha, dropout
            LoRA settings.
        targets : list of str
            Names of the linear layers to adapt.
        merge : bool
            Whether `save` merges the matrices into the weights or stores them separately.

        Raises
        ------
        UserError
            If peft rejects the settings, for example unknown layer names.
        """
        peft = import_peft()
        model = cls(whisper.network, whisper.tokenizer)
        model.reset_metadata()
        try:
            config = peft.LoraConfig(
                r=rank,
                lora_alpha=alpha,
                lora_dropout=dropout,
                target_modules=[targets] if isinstance(targets, str) else list(targets),
            )
            model._peft = [peft.get_peft_model(whisper.network, config)]
        except (ValueError, TypeError) as error:
            raise UserError(f"lora: {str(error).splitlines()[0]}") from None
        model.merge = merge
        return model.eval()

    def plain(self) -> Whisper:
        """Return a plain Whisper with the matrices merged into its weights."""
        merged = Whisper(copy.deepcopy(self._peft[0]).merge_and_unload(), self.tokenizer).eval()
        merged.technique, merged.label = self.technique, self.label
        if self.encoder_padding is not None:
            merged.encoder_padding = self.encoder_padding.for_weights(merged)
        return merged

    def load_parts(self, source: str) -> LoraWhisper:
        """Load matrices that `save` stored separately."""
        peft = import_peft()
        try:
            self._peft, self.merge = [peft.PeftModel.from_pretrained(self.network, str(Path(source) / ADAPTER))], False
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
            raise UserError(f"{source}/{ADAPTER} cannot be loaded ({str(error).splitlines()[0]})") from None
        return self

    def write_network(self, folder: Path, dtype: torch.dtype) -> None:
        """Write a plain Whisper with the matrices merged into it, or the original one with the matrices next to it."""
        adapted = copy.deepcopy(self._peft[0]).to(dtype)
        network = adapted.merge_and_unload() if self.merge else adapted.unload()
        network.config.adapter = None if self.merge else stable_name(LoraWhisper)
        network.save_pretrained(folder)
        if not self.merge:
            self._peft[0].save_pretrained(folder / ADAPTER)
