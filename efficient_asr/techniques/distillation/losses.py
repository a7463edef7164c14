r"""Distillation: a student learns what a larger model thinks of every next token.

With the teacher's distribution :math:`t` and the student's :math:`s` at temperature :math:`T` (both softmax of logits / T),
the loss of a token is the forward Kullback-Leibler divergence (Hinton et al., arXiv 1503.02531) or the Jensen-Shannon
divergence, which "Multilingual DistilWhisper" (arXiv 2311.01070) found better:

.. math::
    KL = T^2 \sum_v t_v \log \frac{t_v}{s_v}, \qquad
    JS = \frac{T^2}{2} \left[ \sum_v t_v \log \frac{t_v}{m_v} + \sum_v s_v \log \frac{s_v}{m_v} \right], \; m = \frac{t + s}{2},

averaged over real tokens. Together with cross-entropy and a gate term,

.. math::
    L = \frac{1}{2} \left[ \frac{CE + gate}{\sigma_1^2} + w \frac{KD}{\sigma_2^2} \right] \; (+ \log \sigma_1 \sigma_2
    \text{ where the } \sigma \text{ are learned, arXiv 1705.07115}),

where :math:`w` may grow from 0 to 1 over the first steps.

Deviations: padding counts nowhere, where the published code averages over it; sums are in float32 whatever the models
compute in; no epsilons are added inside logarithms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import log_softmax

from efficient_asr.utils.errors import UserError, did_you_mean


def kl_divergence(teacher_log_probs: torch.Tensor, student_log_probs: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher || student) in nats over the last dimension, [...]."""
    # xlogy-like: a class that the teacher excludes adds nothing
    terms = teacher_log_probs.exp() * (teacher_log_probs.clamp(min=-1e4) - student_log_probs.clamp(min=-1e4))
    return terms.sum(dim=-1)


def js_divergence(teacher_log_probs: torch.Tensor, student_log_probs: torch.Tensor) -> torch.Tensor:
    """Return the Jensen-Shannon divergence in nats over the last dimension, [...]; symmetric, at most log 2."""
    mean = torch.logaddexp(teacher_log_probs, student_log_probs) - math.log(2)
    return (kl_divergence(teacher_log_probs, mean) + kl_divergence(student_log_probs, mean)) / 2


DIVERGENCES = {"kl": kl_divergence, "js": js_divergence}


@dataclass
class TeacherDistribution:
    """What a teacher thinks of each next token.

    Attributes
    ----------
    log_probs : torch.Tensor
        [batch, tokens, classes], at the temperature of the loss.
    indices : torch.Tensor or None
        Vocabulary entries of all classes but the last, which is the rest, [batch, tokens, classes - 1]; None where the classes
        are the vocabulary.
    """

    log_probs: torch.Tensor
    indices: torch.Tensor | None = None

    def student(self, logits: torch.Tensor, temperature: float) -> torch.Tensor:
        """Return the log-probabilities of the same classes from a student's logits [batch, tokens, vocabulary]."""
        log_probs = log_softmax(logits.float() / temperature, dim=-1)
        return log_probs if self.indices is None else with_rest(log_probs, self.indices)


def with_rest(log_probs: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities [..., k + 1] of some entries [..., k] and, last, of all others together."""
    rest = log_probs.scatter(-1, indices, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat([log_probs.gather(-1, indices), rest.clamp(min=-1e4)], dim=-1)


class DistillationLoss(nn.Module):
    """The loss, with what it weighs.

    Arguments
    ---------
    kind : str
        `kl` or `js`.
    temperature : float
        Of both distributions.
    sigma : list of float
        Of cross-entropy and distillation.
    learn_sigma : bool
        Whether the sigmas are learned; their logarithms are then parameters.
    warm_up : float
        Share of the training over which the distillation's weight grows from 0 to 1.

    Raises
    ------
    UserError
        For a value that makes no sense.
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
            raise UserError(f"distillation: '{kind}' is not kl or js.{did_you_mean(kind, DIVERGENCES)}")
        if not temperature > 0 or len(sigma) != 2 or not min(sigma) > 0 or not 0 <= warm_up <= 1:
            raise UserError(
                f"distillation: temperature {temperature} and two sigma {list(sigma)} must be above 0, "
                f"kd_warm_up {warm_up} from 0 to 1"
            )
        self.kind, self.temperature, self.warm_up = kind, temperature, warm_up
        self.log_sigma = nn.Parameter(torch.tensor(sigma, dtype=torch.float32).log(), requires_grad=learn_sigma)

    def divergence(self, teacher: TeacherDistribution, logits: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Return the mean divergence of the student's logits [batch, tokens, vocabulary] over real tokens [batch, tokens]."""
        per_token = DIVERGENCES[self.kind](teacher.log_probs.float(), teacher.student(logits, self.temperature))
        return self.temperature**2 * per_token[real].mean()

    def forward(self, supervised: torch.Tensor, divergence: torch.Tensor, progress: float = 1.0) -> torch.Tensor:
        """Weigh cross-entropy (with gate term) and divergence, where `progress` of the training is done."""
        weight = min(1.0, progress / self.warm_up) if self.warm_up else 1.0
        first, second = (-2 * self.log_sigma).exp()
        loss = 0.5 * (first * supervised + weight * second * divergence)
        return loss + self.log_sigma.sum() if self.log_sigma.requires_grad else loss
