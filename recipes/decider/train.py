"""Train a decider that routes utterances between two Whispers, and evaluate the cascade (arXiv 2309.12712).

    bash scripts/reproduce_decider.sh                                            # everything, from extraction to table
    python recipes/decider/train.py hparams/decider.yaml --data_folder /corpora/cv-corpus-7.0-2021-07-21/en
    python recipes/decider/train.py hparams/mini/decider.yaml

First run `recipes/decider/label.py` with each model on the training and validation splits. The networks and cascades are
explained in `network.py` and `cascade.py` in `efficient_asr/techniques/decider`. If one of `calibrate_*` is given, the threshold
is calibrated on the validation split; otherwise it is a probability of 0.5 (or a gain of 0). Rerun the command to resume from
the last checkpoint. The run saves a model folder with the decider and both Whispers.
"""

import sys
from typing import Any

import numpy as np
import speechbrain as sb
import torch
from torch.utils.data import DataLoader

from efficient_asr.data import BatchOrder, Loader, Rows
from efficient_asr.inference.transcriber import Transcriber
from efficient_asr.techniques.decider.analysis import area_under_roc, balanced_accuracy
from efficient_asr.techniques.decider.data import (
    Examples,
    RouterInputs,
    calibrate_threshold,
    check_settings,
    collate_examples,
    easy_to_hard_ratio,
    labels_of_training,
    load_evaluated,
    new_router,
    pgr_details,
    save_cascade,
    whisper_for,
)
from efficient_asr.techniques.decider.network import decider_loss
from efficient_asr.techniques.decider.router import Router
from efficient_asr.training.brain import RecipeBrain
from efficient_asr.training.run import run
from efficient_asr.utils import distributed


class DeciderBrain(RecipeBrain):
    """Trains a decider on encoder states or features; selects the best epoch by area under the ROC curve on validation data."""

    @classmethod
    def build(cls, hparams: dict[str, Any], rows: Rows) -> Router:
        """Build the decider."""
        check_settings(hparams)
        return new_router(hparams)

    made_of, save = staticmethod(labels_of_training), staticmethod(save_cascade)

    def on_fit_start(self) -> None:
        """Open the router inputs, and weight hard utterances so that they balance the easy ones."""
        hparams, split = vars(self.hparams), self.hparams.train_split
        self.source = RouterInputs.of(self.model, hparams, split, whisper_for(self.model, hparams))
        self.positive_weight = easy_to_hard_ratio(hparams, split) if self.hparams.balance else 1.0
        super().on_fit_start()

    @staticmethod
    def loader(model: Router, rows: Rows, hparams: dict[str, Any], order: BatchOrder, key: str) -> DataLoader:
        """Load the decider's inputs, with the difference in errors between the two models."""
        examples = Examples.of(model, rows, hparams, hparams[key])
        return Loader(examples, batch_sampler=order, collate_fn=collate_examples, num_workers=hparams["num_workers"])

    def compute_forward(self, batch: Any, stage: sb.Stage) -> torch.Tensor:
        """Return logits [batch]."""
        inputs = self.source.complete(batch.to(self.device).inputs, self.device)
        return (self.modules["model"] if stage == sb.Stage.TRAIN else self.model)(inputs)

    def compute_objectives(self, predictions: torch.Tensor, batch: Any, stage: sb.Stage) -> torch.Tensor:
        """Return the loss; outside training, also record the scores."""
        if stage != sb.Stage.TRAIN:
            self.seen += zip(predictions.tolist(), batch.gains.tolist(), strict=True)
        target, clip = self.hparams.target, self.hparams.gain_clip
        return decider_loss(predictions, batch.gains, target, self.positive_weight, clip)

    def on_stage_start(self, stage: sb.Stage, epoch: int | None = None) -> None:
        """Clear the scores of the previous validation."""
        self.seen: list[tuple[float, float]] = []
        super().on_stage_start(stage, epoch)

    def validation_stats(self, totals: dict[str, float]) -> dict[str, float]:
        """Return area under the ROC curve and balanced accuracy; both are 0.5 (chance) if all utterances are of one class."""
        scores, gains = np.array([pair for part in distributed.all_gather(self.seen) for pair in part]).T
        area, accuracy = area_under_roc(scores, gains > 0), balanced_accuracy(scores > 0, gains > 0)
        return {"auc": 0.5 if area is None else area, "balanced_accuracy": 0.5 if accuracy is None else accuracy}

    def checkpoint_metric(self, stats: dict[str, float]) -> float:
        """Return the negative area under the ROC curve, to be minimised."""
        return -stats["auc"]

    @staticmethod
    def calibrate(model: Router, hparams: dict[str, Any], rows: Rows) -> None:
        """Choose the threshold on the validation split."""
        calibrate_threshold(model, rows, hparams)

    @staticmethod
    def load(source: str, hparams: dict[str, Any]) -> Transcriber:
        """Load the cascade."""
        return load_evaluated(source, hparams)

    @staticmethod
    def result_details(
        model: Any, hparams: dict[str, Any], benchmark: Any = None, records: Any = None
    ) -> dict[str, Any]:
        """Return the performance gap recovered, if both models were also run on the test split."""
        return RecipeBrain.result_details(model, hparams) | pgr_details(hparams, benchmark, records)


if __name__ == "__main__":
    sys.exit(run(DeciderBrain, recipe="decider"))
