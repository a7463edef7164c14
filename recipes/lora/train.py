"""Adapt a plain Whisper with LoRA in its feed-forward blocks (arXiv 2106.09685): the baseline for language experts.

    python recipes/lora/train.py hparams/lora.yaml --data_folder /corpora/cv-corpus-13.0 --languages '[ca]'
    python recipes/lora/train.py hparams/mini/lora.yaml

See `efficient_asr/techniques/lora.py`. With `lora_merge: True`, the LoRA matrices are merged and the saved model is a plain
Whisper of the original cost; with False, the matrices are saved separately, next to the original model. A teacher can be used
here too. Rerun the command to resume from the last checkpoint.
"""

import sys
from typing import Any

from efficient_asr.data import Rows
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.techniques.distillation.brain import DistillingBrain
from efficient_asr.techniques.lora import LoraWhisper
from efficient_asr.training.run import run


class LoraBrain(DistillingBrain):
    """Trains only the LoRA matrices."""

    @classmethod
    def adapt(cls, model: Whisper, hparams: dict[str, Any], rows: Rows) -> LoraWhisper:
        """Add new LoRA matrices to the student."""
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
        """Return the size of the LoRA matrices in MB, for all languages together."""
        weights = sum(parameter.numel() for parameter in model.network.parameters() if parameter.requires_grad)
        return {"megabytes": weights * 4 / 1e6}


if __name__ == "__main__":
    sys.exit(run(LoraBrain, recipe="lora"))
