"""Count the multiply-accumulates of the operations that ran, in two conventions.

`macs` counts every product that torch executes: matrix products, convolutions, attention products (also inside fused
kernels, which torch's own counter misses on the CPU), recurrent layers, and each step of cached decoding. It uses the
formulas of `torch.utils.flop_counter` and adds missing ones. `macs_thop` follows thop, the counter used in the papers
(`thop.profile`): module by module with thop's own rules, which ignore attention products and functional calls. It allows
comparisons with published tables.

Both are counted in the same forward pass: nothing runs twice, and no module is changed.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop

aten = torch.ops.aten


@dataclass
class Macs:
    """Cost and output of a call.

    Attributes
    ----------
    macs : int
        Multiply-accumulates of all operations that ran.
    macs_thop : int or None
        The same in thop's convention; None if thop cannot be imported (it needs `distutils`).
    output : Any
        Return value of the call.
    """

    macs: int
    macs_thop: int | None
    output: Any


def _rnn_layer_flops(input: torch.Tensor, w_input: torch.Tensor, w_hidden: torch.Tensor, *args, **kwargs) -> int:
    """One direction of one layer (oneDNN on the CPU): every position is multiplied by both weight matrices."""
    return 2 * prod(input.shape[:-1]) * (w_input.numel() + w_hidden.numel())


def _cudnn_rnn_flops(input: torch.Tensor, weights: list[torch.Tensor], *args, **kwargs) -> int:
    """All layers and directions at once; `input` is [time, batch, dim] or packed [positions, dim]."""
    return 2 * prod(input.shape[:-1]) * sum(weight.numel() for weight in weights if weight.dim() == 2)


def _linear_flops(input: torch.Tensor, weight: torch.Tensor, *args, **kwargs) -> int:
    return 2 * prod(input.shape[:-1]) * weight.numel()


def _mv_flops(matrix: torch.Tensor, vector: torch.Tensor, *args, **kwargs) -> int:
    return 2 * matrix.numel()


def _matmul_flops(a: torch.Tensor, b: torch.Tensor, *args, out_val: torch.Tensor, **kwargs) -> int:
    return 2 * out_val.numel() * a.shape[-1]


def _conv_flops(input, weight, bias, stride, padding, dilation, transposed, *args, out_val: torch.Tensor) -> int:
    """Every output element (every input element if transposed) is multiplied by one filter."""
    elements = input.numel() if transposed else out_val.numel()
    return 2 * elements * weight.numel() // weight.shape[0]


def _addmm_flops(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *args, out_val: torch.Tensor, **kwargs) -> int:
    return _matmul_flops(a, b, out_val=out_val)


_OWN_FORMULAS = {
    # torch has formulas for these, but they traverse all arguments and would slow down a small model by 10 %.
    "mm": _matmul_flops,
    "bmm": _matmul_flops,
    "addmm": _addmm_flops,
    "baddbmm": _addmm_flops,
    "mv": _mv_flops,
    "dot": _mv_flops,
    "convolution": _conv_flops,
    # torch has no formulas for these.
    "mkldnn_rnn_layer": _rnn_layer_flops,
    "_cudnn_rnn": _cudnn_rnn_flops,
    "miopen_rnn": _cudnn_rnn_flops,
    "linear": _linear_flops,
    "mkldnn_linear": _linear_flops,
    "_weight_int8pack_mm": _linear_flops,
}


@functools.lru_cache(maxsize=1)
def _formulas() -> dict[Any, Callable[..., int]]:
    """Map overload packets to functions of the call's arguments and `out_val` returning FLOPs (2 per multiply-accumulate)."""
    formulas = dict(flop_registry)
    for name, formula in _OWN_FORMULAS.items():
        if hasattr(aten, name):
            formulas[getattr(aten, name)] = formula

    def attention(query, key, value, *args, **kwargs) -> int:
        return sdpa_flop(query.shape, key.shape, value.shape)

    quantised = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    formulas[quantised] = lambda x, *args, out_val, **kwargs: 2 * out_val.numel() * x.shape[-1]
    for name in ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_fused_attention_overrideable"):
        formulas[getattr(aten, name)] = attention
    return formulas


class _Counter(TorchDispatchMode):
    """Sums the FLOPs of all operations executed within the context."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.formulas = _formulas()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        formula = self.formulas.get(getattr(func, "_overloadpacket", None))
        if formula is None and torch.is_inference_mode_enabled():
            with self:  # in inference mode, composite operations are not decomposed: do it here
                out = func.decompose(*args, **(kwargs or {}))
            if out is not NotImplemented:
                return out
        out = func(*args, **(kwargs or {}))
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


class _ThopProxy:
    """Proxy passed to thop's rules, which add to `total_ops`; the module itself is not modified."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.__dict__["module"] = module
        self.__dict__["total_ops"] = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)


@functools.lru_cache(maxsize=1)
def _thop_rules() -> dict[type, Callable] | None:
    """Map module types to thop's rules, without rules that count nothing; None if thop cannot be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            profile = importlib.import_module("thop.profile")
    except ImportError:
        return None
    return {kind: rule for kind, rule in profile.register_hooks.items() if rule.__name__ != "zero_ops"}


def thop_available() -> bool:
    """Whether thop can be imported, so that `macs_thop` can be counted."""
    return _thop_rules() is not None


def count_macs(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Macs:
    """Run `fn(*args, **kwargs)` once and count its multiply-accumulates.

    Arguments
    ---------
    fn : callable
        A module or any function that runs torch operations; no gradients are recorded.
    *args, **kwargs
        Arguments of `fn`.

    Returns
    -------
    Macs
        `.macs`, `.macs_thop` and `.output`.

    Example
    -------
    >>> count_macs(torch.nn.Linear(3, 5), torch.zeros(2, 3)).macs
    30
    """
    rules = _thop_rules()
    thop_total = 0.0

    def hook(module: torch.nn.Module, inputs: tuple, output: Any) -> None:
        nonlocal thop_total
        rule = rules.get(type(module))
        if rule is not None and inputs:
            proxy = _ThopProxy(module)
            rule(proxy, inputs, output)
            thop_total += float(proxy.total_ops)

    handle = torch.nn.modules.module.register_module_forward_hook(hook) if rules is not None else None
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a fused transformer layer would hide its matrix products
    try:
        # inference_mode would hide matrix products inside composite operations
        with torch.inference_mode(False), torch.no_grad(), _Counter() as counter:
            output = fn(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        if handle is not None:
            handle.remove()
    return Macs(counter.flops // 2, round(thop_total) if rules is not None else None, output)
