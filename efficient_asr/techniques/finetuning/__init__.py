"""Fine-tuning a Whisper (arXiv 2212.04356) for one language, and what the choice of the optimiser does to it.

After github.com/ludvigdoeser/ML_transformers, which compares optimisers for Swedish. The optimisers are in `optimizers.py`; the
training is `efficient_asr.training.whisper.WhisperBrain`.
"""

from efficient_asr.utils.technique import Key, Technique

TECHNIQUE = Technique(
    name="finetuning",
    keys=(
        Key("warmup_steps", least=0),
        Key("optimizer", text=True),
        Key("features_url", text=True),
        Key("features_cache", text=True, eval_only=True),
        Key("features_cache_gb", least=0.0, eval_only=True),
    ),
    page_markers={"optimizers": "report:optimizers_table"},
    pictures="report:draw_optimizers",
)
