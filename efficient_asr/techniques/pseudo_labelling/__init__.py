"""Pseudo-labelling: the transcripts of a large model as training texts for a small one (arXiv 2311.00430).

Labels and their confidences are in `labels.py`, the pass over a manifest in `labelling.py`, the same on several machines in
`ray_workers.py`, the filter in `filtering.py`, and packing into long segments in `packing.py`.
"""

from efficient_asr.utils.technique import Key, Technique

TECHNIQUE = Technique(
    name="pseudo_labelling",
    keys=(
        Key("teacher_model", text=True, eval_only=True),
        Key("manifest", untyped=True, eval_only=True),
        Key("normaliser", text=True, eval_only=True),
        Key("ray_address", text=True, eval_only=True),
        Key("ray_workers", least=1, eval_only=True),
        Key("max_error_percent", least=0.0, eval_only=True),
        Key("max_repetition", least=0.0, eval_only=True),
        Key("max_no_speech_prob", least=0.0, most=1.0, eval_only=True),
        Key("pack_s", least=1e-3, eval_only=True),
    ),
)
