"""Train language experts parallel to the frozen feed-forward blocks of Whisper, with or without a teacher (arXiv 2311.01070).

    python recipes/clsr/train.py hparams/clsr_ft.yaml --data_folder /corpora/cv-corpus-13.0 --languages '[ca]'
    python recipes/clsr/train.py hparams/clsr_js.yaml --data_folder /corpora/cv-corpus-13.0 --languages '[ca]'
    python recipes/clsr/train.py hparams/mini/clsr_js.yaml

Gates, noise and budget are explained in `efficient_asr/techniques/clsr/experts.py`, the losses in
`efficient_asr/techniques/distillation/losses.py`. One run can train several languages, in mixed batches or, with
`monolingual_batches`, one language per batch. The expert of each language is saved in the model folder as a separate file,
which works with any copy of the student. Rerun the command to resume from the last checkpoint.
"""

import sys
from typing import Any

import speechbrain as sb
import torch

from efficient_asr.data import Rows
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.techniques.clsr.experts import ExpertSettings, gate_budget_loss
from efficient_asr.techniques.clsr.model import CLSRWhisper, add_experts
from efficient_asr.techniques.distillation.brain import DistillingBrain
from efficient_asr.training.run import run
from efficient_asr.utils.errors import UserError


class CLSRBrain(DistillingBrain):
    """Trains only experts and gates; the loss includes a term for the fraction of tokens routed to experts."""

    starts_from = (Whisper, CLSRWhisper)
    checkpoints_activations = False

    @classmethod
    def adapt(cls, model: Whisper, hparams: dict[str, Any], rows: Rows) -> CLSRWhisper:
        """Add an expert for each of `languages`, by default for each language in the training utterances."""
        spoken = sorted({row.get("language") or model.labels.default_language for row in rows})
        named = hparams["languages"] or spoken
        named = named if isinstance(named, (list, tuple)) else [named]
        # Common Voice's zh-CN is zh in Whisper
        wanted = list(dict.fromkeys(str(language).partition("-")[0] for language in named))
        for language in wanted:
            model.labels.check_language(language)
            if language not in spoken:
                raise UserError(
                    f"languages: no training utterance has language '{language}'; the languages are {', '.join(spoken)}"
                )
        layers = hparams["expert_layers"]
        layers = [str(layer) for layer in layers] if isinstance(layers, (list, tuple)) else str(layers)
        settings = ExpertSettings(layers, hparams["expert_rank"], hparams["gate_dim"])
        training = {key: hparams[key] for key in ("skip_gate_prob", "expert_dropout", "gate_dropout", "gate_noise")}
        return add_experts(model, wanted, settings, **training)

    @staticmethod
    def training_details(model: CLSRWhisper) -> dict[str, Any]:
        """Return the languages, and the size of the largest trained expert."""
        weights = max(
            sum(p.numel() for part in model.network.expert(a).values() for p in part.parameters() if p.requires_grad)
            for a in model.network.languages
        )
        return {
            "experts": model.network.languages,
            "expert_parameters": weights,
            "megabytes_per_language": weights * 4 / 1e6,
        }

    def parameter_groups(self) -> dict[str, list[torch.nn.Parameter]]:
        """Return the parameters in two groups: gates, which have their own learning rate, and everything else."""
        groups: dict[str, list[torch.nn.Parameter]] = {"model": [], "gates": []}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups["gates" if ".gate_" in name else "model"].append(parameter)
        return groups

    def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
        """Update the training progress, which the gate noise grows with."""
        super().on_fit_batch_start(batch, should_step)
        self.model.routing.progress = self.progress

    def technique_loss(self) -> torch.Tensor:
        """Return the absolute difference between the mean gate and the gate budget."""
        return gate_budget_loss(self.model.routing, self.hparams.gate_budget)

    def compute_objectives(self, predictions: torch.Tensor, batch: Any, stage: sb.Stage) -> torch.Tensor:
        """Return the loss; if no trainable parameter took part, add a zero with a gradient so that `backward` works."""
        loss = super().compute_objectives(predictions, batch, stage)
        if stage == sb.Stage.TRAIN and not loss.requires_grad:
            loss = loss + torch.zeros((), requires_grad=True)
        return loss


if __name__ == "__main__":
    sys.exit(run(CLSRBrain, recipe="clsr"))
