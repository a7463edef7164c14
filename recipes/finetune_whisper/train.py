"""Evaluate a pretrained Whisper, or fine-tune it on your own data.

    python recipes/finetune_whisper/train.py hparams/whisper.yaml --data_folder /my/jsonl --test_only True
    python recipes/finetune_whisper/train.py hparams/whisper.yaml --data_folder /my/jsonl --source openai/whisper-tiny
    python recipes/finetune_whisper/train.py hparams/finetune_whisper.yaml --data_folder /corpora/cv-corpus-11.0/sv-SE
    python recipes/finetune_whisper/train.py hparams/mini/finetune_whisper.yaml --optimizer adafactor

With `--test_only True` and no trained model, `source` itself is evaluated. The YAML file sets the decoding (greedy or beam
search, language, timestamps, temperature fallback, long audio); see `hparams/_base/whisper_decoding.yaml`. Training texts are
used unchanged, with the language given in their manifest line or by `--language`. `--freeze_encoder`, `--spec_augment`,
`--activation_checkpointing` and, with `hparams/finetune_whisper.yaml`, `--optimizer` and `--lora_rank` are switches. Rerun the
command to resume from the last checkpoint. The model is saved as a directory in Hugging Face's layout, with its language.
"""

import sys
from typing import Any

from efficient_asr.data import Rows
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.techniques.lora import LoraWhisper
from efficient_asr.training.run import run
from efficient_asr.training.whisper import WhisperBrain
from efficient_asr.utils.errors import UserError


class FinetuneBrain(WhisperBrain):
    """Trains a Whisper, or low-rank updates of it if `lora_rank` is set."""

    @classmethod
    def adapt(cls, model: Whisper, hparams: dict[str, Any], rows: Rows) -> Whisper:
        """Store the language of the texts, for other programs; add LoRA matrices if they are asked for."""
        spoken = {row.get("language") or model.labels.default_language for row in rows}
        if model.labels.languages:
            model.network.generation_config.language = spoken.pop() if len(spoken) == 1 else None
            model.network.generation_config.task = "transcribe"
        if hparams.get("lora_rank") is None:
            return model
        if hparams["freeze_encoder"]:
            raise UserError(
                "freeze_encoder: LoRA matrices would be trained in the encoder; set it to False, or lora_rank to null"
            )
        settings = (hparams[f"lora_{key}"] for key in ("rank", "alpha", "dropout", "targets", "merge"))
        return LoraWhisper.adapt(model, *settings)


if __name__ == "__main__":
    sys.exit(run(FinetuneBrain, recipe="finetune_whisper"))
