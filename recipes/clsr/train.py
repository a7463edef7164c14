"""Train language experts beside the frozen feed-forward blocks of Whisper, with or without a teacher (arXiv 2311.01070).

    python recipes/clsr/train.py hparams/clsr_ft.yaml --data_folder /corpora/cv-corpus-13.0 --languages '[ca]'
    python recipes/clsr/train.py hparams/clsr_js.yaml --data_folder /corpora/cv-corpus-13.0 --languages '[ca]'
    python recipes/clsr/train.py hparams/mini/clsr_js.yaml

Gates, noise and budget are explained in `efficient_asr/techniques/clsr/experts.py`, the losses in
`efficient_asr/techniques/distillation/losses.py`. Several languages may be trained in one run, in mixed batches or
(`monolingual_batches`) one language a batch; of each an expert is left in the model folder, as a file that goes with any
copy of the student. Goes on from its last checkpoint when started again.
"""

import sys
from typing import Any

import speechbrain as sb
import torch

from efficient_asr.data import Rows
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.techniques.clsr.experts import ExpertSettings, gate_budget_loss
from efficient_asr.techniques.clsr.model import ExpertWhisper, add_experts
from efficient_asr.techniques.distillation.brain import DistillingBrain
from efficient_asr.training.run import run
from efficient_asr.utils.errors import UserError


class ExpertBrain(DistillingBrain):
    """Trains experts and gates only; the loss has a term for the share of tokens that experts answer for."""

    starts_from = (Whisper, ExpertWhisper)

    @classmethod
    def adapt(cls, model: Whisper, hparams: dict[str, Any], rows: Rows) -> ExpertWhisper:
        """Add an expert for each of `languages`, or for each that the training utterances name."""
        spoken = sorted({row.get("language") or model.labels.default_language for row in rows})
        named = hparams["languages"] or spoken
        named = named if isinstance(named, (list, tuple)) else [named]
        # zh-CN of Common Voice is zh here
        wanted = list(dict.fromkeys(str(language).partition("-")[0] for language in named))
        for language in wanted:
            model.labels.check_language(language)
            if language not in spoken:
                raise UserError(f"languages: no training utterance is in '{language}'; there are {', '.join(spoken)}")
        layers = hparams["expert_layers"]
        layers = [str(layer) for layer in layers] if isinstance(layers, (list, tuple)) else str(layers)
        settings = ExpertSettings(layers, hparams["expert_rank"], hparams["gate_dim"])
        training = {key: hparams[key] for key in ("skip_gate_prob", "expert_dropout", "gate_dropout", "gate_noise")}
        return add_experts(model, wanted, settings, **training)

    @staticmethod
    def training_details(model: ExpertWhisper) -> dict[str, Any]:
        """Return what the largest of the experts that are trained weighs."""
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
        """Experts, gates (which have a learning rate of their own), and what else is learned."""
        groups: dict[str, list[torch.nn.Parameter]] = {"model": [], "gates": []}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups["gates" if ".gate_" in name else "model"].append(parameter)
        return groups

    def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
        """Let the noise grow with the true step."""
        super().on_fit_batch_start(batch, should_step)
        self.model.routing.progress = self.progress

    def technique_loss(self) -> torch.Tensor:
        """Return the distance of the mean gate from its budget."""
        return gate_budget_loss(self.model.routing, self.hparams.gate_budget)

    def compute_objectives(self, predictions: torch.Tensor, batch: Any, stage: sb.Stage) -> torch.Tensor:
        """Return the loss; of a batch in which nothing learns, one that changes nothing."""
        loss = super().compute_objectives(predictions, batch, stage)
        if stage == sb.Stage.TRAIN and not loss.requires_grad:
            loss = loss + torch.zeros((), requires_grad=True)
        return loss


if __name__ == "__main__":
    sys.exit(run(ExpertBrain, recipe="clsr"))
