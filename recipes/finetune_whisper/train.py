"""Evaluate a pretrained Whisper, or fine-tune it on your own data.

    python recipes/finetune_whisper/train.py hparams/whisper.yaml --data_folder /my/jsonl --test_only True
    python recipes/finetune_whisper/train.py hparams/whisper.yaml --data_folder /my/jsonl --source openai/whisper-tiny
    python recipes/finetune_whisper/train.py hparams/real/whisper.yaml --whisper tiny --test_only True
    python recipes/finetune_whisper/train.py hparams/mini/whisper_small.yaml

With `--test_only True` and no trained model, `source` itself is evaluated. The YAML file sets the decoding (greedy or beam
search, language, timestamps, temperature fallback, long audio); see `hparams/_base/whisper_decoding.yaml`. Training texts are
used unchanged, with the language given in their manifest line or by `--language`. Rerun the command to resume from the last
checkpoint. The model is saved as a directory in Hugging Face's layout.
"""

import sys

from efficient_asr.training.run import run
from efficient_asr.training.whisper import WhisperBrain

if __name__ == "__main__":
    sys.exit(run(WhisperBrain, recipe="finetune_whisper"))
