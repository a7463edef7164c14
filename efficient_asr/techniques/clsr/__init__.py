"""CLSR: language experts in Whisper (arXiv 2311.01070).

Blocks and gates are in `experts.py`, the network in `network.py`, the recogniser in `model.py`, and tables and figures in
`report.py`.
"""

from efficient_asr.utils.technique import Key, Technique

TECHNIQUE = Technique(
    name="clsr",
    parts={"clsr_whisper": "model:CLSRWhisper"},
    former_names={"techniques.clsr_whisper.ExpertWhisper": "clsr_whisper"},
    keys=(
        Key("expert_layers", untyped=True),
        Key("expert_rank", least=1),
        Key("expert_dropout", least=0.0, most=1.0),
        Key("gate_dim", least=1),
        Key("gate_budget", least=0.0, most=1.0),
        Key("gate_dropout", least=0.0, most=1.0, former="0.1"),
        Key("gate_noise", least=0.0, former="5.0"),
        Key("skip_gate_prob", least=0.0, most=1.0),
        Key("lr_gates", least=0.0),
    ),
    renamed_values={"recipe": {"clsr_distillation": "clsr"}},
    page_markers={"experts": "report:page_table"},
    pictures="report:draw_all",
)
