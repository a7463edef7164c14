"""A decider between a small and a large Whisper (arXiv 2309.12712).

The networks are in `network.py`, their inputs in `router.py` and `data.py`, the cascade in `cascade.py`, the analysis of
routing in `analysis.py`, and comparisons in `comparison.py` and `report.py`.
"""

from efficient_asr.utils.technique import Key, Technique

TECHNIQUE = Technique(
    name="decider",
    parts={
        "decider": "network:Decider",
        "log_mel_decider": "network:LogMelDecider",
        "transcript_decider": "network:TranscriptDecider",
        "small_model_decider": "network:SmallModelDecider",
        "routing_rule": "network:Rule",
    },
    former_names={
        "techniques.decider.Decider": "decider",
        "techniques.decider.LogMelDecider": "log_mel_decider",
        "techniques.decider.TranscriptDecider": "transcript_decider",
        "techniques.decider.Rule": "routing_rule",
    },
    renamed_keys={"looks_at": "router_input"},
    renamed_values={"frames": {"own": "unpadded", "window": "padded"}},
    keys=(
        Key("states_folder", text=True),
        Key("labels_folder", text=True),
        Key("cyclic_lr_steps", least=1),
        Key("gain_clip", least=1e-3, former="3.0"),
        Key("transcript_width", least=1, former="32"),
        Key("state_width", least=1, former="8"),
        Key("calibrate_large_share", least=0.0, most=1.0, eval_only=True),
        Key("calibrate_macs_g", least=0.0, eval_only=True),
        Key("calibrate_wer_percent", least=0.0, eval_only=True),
    ),
    folder_kinds={"cascade": "cascade:load_cascade"},
    page_markers={"routing": "report:page_table"},
)
