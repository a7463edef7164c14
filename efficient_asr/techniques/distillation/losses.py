r"""Distillation: train a student to match a larger model's next-token distributions.

With the teacher's distribution :math:`t` and the student's :math:`s` at temperature :math:`T` (both softmax of logits / T),
the loss of a token is the forward Kullback-Leibler divergence (Hinton et al., arXiv 1503.02531) or the Jensen-Shannon
divergence, which works better according to "Multilingual DistilWhisper" (arXiv 2311.01070):

.. math::
    KL = T^2 \sum_v t_v \log \frac{t_v}{s_v}, \qquad
    JS = \frac{T^2}{2} \left[ \sum_v t_v \log \frac{t_v}{m_v} + \sum_v s_v \log \frac{s_v}{m_v} \right], \; m = \frac{t + s}{2},

averaged over real tokens. Combined with cross-entropy and a gate term, the total loss is

.. math::
    L = \frac{1}{2} \left[ \frac{CE + gate}{\sigma_1^2} + w \frac{KD}{\sigma_2^2} \right] \; (+ \log \sigma_1 \sigma_2
    \text{ if the } \sigma \text{ are learned, arXiv 1705.07115}),

where :math:`w` may grow from 0 to 1 over the first steps.

Deviations: padding is excluded, while the published code averages over it; sums are in float32 regardless of the models'
precision; no epsilons are added inside logarithms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import log_softmax

from efficient_asr.utils.errors import UserError, did_you_mean


def kl_divergence(teacher_log_probs: torch.Tensor, student_log_probs: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher || student) in nats over the last dimension, [...]."""
    # like xlogy: a class with zero teacher probability adds nothing
    terms = teacher_log_probs.exp() * (teacher_log_probs.clamp(min=-1e4) - student_log_probs.clamp(min=-1e4))
    return terms.sum(dim=-1)


def js_divergence(teacher_log_probs: torch.Tensor, student_log_probs: torch.Tensor) -> torch.Tensor:
    """Return the Jensen-Shannon divergence in nats over the last dimension, [...]; symmetric, at most log 2."""
    mean = torch.logaddexp(teacher_log_probs, student_log_probs) - math.log(2)
    return (kl_divergence(teacher_log_probs, mean) + kl_divergence(student_log_probs, mean)) / 2


DIVERGENCES = {"kl": kl_divergence, "js": js_divergence}


@dataclass
class TeacherDistribution:
    """A teacher's distribution over each next token.

    Attributes
    ----------
    log_probs : torch.Tensor
        [batch, tokens, classes], at the temperature of the loss.
    indices : torch.Tensor or None
        Vocabulary indices of all classes but the last, [batch, tokens, classes - 1]; the last class is the rest of the
        vocabulary. None if the classes are the whole vocabulary.
    """

    log_probs: torch.Tensor
    indices: torch.Tensor | None = None

    def student(self, logits: torch.Tensor, temperature: float) -> torch.Tensor:
        """Return a student's log-probabilities of the same classes, from logits [batch, tokens, vocabulary]."""
        log_probs = log_softmax(logits.float() / temperature, dim=-1)
        return log_probs if self.indices is None else with_rest(log_probs, self.indices)


def with_rest(log_probs: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities [..., k + 1] of the entries `indices` [..., k] and, last, of all others combined."""
    rest = log_probs.scatter(-1, indices, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat([log_probs.gather(-1, indices), rest.clamp(min=-1e4)], dim=-1)


def weighted_loss(
    kind: str, temperature: float, ce_weight: float, kl_weight: float, warm_up: float = 0.0
) -> DistillationLoss:
    """Return a loss with fixed weights of cross-entropy and divergence instead of sigmas: sigma is (2 weight)^(-1/2)."""
    sigma = [(2 * weight) ** -0.5 if weight else math.inf for weight in (ce_weight, kl_weight)]
    return DistillationLoss(kind, temperature, sigma, warm_up=warm_up)


class DistillationLoss(nn.Module):
    """Distillation loss, weighted against cross-entropy.

    Arguments
    ---------
    kind : str
        `kl` or `js`.
    temperature : float
        Temperature of both distributions.
    sigma : list of float
        Sigmas of cross-entropy and distillation.
    learn_sigma : bool
        Whether the sigmas are learned; their logarithms are then trainable parameters.
    warm_up : float
        Share of training over which the weight of the distillation term grows from 0 to 1.

    Raises
    ------
    UserError
        If a value is invalid.
    """

    def __init__(
        self,
        kind: str = "js",
        temperature: float = 1.0,
        sigma: tuple[float, float] | list[float] = (1.0, 1.0),
        learn_sigma: bool = False,
        warm_up: float = 0.0,
    ) -> None:
        super().__init__()
        if kind not in DIVERGENCES:
            raise UserError(f"distillation: expected kl or js, got '{kind}'.{did_you_mean(kind, DIVERGENCES)}")
        if not temperature > 0 or len(sigma) != 2 or not min(sigma) > 0 or not 0 <= warm_up <= 1:
            raise UserError(
                f"distillation: temperature ({temperature}) and the two sigma values ({list(sigma)}) must be above 0, "
                f"kd_warm_up ({warm_up}) must be from 0 to 1"
            )
        self.kind, self.temperature, self.warm_up = kind, temperature, warm_up
        self.log_sigma = nn.Parameter(torch.tensor(sigma, dtype=torch.float32).log(), requires_grad=learn_sigma)

    def _load_from_state_dict(self, state: dict[str, torch.Tensor], prefix: str, *rest: Any) -> None:
        """Take learned weights from a checkpoint; those of the YAML file may have been changed since."""
        if not self.log_sigma.requires_grad and f"{prefix}log_sigma" in state:
            state[f"{prefix}log_sigma"] = self.log_sigma.detach().clone()
        super()._load_from_state_dict(state, prefix, *rest)

    def divergence(self, teacher: TeacherDistribution, logits: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Return the mean divergence of the student's logits [batch, tokens, vocabulary] over real tokens [batch, tokens]."""
        per_token = DIVERGENCES[self.kind](teacher.log_probs.float(), teacher.student(logits, self.temperature))
        return self.temperature**2 * per_token[real].mean()

    def forward(self, supervised: torch.Tensor, divergence: torch.Tensor, progress: float = 1.0) -> torch.Tensor:
        """Return the total loss from cross-entropy (with gate term) and divergence; `progress` of training is in [0, 1]."""
        weight = min(1.0, progress / self.warm_up) if self.warm_up else 1.0
        first, second = (-2 * self.log_sigma).exp()
        loss = 0.5 * (first * supervised + weight * second * divergence)
        return loss + self.log_sigma.sum() if self.log_sigma.requires_grad else loss
