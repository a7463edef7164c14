"""Measure a Whisper as it is, or fine-tune it on your own data.

    python recipes/finetune_whisper/train.py hparams/whisper.yaml --data_folder /my/jsonl --test_only True
    python recipes/finetune_whisper/train.py hparams/whisper.yaml --data_folder /my/jsonl --source openai/whisper-tiny
    python recipes/finetune_whisper/train.py hparams/real/whisper.yaml --whisper tiny --test_only True
    python recipes/finetune_whisper/train.py hparams/mini/whisper_small.yaml

With `--test_only True` and nothing trained yet, `source` itself is measured. Decoding (greedy or beam search, language,
timestamps, temperature fallback, long audio) is set in the YAML file, see `hparams/_base/whisper.yaml`. Training texts are taken
as they are, in the language that their line names, or `--language`. A training goes on from its last checkpoint when started
again, and leaves a directory in Hugging Face's layout.
"""

import sys

from efficient_asr.training.run import run
from efficient_asr.training.whisper import WhisperBrain

if __name__ == "__main__":
    sys.exit(run(WhisperBrain, recipe="finetune_whisper"))
