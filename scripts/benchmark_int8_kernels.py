"""Time products with int8 weights on this CPU: the layers of this project beside torchao's, for shapes of a Whisper.

    python scripts/benchmark_int8_kernels.py --out results/int8/kernels.json        # pip install torchao, or it is left out

One row is a step of decoding one utterance, 400 rows are 8 s of audio in the encoder. torchao is measured as it is and through
torch.compile, which its kernels are made for. Systems take turns; the medians of the rounds are written.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from efficient_asr.evaluation.result import provenance
from efficient_asr.evaluation.runtime import device_name
from efficient_asr.models.int8 import RowWise, WeightOnly
from efficient_asr.settings.options import at_least
from efficient_asr.utils.errors import check_writable, exit_code
from efficient_asr.utils.files import atomic_write_text

SHAPES = ((1, 384, 51865), (1, 384, 1152), (1, 512, 2048), (400, 384, 1536), (400, 768, 3072))


def systems(linear: nn.Linear) -> dict[str, Callable[[], nn.Module]]:
    """Return what makes each of the layers to be timed."""
    found: dict[str, Callable[[], nn.Module]] = {
        "float32": lambda: linear,
        "bfloat16": lambda: copy.deepcopy(linear).bfloat16(),
        "WeightOnly": lambda: WeightOnly(linear),
        "RowWise": lambda: RowWise(linear),
    }
    try:
        from torchao import quantization
    except ImportError:
        return found

    def quantised(config: object, dtype: torch.dtype, compiled: bool) -> nn.Module:
        layer = nn.Sequential(copy.deepcopy(linear).to(dtype))
        quantization.quantize_(layer, config)
        return torch.compile(layer) if compiled else layer

    for name, config, dtype in (
        ("weight-only, bfloat16", quantization.Int8WeightOnlyConfig, torch.bfloat16),
        ("weight-only, float32", quantization.Int8WeightOnlyConfig, torch.float32),
        ("dynamic", quantization.Int8DynamicActivationInt8WeightConfig, torch.float32),
    ):
        for compiled in (False, True):
            label = f"torchao {name}{', compiled' if compiled else ''}"
            found[label] = lambda c=config, d=dtype, k=compiled: quantised(c(), d, k)
    return found


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=at_least(1), default=7, help="rounds that are timed")
    parser.add_argument("--out", type=Path, required=True, help="file for the result")
    args = parser.parse_args()
    check_writable(args.out.parent, "--out")
    rows, failed = [], {}
    for count, inputs, outputs in SHAPES:
        torch.manual_seed(0)
        torch.compiler.reset()  # it gives up after so many shapes
        linear, x = nn.Linear(inputs, outputs).eval(), torch.randn(count, inputs)
        layers = {}
        for name, make in systems(linear).items():
            given = x.bfloat16() if "bfloat16" in name else x
            try:
                with torch.no_grad():
                    layer = make()
                    layer(given)
                    layers[name] = layer, given
            except Exception as error:  # of another project's kernels: any kind
                failed[f"{name}, {count} x {inputs} x {outputs}"] = repr(error)
        times: dict[str, list[float]] = {name: [] for name in layers}
        for number in range(args.rounds + 1):
            for name, (layer, given) in layers.items():
                start, calls = time.perf_counter(), 0
                with torch.no_grad():
                    while time.perf_counter() - start < 0.1:
                        layer(given)
                        calls += 1
                if number:  # the first round warms up
                    times[name].append(1000 * (time.perf_counter() - start) / calls)
        with torch.no_grad():
            exact = linear(x)
            errors = {
                name: float((layer(given).float() - exact).norm() / exact.norm())
                for name, (layer, given) in layers.items()
            }
        for name, each in times.items():
            milliseconds = statistics.median(each)
            rows.append(
                {
                    "rows": count,
                    "inputs": inputs,
                    "outputs": outputs,
                    "system": name,
                    "ms": milliseconds,
                    "error": errors[name],
                }
            )
            print(f"{count} x {inputs} x {outputs}  {name:36} {milliseconds:8.3f} ms  error {100 * errors[name]:.2f} %")
    about = provenance(None) | {"cpu": device_name("cpu"), "threads": torch.get_num_threads()}
    atomic_write_text(args.out, json.dumps({"rows": rows, "failed": failed, "provenance": about}, indent=1) + "\n")
    print(f"result: {args.out}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
