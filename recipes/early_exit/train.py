"""Train CTC heads on several layers, so that easy utterances can exit early (arXiv 2303.06740).

    python recipes/early_exit/train.py hparams/mini/early_exit.yaml
    python recipes/early_exit/train.py hparams/early_exit.yaml --data_folder /corpora/LibriSpeech --calibrate_mean_layer 18
    python recipes/early_exit/train.py hparams/early_exit.yaml ... --test_only True --exit_rule similarity --exit_threshold 0.95

The exit rules are explained in `efficient_asr/techniques/early_exit/heads.py`. Rule, threshold and patience are evaluation
settings: one trained model can be evaluated with all of them, and `recipes/early_exit/sweep.py` compares many thresholds.
`exit_training: two_step` first trains the whole model with only the last head, for `first_step_epochs`, and then the other
heads alone. With `calibrate_*`, the threshold is chosen on the validation split at the end of a training (not with `test_only`).
"""

import sys
from typing import Any

import speechbrain as sb
import torch

from efficient_asr.data import Rows
from efficient_asr.evaluation.benchmark import Benchmark
from efficient_asr.inference.transcriber import Transcriber
from efficient_asr.models.ctc import CTCModel, greedy_texts
from efficient_asr.models.encoders.base import Encoder
from efficient_asr.techniques.early_exit.heads import ExitHeads
from efficient_asr.techniques.early_exit.sweep import CALIBRATIONS, exit_layers_of, sweep
from efficient_asr.training.ctc import CTCBrain, ctc_loss
from efficient_asr.training.run import run
from efficient_asr.utils.errors import UserError


class EarlyExitBrain(CTCBrain):
    """Trains all heads jointly, or first the model with its last head and then the other heads."""

    @staticmethod
    def make_head(hparams: dict[str, Any], encoder: Encoder, n_labels: int) -> ExitHeads:
        """Build a head for each exit; by default on the upper half of the layers, as in the paper."""
        layers = exit_layers_of(hparams, encoder)
        heads = ExitHeads([hparams["head"](encoder.hidden_size, n_labels) for _ in layers], layers)
        heads.check(encoder)
        heads.set_rule(hparams["exit_rule"], hparams["exit_threshold"], hparams["exit_patience"])
        heads.check_patience()
        return heads

    def on_fit_start(self) -> None:
        """Register one set of validation errors per head."""
        self.outputs = tuple(f"_layer_{layer}" for layer in self.model.head.layers)
        super().on_fit_start()

    def on_stage_start(self, stage: sb.Stage, epoch: int | None = None) -> None:
        """Clear the schedulers when the second step starts: its loss comes from other heads and is no reason to anneal."""
        switch = self.hparams.exit_training == "two_step" and epoch == self.hparams.first_step_epochs + 1
        if stage == sb.Stage.TRAIN and switch:
            for scheduler in self.schedulers.values():
                if hasattr(scheduler, "metric_values"):  # others do not depend on the loss
                    scheduler.metric_values.clear()
        super().on_stage_start(stage, epoch)

    def trained_layers(self) -> list[int]:
        """Return the layers whose heads are trained in this epoch."""
        layers = self.model.head.layers
        if self.hparams.exit_training == "joint" or len(layers) == 1:
            return layers
        return layers[-1:] if self.hparams.epoch_counter.current <= self.hparams.first_step_epochs else layers[:-1]

    def compute_forward(self, batch: Any, stage: sb.Stage) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities [heads, batch, frames, labels] and frame lengths [batch]."""
        layers = self.trained_layers() if stage == sb.Stage.TRAIN else self.model.head.layers
        options = {"only": layers, "train_encoder": self.model.head.layers[-1] in layers}
        return super().compute_forward(batch, stage, **options)

    def compute_objectives(self, predictions: tuple, batch: Any, stage: sb.Stage) -> torch.Tensor:
        """Return the weighted sum of the trained heads' CTC losses; outside training, count the errors of every head."""
        (all_log_probs, frame_lengths), layers, trained = predictions, self.model.head.layers, self.trained_layers()
        weights = dict(zip(layers, self.hparams.exit_loss_weights or [1.0] * len(layers), strict=True))
        loss = torch.zeros((), device=all_log_probs.device)
        for layer, log_probs in zip(trained if stage == sb.Stage.TRAIN else layers, all_log_probs, strict=True):
            if stage != sb.Stage.TRAIN:
                self.count(batch.text, greedy_texts(log_probs, frame_lengths, self.model.labels), f"_layer_{layer}")
            if layer in trained:
                loss = loss + weights[layer] * ctc_loss(log_probs, frame_lengths, batch)
        return loss

    @staticmethod
    def calibrate(model: CTCModel, hparams: dict[str, Any], rows: Rows) -> None:
        """Calibrate the threshold on the validation utterances."""
        wanted = {key: hparams[f"calibrate_{key}"] for key in CALIBRATIONS}
        rule, patience = hparams["exit_rule"], hparams["exit_patience"]
        if any(value is not None for value in wanted.values()):
            found = sweep(model.eval(), Benchmark("", "", rows, hparams["test_normaliser"]), macs=False)
            model.head.set_rule(rule, found.choose_threshold(rule, **wanted, patience=patience), patience)
            print(f"calibrated on the validation split: {model.head.label}")

    @staticmethod
    def apply_eval_settings(transcriber: Transcriber, hparams: dict[str, Any]) -> None:
        """Set the exit rule to evaluate. Without a threshold in the YAML, keep the saved one if it is for the same rule."""
        heads, rule, patience = transcriber.model.head, hparams["exit_rule"], hparams["exit_patience"]
        if hparams["exit_threshold"] is not None or rule == "none":
            heads.set_rule(rule, hparams["exit_threshold"], patience)
            heads.check_patience()
        elif (rule, patience) != (heads.rule, heads.patience):
            raise UserError(
                f"exit_threshold: the model has one for {heads.rule} (patience {heads.patience}), but not for {rule} (patience "
                f"{patience}); give one, for example from recipes/early_exit/sweep.py --calibrate_mean_layer"
            )

    @staticmethod
    def result_details(
        model: CTCModel, hparams: dict[str, Any], benchmark: Benchmark | None = None, records: Any = None
    ) -> dict[str, Any]:
        """Return the exit rule; with a benchmark, also the exit layers and the results of each head on its own."""
        rule = (model.head.rule, model.head.threshold, model.head.patience)
        details = dict(zip(("exit_rule", "exit_threshold", "exit_patience"), rule, strict=True))
        if benchmark is not None:
            found = sweep(model, benchmark, macs=False)
            details |= found.details(found.exits(*rule))
        return CTCBrain.result_details(model, hparams) | details


if __name__ == "__main__":
    sys.exit(run(EarlyExitBrain, recipe="early_exit"))
