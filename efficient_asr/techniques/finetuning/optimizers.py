r"""AdamW, Adagrad and Adafactor, with the settings that the trainer of transformers gives them.

For the gradient :math:`g_t` of a weight :math:`w` and the learning rate :math:`\eta`,

.. math::
    \text{Adagrad:} \quad & w \leftarrow w - \eta \, g_t \Big/ \sqrt{\textstyle\sum_{s \le t} g_s^2} \\
    \text{AdamW:} \quad & w \leftarrow w - \eta \, \hat m_t / \sqrt{\hat v_t} - \eta \lambda w,
      \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
    \text{Adafactor:} \quad & w \leftarrow w - \eta \, u_t / \max(1, \text{RMS}(u_t)),
      \qquad u_t = g_t / \sqrt{R_t C_t / \bar R_t}

where :math:`\hat m, \hat v` are bias-corrected running means, and :math:`R_t, C_t` are running means of the rows and columns of
:math:`g^2`, which is all that Adafactor stores. Adagrad's steps only ever get smaller.

Duchi, Hazan, Singer: "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization" (JMLR 12, 2011);
Loshchilov, Hutter: "Decoupled Weight Decay Regularization" (arXiv 1711.05101); Shazeer, Stern: "Adafactor: Adaptive Learning
Rates with Sublinear Memory Cost" (arXiv 1804.04235).

Deviation: Adafactor's own schedule and its scaling of the learning rate by the size of the weights are off, as in the trainer.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers.optimization import Adafactor

from efficient_asr.utils.errors import UserError, did_you_mean

OPTIMIZERS = ("adamw", "adagrad", "adafactor")


def make_optimizer(
    parameters: Iterable[nn.Parameter], name: str, lr: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """Return an optimiser.

    Arguments
    ---------
    parameters : iterable of nn.Parameter
        The trainable parameters.
    name : str
        `adamw`, `adagrad` or `adafactor`.
    lr : float
        Learning rate.
    weight_decay : float
        Weight decay.

    Raises
    ------
    UserError
        If the name is unknown.
    """
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    if name == "adagrad":
        return torch.optim.Adagrad(parameters, lr=lr, weight_decay=weight_decay)
    if name == "adafactor":
        return Adafactor(parameters, lr=lr, weight_decay=weight_decay, scale_parameter=False, relative_step=False)
    raise UserError(f"optimizer: '{name}' is not one of {', '.join(OPTIMIZERS)}.{did_you_mean(str(name), OPTIMIZERS)}")
