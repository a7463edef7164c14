"""Adapt a plain Whisper with LoRA matrices in its feed-forward blocks: the baseline of language experts (arXiv 2106.09685).

    python recipes/lora/train.py hparams/lora.yaml --data_folder /corpora/cv-corpus-13.0 --languages '[ca]'
    python recipes/lora/train.py hparams/mini/lora.yaml

See `efficient_asr/techniques/lora.py`. With `lora_merge: True` a plain Whisper is left behind that costs what it cost
before; with False the original one, with the matrices beside it. A teacher can be had here too. Goes on from its last
checkpoint when started again.
"""

import sys
from typing import Any

from efficient_asr.data import Rows
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.techniques.distillation.brain import DistillingBrain
from efficient_asr.techniques.lora import LoraWhisper
from efficient_asr.training.run import run


class LoraBrain(DistillingBrain):
    """Trains the matrices only."""

    @classmethod
    def adapt(cls, model: Whisper, hparams: dict[str, Any], rows: Rows) -> LoraWhisper:
        """Put new matrices into the student."""
        return LoraWhisper.adapt(
            model,
            hparams["lora_rank"],
            hparams["lora_alpha"],
            hparams["lora_dropout"],
            hparams["lora_targets"],
            hparams["lora_merge"],
        )

    @staticmethod
    def training_details(model: LoraWhisper) -> dict[str, Any]:
        """Return what the matrices weigh, for all languages together."""
        weights = sum(parameter.numel() for parameter in model.network.parameters() if parameter.requires_grad)
        return {"megabytes": weights * 4 / 1e6}


if __name__ == "__main__":
    sys.exit(run(LoraBrain, recipe="lora"))
