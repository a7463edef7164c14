"""Early exit (arXiv 2303.06740): heads and exit rules in `heads.py`, many thresholds from one pass in `sweep.py`."""

from efficient_asr.utils.technique import Column, Key, Technique

TECHNIQUE = Technique(
    name="early_exit",
    parts={"exit_heads": "heads:ExitHeads"},
    former_names={"techniques.early_exit.ExitHeads": "exit_heads"},
    keys=(
        Key("exit_rule", eval_only=True),
        Key("exit_threshold", eval_only=True),
        Key("exit_patience", least=1, eval_only=True),
        Key("first_step_epochs", least=0),
        Key("calibrate_mean_layer", least=1.0, eval_only=True),
        Key("calibrate_wer_loss_percent", least=-100.0, eval_only=True),
    ),
    columns=(Column("mean exit layer", "mean_exit_layer"),),
    plot_groups="sweep:plot_group",
)
