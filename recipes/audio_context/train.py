"""Train a Whisper to do without the silence behind the audio, on audio alone (after FUTO's audio-context fine-tuning).

    python recipes/audio_context/train.py hparams/audio_context.yaml --data_folder /my/jsonl --source openai/whisper-tiny
    python recipes/audio_context/train.py hparams/real/audio_context.yaml --whisper tiny
    python recipes/audio_context/train.py hparams/mini/audio_context.yaml

See `efficient_asr/techniques/audio_context/context.py`. Texts in the training and validation manifests are not used: the model
with its whole window is the teacher, and writes its texts and states to `targets_folder` first. With `lora_rank`, only low-rank
matrices learn, and are merged in the end. The model folder is a plain Whisper whose config.json says how much silence to encode;
`load_transcriber` follows it. Rerun the command to resume from the last checkpoint.
"""

import sys
from typing import Any

from efficient_asr.data import Rows
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.techniques.audio_context.brain import AudioContextBrain
from efficient_asr.techniques.lora import LoraWhisper
from efficient_asr.training.run import run
from efficient_asr.utils.errors import UserError


class Brain(AudioContextBrain):
    """Trains layers, or LoRA matrices in them."""

    @classmethod
    def adapt(cls, model: Whisper, hparams: dict[str, Any], rows: Rows) -> Whisper:
        """Add LoRA matrices if `lora_rank` is given; otherwise choose the layers that learn."""
        if hparams["lora_rank"] is None:
            return super().adapt(model, hparams, rows)
        if hparams["trained_layers"] != "layers":
            raise UserError(
                "trained_layers: LoRA matrices are in all layers of encoder and decoder; leave it at layers"
            )
        targets = hparams["lora_targets"]
        return LoraWhisper.adapt(
            model, hparams["lora_rank"], hparams["lora_alpha"], hparams["lora_dropout"], targets, merge=True
        )


if __name__ == "__main__":
    sys.exit(run(Brain, recipe="audio_context"))
