"""Audio context: a Whisper trained to do without the silence behind the audio (after FUTO's whisper-acft).

Derivation, loss and the part of a model folder are in `context.py`, the teacher's outputs in `targets.py`, the training in
`brain.py`.
"""

from efficient_asr.utils.technique import Key, Technique

TECHNIQUE = Technique(
    name="audio_context",
    parts={"audio_context": "context:AudioContext"},
    keys=(
        Key("targets_folder", text=True, eval_only=True),
        Key("context_padding_s", least=0.0),
        Key("encoder_weight", least=0.0),
        Key("decoder_weight", least=0.0),
        Key("logits_weight", least=0.0),
        Key("trained_layers"),
    ),
    page_markers={"audio_context": "report:comparison_table"},
)
