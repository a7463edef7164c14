"""Distil-Whisper: a student with few decoder layers learns from pseudo-labels and the teacher's distributions (arXiv 2311.00430).

The layers of the student are chosen in `efficient_asr/techniques/pruning.py`. Objective and training are in `brain.py`, what the
targets look like in `targets.py`, and the encoder's states on disk in `states.py`.
"""

from efficient_asr.utils.technique import Key, Technique

TECHNIQUE = Technique(
    name="distil_whisper",
    keys=(
        Key("ce_weight", least=0.0),
        Key("kl_weight", least=0.0),
        Key("hidden_weight", least=0.0),
        Key("timestamp_probability", least=0.0, most=1.0),
        Key("previous_text_probability", least=0.0, most=1.0),
        Key("encoder_states_folder", text=True, eval_only=True),
    ),
)
