"""Distillation from a larger Whisper: losses in `losses.py`, teacher and cache in `teacher.py`, Brain in `brain.py`."""

from efficient_asr.utils.technique import Key, Technique

TECHNIQUE = Technique(
    name="distillation",
    moved={
        "efficient_asr.techniques.distillation.DistillationLoss": "efficient_asr.techniques.distillation.losses.DistillationLoss"
    },
    former_weights={"distillation.": "training_modules.distillation."},
    keys=(
        Key("teacher", text=True, brain="brain:DistillingBrain"),
        Key("teacher_cache", text=True),
        Key("teacher_entries", least=1),
        Key("temperature", least=1e-3),
        Key("kd_warm_up", least=0.0),
    ),
)
