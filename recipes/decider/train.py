"""Train a decider between two Whispers and measure the cascade that it steers (arXiv 2309.12712).

    bash scripts/reproduce_decider.sh                                            # everything, from extraction to table
    python recipes/decider/train.py hparams/decider.yaml --data_folder /corpora/cv-corpus-7.0-2021-07-21/en
    python recipes/decider/train.py hparams/mini/decider.yaml

Needs a pass of `scripts/label_routing.py` for each model over training and validation split. Networks and orders are
explained in `efficient_asr/techniques/decider.py` and `efficient_asr/evaluation/cascade.py`. The threshold is calibrated on
the validation split where one of `calibrate_*` is given, and stands at probability 0.5 (or gain 0) elsewhere. Goes on from
its last checkpoint when started again; leaves a model folder that holds decider and both Whispers.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import speechbrain as sb
import torch
from torch.utils.data import DataLoader

from efficient_asr import distributed, routing_data
from efficient_asr.brains import RecipeBrain
from efficient_asr.data import BatchOrder, Loader, Rows
from efficient_asr.errors import UserError
from efficient_asr.evaluation.transcriber import Transcriber, load_transcriber
from efficient_asr.experiment import run
from efficient_asr.models.routing import Router
from efficient_asr.routing import CALIBRATIONS, area_under_roc, balanced_accuracy, calibrate
from efficient_asr.techniques.decider import decider_loss


class DeciderBrain(RecipeBrain):
    """Trains a decider on encoder states or features; chooses by the area under the ROC curve of the validation split."""

    @classmethod
    def build(cls, hparams: dict[str, Any], rows: Rows) -> Router:
        """Make the decider, and weigh hard utterances up to the number of the easy ones."""
        routing_data.check_settings(hparams)
        gains = routing_data.read_pair(hparams, hparams["train_split"]).gains
        hard = int((gains > 0).sum())
        if hard in (0, len(gains)):
            raise UserError(
                f"{hard} of {len(gains)} training utterances are hard for the small model: nothing to learn"
            )
        router = routing_data.new_router(hparams)
        router.positive_weight = (len(gains) - hard) / hard if hparams["balance"] else 1.0
        return router

    @staticmethod
    def loader(model: Router, rows: Rows, hparams: dict[str, Any], order: BatchOrder, key: str) -> DataLoader:
        """Load what the decider looks at, with the difference in errors between the two models."""
        examples = routing_data.Examples.of(model, rows, hparams, hparams[key])
        return Loader(
            examples, batch_sampler=order, collate_fn=routing_data.collate_examples, num_workers=hparams["num_workers"]
        )

    def compute_forward(self, batch: Any, stage: sb.Stage) -> torch.Tensor:
        """Return logits [batch]."""
        evidence = routing_data.complete(self.model, batch.to(self.device).evidence)
        return (self.modules["model"] if stage == sb.Stage.TRAIN else self.model)(evidence)

    def compute_objectives(self, predictions: torch.Tensor, batch: Any, stage: sb.Stage) -> torch.Tensor:
        """Return the loss, and note the scores outside training."""
        if stage != sb.Stage.TRAIN:
            self.seen += zip(predictions.tolist(), batch.gains.tolist(), strict=True)
        return decider_loss(predictions, batch.gains, self.hparams.target, self.model.positive_weight)

    def on_stage_start(self, stage: sb.Stage, epoch: int | None = None) -> None:
        """Forget the scores of the last validation."""
        self.seen: list[tuple[float, float]] = []
        super().on_stage_start(stage, epoch)

    def validation_stats(self, totals: dict[str, float]) -> dict[str, float]:
        """Return area under the ROC curve and balanced accuracy; 0.5, a coin's, where all utterances are of one kind."""
        scores, gains = np.array([pair for part in distributed.gather(self.seen) for pair in part]).T
        area, accuracy = area_under_roc(scores, gains > 0), balanced_accuracy(scores > 0, gains > 0)
        return {"auc": 0.5 if area is None else area, "balanced_accuracy": 0.5 if accuracy is None else accuracy}

    def to_minimise(self, stats: dict[str, float]) -> float:
        """The larger the area the better."""
        return -stats["auc"]

    @staticmethod
    def finish(model: Router, hparams: dict[str, Any], rows: Rows) -> None:
        """Choose the threshold on the validation split."""
        pair, scores, costs = routing_data.validate(model, rows, hparams)
        wishes = [(key, hparams[key]) for key in CALIBRATIONS if hparams[key] is not None]
        model.threshold = calibrate(pair, scores, costs, *wishes[0]) if wishes else 0.0
        share, area = (scores > model.threshold).mean(), area_under_roc(scores, pair.gains > 0)
        print(
            f"threshold {model.threshold:.3f}: {100 * share:.0f} % of the validation utterances go to the large model"
        )
        model.history["decider"] = {"validation_auc": area, "threshold": model.threshold}

    @staticmethod
    def save(model: Router, hparams: dict[str, Any], folder: Path, about: dict[str, Any]) -> None:
        """Write the cascade."""
        routing_data.save_cascade(model, hparams, folder, about)

    @staticmethod
    def load(source: str, hparams: dict[str, Any]) -> Transcriber:
        """Load the cascade."""
        return load_transcriber(source, language=hparams["language"])

    @staticmethod
    def configure(model: Any, hparams: dict[str, Any]) -> None:
        """Let the cascade know where the records of its models are, to compare with."""
        model.hparams = hparams

    @staticmethod
    def details_of(model: Any, benchmark: Any = None, records: Any = None) -> dict[str, Any]:
        """Say what share of the oracle's gain was closed, where both models were run on the test split too."""
        return RecipeBrain.details_of(model) | routing_data.gain_details(model, benchmark, records)


if __name__ == "__main__":
    sys.exit(run(DeciderBrain))
