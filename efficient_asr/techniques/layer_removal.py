r"""Layer removal: fine-tune an encoder with fewer layers.

Zaiem, Algayres, Parcollet, Essid, Ravanelli: "Fine-tuning Strategies for Faster Inference using Speech Self-Supervised
Models: A Comparative Study" (arXiv 2303.06740), section on layer removal: keep the first :math:`N` of the :math:`L`
transformer layers and the final layer norm, then fine-tune. All layers have the same cost, so

.. math:: \mathrm{MACs}(N) = \mathrm{MACs}(L) - (L - N) \cdot \mathrm{MACs}(\text{one layer}).

Layers to keep (`kept_layers`, numbered from 1):

- `12` or `first_12`: the first 12, as in the paper;
- `last_12`; `every_2` (layers 1, 3, 5, ...); `[1, 2, 5]`;
- `least_redundant_12`: the 12 layers that change their input most. The redundancy of layer :math:`l` is

  .. math:: r_l = \mathbb{E}\left[\frac{h_{l-1} \cdot h_l}{\lVert h_{l-1} \rVert \, \lVert h_l \rVert}\right]

  over the real frames of some training utterances, with :math:`h_l` the hidden states after layer :math:`l`. It is one minus
  the "block influence" of Men et al.: "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect" (arXiv
  2403.03853).
- `all`: the identity.

Deviations from the paper: the paper only keeps the first layers; the other choices are additions. WavLM's relative position
embedding, stored in its first layer and used by all, moves to the first kept layer. As in the paper, the shorter network is not
adjusted to behave like the full one before fine-tuning.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from efficient_asr.data import frame_mask
from efficient_asr.models.encoders.base import Encoder
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.technique import Key, Technique

TECHNIQUE = Technique(
    name="layer_removal",
    keys=(Key("kept_layers", untyped=True), Key("calibration_utterances", least=1)),
)
CHOICES = ("first", "last", "every", "least_redundant")


def parse_choice(kept_layers: Any, num_layers: int) -> tuple[str, int | list[int]]:
    """Parse the YAML key `kept_layers`.

    Returns
    -------
    tuple
        One of `CHOICES` and its number, or `list` and the layers, counted from 1.

    Raises
    ------
    UserError
        If it is not a valid choice, or does not fit an encoder with `num_layers` layers.
    """
    if kept_layers is None or kept_layers == "all":
        return "first", num_layers
    if isinstance(kept_layers, (list, tuple)):
        layers = list(kept_layers)
        fits = all(type(i) is int and 1 <= i <= num_layers for i in layers) and len({*layers}) == len(layers)
        if not layers or not fits:
            raise UserError(f"kept_layers: expected a list of distinct layers from 1 to {num_layers}, got {layers}")
        return "list", sorted(layers)
    match = re.fullmatch(rf"(?:({'|'.join(CHOICES)})[ _])?(\d+)", str(kept_layers))
    if not match:
        raise UserError(
            f"kept_layers: expected a number, {', '.join(f'{choice}_N' for choice in CHOICES)}, a list of layers from "
            f"1 to {num_layers}, or all, got '{kept_layers}'"
        )
    if not 1 <= int(match[2]) <= num_layers:
        raise UserError(f"kept_layers: '{kept_layers}' is out of range; the encoder has {num_layers} layers")
    return match[1] or "first", int(match[2])


def choose_layers(
    encoder: Encoder, kept_layers: Any, batches: Iterable[tuple[torch.Tensor, torch.Tensor]] = ()
) -> list[int]:
    """Return the layers to keep, counted from 1, in ascending order.

    Arguments
    ---------
    encoder : Encoder
        The encoder with all its layers.
    kept_layers : int, str or list of int
        The layers to keep; see the module docstring.
    batches : iterable of (torch.Tensor, torch.Tensor)
        Data for `least_redundant`: encoder inputs [batch, time] and lengths [batch].
    """
    choice, value = parse_choice(kept_layers, encoder.num_layers)
    if choice == "list":
        return value
    if choice == "every":
        return list(range(1, encoder.num_layers + 1, value))
    if choice == "least_redundant" and value < encoder.num_layers:
        order = layer_redundancies(encoder, batches).argsort(stable=True)
        return sorted(int(i) + 1 for i in order[:value])
    first = 1 if choice != "last" else encoder.num_layers - value + 1
    return list(range(first, first + value))


@torch.no_grad()
def layer_redundancies(encoder: Encoder, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Return the mean cosine similarity between each layer's input and output, [layers], over all real frames.

    Raises
    ------
    ValueError
        If `batches` contain no frames.
    """
    training = encoder.training
    encoder.eval()
    totals, frames = torch.zeros(encoder.num_layers, dtype=torch.float64), 0
    for wavs, lengths in batches:
        encoded = encoder(wavs, lengths, output_hidden_states=True)
        real = frame_mask(encoded.frame_lengths, encoded.states.shape[1]).to(encoded.states.device)
        frames += int(real.sum())
        for i in range(encoder.num_layers):
            before, after = encoded.hidden_states[i], encoded.hidden_states[i + 1]
            totals[i] += torch.cosine_similarity(before, after, dim=-1)[real].double().sum().cpu()
    encoder.train(training)
    if not frames:
        raise ValueError("cannot compare layers: the batches contain no frames")
    return totals / frames


def keep_layers(encoder: Encoder, layers: Sequence[int]) -> None:
    """Remove all layers but `layers` (counted from 1) from an encoder, together with their parameters."""
    first, kept = encoder.layers[0], {i - 1 for i in layers}
    for i in reversed(range(encoder.num_layers)):
        if i not in kept:
            del encoder.layers[i]
    bias = getattr(getattr(first, "attention", None), "rel_attn_embed", None)
    if bias is not None:  # WavLM computes the position bias for all layers in its first layer
        encoder.layers[0].attention.rel_attn_embed = bias
