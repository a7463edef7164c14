r"""Linear layers with int8 weights, on the CPU.

The weights of each output channel are quantised with their own scale, :math:`W_{ij} \approx s_i q_{ij}` with
:math:`q_{ij} \in [-127, 127]`. Two kernels of torch multiply with them:

- `WeightOnly`: activations stay in bfloat16. Decoding one utterance is bound by reading weights; int8 has a quarter of the bytes.
- `RowWise`: every row of the activations is quantised to 7 bits with its own scale (the vector-wise quantisation of LLM.int8(),
  arXiv 2208.07339). Faster for large products, coarser. 7 bits, because without VNNI the products of two 8 bit numbers overflow
  the 16 bit sums of FBGEMM's kernel.

Both treat every row on its own, so a transcript does not depend on its batch. torch's own dynamic quantisation uses one scale for
all rows. What was tried beside these kernels is in docs/deployment.md.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from efficient_asr.settings.options import QUANTISATIONS, is_selection
from efficient_asr.utils.errors import UserError, did_you_mean

LEVELS, MIDDLE = 63, 64  # of 7 bit activations
MULTIPLE = 16  # the kernel of `WeightOnly` reads past the end of rows of other lengths; such layers stay in float


class Int8Linear(nn.Module):
    """Base class of linear layers with int8 weights.

    Arguments
    ---------
    linear : torch.nn.Linear
        The layer to replace, in float32.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias


class WeightOnly(Int8Linear):
    """A linear layer with int8 weights and bfloat16 activations."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight = linear.weight.detach().float()
        scale = _scale(weight).bfloat16()
        scale = torch.where(scale.float() * 127 < weight.abs().amax(dim=1), scale * (1 + 2**-7), scale)
        self.register_buffer("weight", (weight / scale.float()[:, None]).round().to(torch.int8), persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    @classmethod
    def join(cls, layers: list[WeightOnly]) -> WeightOnly:
        """Return one layer with the outputs of several; these share its weights from then on."""
        joined = cls(nn.Linear(layers[0].in_features, 1, bias=True))
        joined.out_features = sum(layer.out_features for layer in layers)
        joined.weight, joined.scale = torch.cat([a.weight for a in layers]), torch.cat([a.scale for a in layers])
        biases = [torch.zeros(a.out_features) if a.bias is None else a.bias.detach() for a in layers]
        joined.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
        sizes = [layer.out_features for layer in layers]
        for layer, weight, scale in zip(layers, joined.weight.split(sizes), joined.scale.split(sizes), strict=True):
            layer.weight, layer.scale = weight, scale
        return joined

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [..., out_features] of [..., in_features]."""
        rows = x.reshape(-1, self.in_features).bfloat16()
        y = torch._weight_int8pack_mm(rows, self.weight, self.scale).view(*x.shape[:-1], -1)
        return y.float() if self.bias is None else y + self.bias


class RowWise(Int8Linear):
    """A linear layer with int8 weights, and activations quantised row by row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight = linear.weight.detach().float()
        scale = _scale(weight)
        integers = (weight / scale[:, None]).round().to(torch.int8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantised tensors are deprecated; setup.py limits torch's version
            zero = torch.zeros(len(scale), dtype=torch.long)
            packable = torch._make_per_channel_quantized_tensor(integers, scale.double(), zero, 0)
            self.packed = torch.ops.quantized.linear_prepack(packable, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [..., out_features] of [..., in_features]."""
        largest = x.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-8)
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x / largest, 1 / LEVELS, MIDDLE, self.packed
        )
        return y * largest if self.bias is None else torch.addcmul(self.bias, y, largest)


def _scale(weight: torch.Tensor) -> torch.Tensor:
    """Return the scale of each output channel of weights [out, in]."""
    return weight.abs().amax(dim=1).clamp(min=1e-8) / 127


