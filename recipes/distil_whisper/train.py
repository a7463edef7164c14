"""Distil a Whisper into one with fewer layers, on pseudo-labels (Distil-Whisper, arXiv 2311.00430, step 3).

    python recipes/distil_whisper/train.py hparams/distil_whisper.yaml --data_folder /my/jsonl --source openai/whisper-small
    python recipes/distil_whisper/train.py hparams/real/distil_whisper.yaml --whisper base
    python recipes/distil_whisper/train.py hparams/mini/distil_whisper.yaml

Label the audio first with recipes/pseudo_labelling; `train.jsonl` is its output. The student keeps `encoder_layers` and
`decoder_layers` of `source`; one that was made before (make_student.py) is trained with both at -1 and its `teacher`. The
objective is in `efficient_asr/techniques/distil_whisper/brain.py`. The best epoch by WER on the development set, decoded, is
saved as an ordinary Whisper folder.

With `encoder_states_folder`, the frozen encoder runs once per utterance instead of once per epoch. Rerun the command to resume
from the last checkpoint.
"""

import sys

from efficient_asr.techniques.distil_whisper.brain import StudentBrain
from efficient_asr.training.run import run

if __name__ == "__main__":
    sys.exit(run(StudentBrain, recipe="distil_whisper"))
