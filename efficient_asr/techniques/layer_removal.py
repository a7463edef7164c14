r"""Layer removal: an encoder with fewer layers, chosen before fine-tuning.

Zaiem, Algayres, Parcollet, Essid, Ravanelli: "Fine-tuning Strategies for Faster Inference using Speech Self-Supervised
Models: A Comparative Study" (arXiv 2303.06740), section on layer removal: keep the first :math:`N` of the :math:`L`
transformer layers and the final layer norm, then fine-tune. A layer's cost is the same for all, so that

.. math:: \mathrm{MACs}(N) = \mathrm{MACs}(L) - (L - N) \cdot \mathrm{MACs}(\text{one layer}).

Which layers (`kept_layers`; layers are numbered from 1):

- `12` or `first_12`: the first 12, the paper's choice;
- `last_12`; `every_2` (layers 1, 3, 5, ...); `[1, 2, 5]`;
- `least_redundant_12`: the 12 that change their input most. The redundancy of layer :math:`l` is

  .. math:: r_l = \mathbb{E}\left[\frac{h_{l-1} \cdot h_l}{\lVert h_{l-1} \rVert \, \lVert h_l \rVert}\right]

  over the real frames of some training utterances, with :math:`h_l` the states behind layer :math:`l`: one minus the "block
  influence" of Men et al.: "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect" (arXiv 2403.03853).
- `all`: the identity.

Deviations from the paper: only the first of these choices is the paper's. WavLM's relative position embedding, which its first
layer holds for all, moves to the first layer that is kept. As in the paper, nothing is done to make the shorter network
behave like the longer one before it is fine-tuned.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from efficient_asr.models.encoders.base import Encoder, frame_mask
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.technique import Key, Technique

TECHNIQUE = Technique(
    name="layer_removal",
    keys=(Key("kept_layers", untyped=True), Key("calibration_utterances", least=1)),
)
CHOICES = ("first", "last", "every", "least_redundant")


def parse_choice(kept_layers: Any, num_layers: int) -> tuple[str, int | list[int]]:
    """Read the YAML key `kept_layers`.

    Returns
    -------
    tuple
        One of `CHOICES` with its number, or `list` with layers, counted from 1.

    Raises
    ------
    UserError
        Where it is none of the above, or does not fit an encoder of so many layers.
    """
    if kept_layers is None or kept_layers == "all":
        return "first", num_layers
    if isinstance(kept_layers, (list, tuple)):
        layers = list(kept_layers)
        fits = all(type(i) is int and 1 <= i <= num_layers for i in layers) and len({*layers}) == len(layers)
        if not layers or not fits:
            raise UserError(f"kept_layers: {layers} is not a list of different layers from 1 to {num_layers}")
        return "list", sorted(layers)
    match = re.fullmatch(rf"(?:({'|'.join(CHOICES)})[ _])?(\d+)", str(kept_layers))
    if not match:
        raise UserError(
            f"kept_layers: '{kept_layers}' is not a number, {', '.join(f'{choice}_N' for choice in CHOICES)}, a list of "
            f"layers from 1 to {num_layers}, or all"
        )
    if not 1 <= int(match[2]) <= num_layers:
        raise UserError(f"kept_layers: '{kept_layers}', but the encoder has {num_layers} layers")
    return match[1] or "first", int(match[2])


def choose_layers(
    encoder: Encoder, kept_layers: Any, batches: Iterable[tuple[torch.Tensor, torch.Tensor]] = ()
) -> list[int]:
    """Return the layers to keep, counted from 1, in order.

    Arguments
    ---------
    encoder : Encoder
        The encoder with all its layers.
    kept_layers : int, str or list of int
        See above.
    batches : iterable of (torch.Tensor, torch.Tensor)
        What `least_redundant` looks at: what the encoder gets, [batch, time], and lengths [batch].
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
    """Return the mean cosine similarity of every layer's input and output, [layers], over all real frames.

    Raises
    ------
    ValueError
        Where `batches` hold no frame.
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
        raise ValueError("no frame to compare layers on")
    return totals / frames


def keep_layers(encoder: Encoder, layers: Sequence[int]) -> None:
    """Take all other layers out of an encoder; `layers` are counted from 1. Their parameters are gone."""
    first, kept = encoder.layers[0], {i - 1 for i in layers}
    for i in reversed(range(encoder.num_layers)):
        if i not in kept:
            del encoder.layers[i]
    bias = getattr(getattr(first, "attention", None), "rel_attn_embed", None)
    if bias is not None:  # WavLM computes the position bias of all layers in its first one
        encoder.layers[0].attention.rel_attn_embed = bias