def quantise(network: nn.Module, mode: str) -> str:
    """Replace linear layers of a Whisper network with int8 ones, in place.

    Arguments
    ---------
    network : WhisperForConditionalGeneration
        The network, in float32 on the CPU.
    mode : str
        `decoder-int8`: layers of the decoder weight-only, the output layer row-wise. `encoder-int8`: layers of the encoder
        row-wise. `int8`: both. Or the JSON file of a selection of these layers (`scripts/search_int8.py`).

    Returns
    -------
    str
        Label of what was done.

    Raises
    ------
    UserError
        If the mode is unknown, or this CPU or network is not supported.
    """
    mode = str(mode)
    if any(hasattr(module, "base_layer") for module in network.modules()):
        raise UserError(
            f"quantise: {mode} needs a model without adapters; merge them into it first (peft: merge_and_unload)"
        )
    places = quantisable(network)
    if is_selection(mode):
        names, label = read_selection(mode, places)
    elif mode in QUANTISATIONS:
        parts = {"decoder-int8": ("decoder", "proj_out"), "encoder-int8": ("encoder",)}.get(mode, ("",))
        names, label = [name for name in places if name.startswith(parts)], mode
    else:
        raise UserError(
            f"quantise: '{mode}' is invalid; use {', '.join(QUANTISATIONS)}, or a .json file of scripts/search_int8.py."
            f"{did_you_mean(str(mode), QUANTISATIONS)}"
        )
    _need_kernels(mode)
    if network.dtype != torch.float32 or network.device.type != "cpu":
        raise UserError(
            f"quantise: {mode} needs a model in float32 on the CPU, not {network.dtype} on {network.device}"
        )
    replace(network, names)
    return label


def quantisable(network: nn.Module) -> dict[str, type[Int8Linear]]:
    """Return the linear layers of a Whisper network that can be replaced, by name, and the kernel of each."""
    found: dict[str, type[Int8Linear]] = {}
    for part, kernel in (("encoder", RowWise), ("decoder", WeightOnly)):
        for path, name, linear in _linears(getattr(network.model, part).layers):
            if kernel is RowWise or linear.in_features % MULTIPLE == 0:
                found[f"{part}.layers.{path}.{name}"] = kernel
    return found | {"proj_out": RowWise}


def replace(network: nn.Module, names: Iterable[str]) -> dict[str, nn.Linear]:
    """Replace layers of `quantisable` with int8 ones, in place; return the layers that they replace, for `put_back`."""
    kernels, replaced = quantisable(network), {}
    for name in names:
        parent, child = _place(network, name)
        replaced[name] = getattr(parent, child)
        setattr(parent, child, kernels[name](replaced[name]))
    for layer in network.model.decoder.layers:
        three = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
        if all(isinstance(one, WeightOnly) for one in three):
            layer.self_attn.qkv_proj = WeightOnly.join(three)
    return replaced


def put_back(network: nn.Module, replaced: dict[str, nn.Linear]) -> None:
    """Undo `replace`."""
    for name, linear in replaced.items():
        setattr(*_place(network, name), linear)
    for layer in network.model.decoder.layers:
        if hasattr(layer.self_attn, "qkv_proj") and isinstance(layer.self_attn.q_proj, nn.Linear):
            del layer.self_attn.qkv_proj


def read_selection(path: str, places: Iterable[str]) -> tuple[list[str], str]:
    """Return the names of the layers in the JSON file of a selection, and its label.

    Raises
    ------
    UserError
        If the file cannot be read or names layers that the network does not have.
    """
    places = list(places)
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        names, layers = found["modules"], found["layers"]
        if (
            not isinstance(names, list)
            or not all(isinstance(name, str) for name in names)
            or len({*names}) < len(names)
        ):
            raise ValueError("modules: not a list of different names")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"quantise: {path} is not a selection of int8 layers, as scripts/search_int8.py writes it ({error})"
        ) from None
    if layers != len(places) or not {*names} <= {*places}:
        raise UserError(
            f"quantise: {path} is of another model: it chooses from {layers} layers, this model has {len(places)}; run "
            "scripts/search_int8.py for this one"
        )
    digest = hashlib.sha256(json.dumps(sorted(names)).encode()).hexdigest()[:6]
    return names, f"int8, {len(names)} of {len(places)} layers ({digest})"


def quantise_encoder(encoder: nn.Module) -> None:
    """Replace the linear layers of a Whisper's encoder, in float32 on the CPU, with row-wise int8 ones, in place."""
    _need_kernels("int8")
    for path, name, linear in _linears(encoder.layers):
        setattr(encoder.layers.get_submodule(path), name, RowWise(linear))


def _need_kernels(mode: str) -> None:
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        raise UserError(f"quantise: {mode} needs torch's FBGEMM kernels, which this build (not x86) does not have")


def _place(network: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the parent and the last name of a layer of `quantisable`."""
    path, _, child = name.rpartition(".")
    return (network.model.get_submodule(path) if path else network), child


def _linears(layers: nn.Module) -> list[tuple[str, str, nn.Linear]]:
    """Return path of the parent, name and linear layer of each to replace.

    Keys and values of cross-attention are left out: they are computed once for all frames of an utterance, and not bound by
    reading weights.
    """
    found = []
    for path, parent in layers.named_modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and not (path.endswith("encoder_attn") and name in ("k_proj", "v_proj")):
                found.append((path, name, child))
    return found
