"""Fine-tune an encoder with CTC: the baseline for the techniques of arXiv 2303.06740.

    python recipes/finetune_ctc/train.py hparams/mini/finetune_ctc.yaml
    python recipes/finetune_ctc/train.py hparams/finetune_ctc.yaml --data_folder /corpora/LibriSpeech
    torchrun --nproc_per_node=4 recipes/finetune_ctc/train.py hparams/finetune_ctc.yaml --data_folder ...

Rerun the command to resume from the last checkpoint; `--test_only True` only evaluates the trained model. The small models of
the paper are settings of this recipe: `--source ntu-spml/distilhubert --head_block bilstm --head_layers 2`.

The YAML file defines the encoder (wav2vec 2.0, HuBERT, WavLM, DistilHuBERT or Whisper's), the head, the optimisers and the data.
The run saves a model folder and a Result for every test split.
"""

import sys

from efficient_asr.training.ctc import CTCBrain
from efficient_asr.training.run import run

if __name__ == "__main__":
    sys.exit(run(CTCBrain, recipe="finetune_ctc"))
