r"""Pruning: a student Whisper with fewer layers of the same width.

Gandhi, von Platen, Rush: "Distil-Whisper: Robust Knowledge Distillation via Large-Scale Pseudo Labelling" (arXiv 2311.00430,
section 3.1), after Shleifer, Rush: "Pre-trained Summarization Distillation" (arXiv 2010.13002). Of :math:`L` layers, the student
keeps :math:`n` that are spaced as far apart as possible, the first and the last among them:

.. math:: l_i = \left\lfloor \frac{i (L - 1)}{n - 1} \right\rfloor, \quad i = 0 \dots n - 1,

and only the first if :math:`n = 1`. Everything else is copied: convolutions, positions, embeddings, layer norms, output layer.
With all layers kept, the student is the teacher, bit for bit.

Deviations: the layers of either side can also be given as a list. The heads that align words with time (`alignment_heads`) are
renumbered, or removed if their layers are gone, so that other programs do not look for them.
"""

from __future__ import annotations

from typing import Any

from efficient_asr.models.whisper.model import Whisper
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.technique import Key, Technique

TECHNIQUE = Technique(name="pruning", keys=(Key("encoder_layers", untyped=True), Key("decoder_layers", untyped=True)))


def kept_layers(wanted: int | list[int], count: int, key: str) -> list[int]:
    """Return the layers to keep of `count`, numbered from 0.

    Arguments
    ---------
    wanted : int or list of int
        How many, -1 for all; or a list of layers, numbered from 1.
    count : int
        Number of layers of the teacher.
    key : str
        Name of the YAML key, for messages.

    Raises
    ------
    UserError
        If that is impossible.
    """
    if isinstance(wanted, (list, tuple)):
        layers = list(wanted)
        fits = all(type(i) is int and 1 <= i <= count for i in layers) and len({*layers}) == len(layers)
        if not layers or not fits:
            raise UserError(f"{key}: expected a list of distinct layers from 1 to {count}, got {layers}")
        return sorted(i - 1 for i in layers)
    if type(wanted) is not int or not (wanted == -1 or 1 <= wanted <= count):
        raise UserError(f"{key}: expected a number from 1 to {count}, -1 for all, or a list of layers, got {wanted!r}")
    if wanted == -1:
        return list(range(count))
    return [0] if wanted == 1 else [i * (count - 1) // (wanted - 1) for i in range(wanted)]


def prune(model: Whisper, encoder_layers: int | list[int] = -1, decoder_layers: int | list[int] = -1) -> Whisper:
    """Remove layers of a Whisper in place, and return it.

    What was removed is recorded in its `history`; see `kept_layers` for the arguments.

    Raises
    ------
    UserError
        If a value is invalid, or the model is not a plain Whisper.
    """
    if type(model) is not Whisper:
        raise UserError(f"encoder_layers, decoder_layers: a Whisper with {model.technique} cannot lose layers")
    network, config = model.network, model.network.config
    for side, wanted in (("encoder", encoder_layers), ("decoder", decoder_layers)):
        stack = getattr(network.model, side)
        count = len(stack.layers)
        kept = kept_layers(wanted, count, f"{side}_layers")
        if len(kept) == count:
            continue
        for i in reversed(range(count)):
            if i not in kept:
                del stack.layers[i]
        setattr(config, f"{side}_layers", len(kept))
        for number, layer in enumerate(stack.layers):
            for name in ("self_attn", "encoder_attn"):  # their place in the cache of keys and values
                if getattr(getattr(layer, name, None), "layer_idx", None) is not None:
                    getattr(layer, name).layer_idx = number
        if side == "decoder":
            _renumber_alignment(network.generation_config, kept)
        model.history.setdefault("pruning", {})[f"kept_{side}_layers"] = [i + 1 for i in kept]
    return model


def _renumber_alignment(generation: Any, kept: list[int]) -> None:
    heads = getattr(generation, "alignment_heads", None)
    if heads is None:
        return
    left = [[kept.index(layer), head] for layer, head in heads if layer in kept]
    if left:
        generation.alignment_heads = left
    else:
        del generation.alignment_heads
