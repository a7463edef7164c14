"""Fine-tune an encoder with CTC: the baseline of arXiv 2303.06740, against which its techniques are measured.

    python recipes/finetune_ctc/train.py hparams/mini/finetune_ctc.yaml
    python recipes/finetune_ctc/train.py hparams/finetune_ctc.yaml --data_folder /corpora/LibriSpeech
    torchrun --nproc_per_node=4 recipes/finetune_ctc/train.py hparams/finetune_ctc.yaml --data_folder ...

Goes on from its last checkpoint when started again; `--test_only True` only measures the trained model. The paper's
small-model rows are settings of this recipe: `--source ntu-spml/distilhubert --head_block bilstm --head_layers 2`.

Encoder (wav2vec 2.0, HuBERT, WavLM, DistilHuBERT or Whisper's), head, optimisers and data come from the YAML file. The
run leaves a model folder behind and a Result for every test split.
"""

import sys

from efficient_asr.training.ctc import CTCBrain
from efficient_asr.training.run import run

if __name__ == "__main__":
    sys.exit(run(CTCBrain, recipe="finetune_ctc"))
