"""Measure the inference cost of language experts: CPU time at batch 1 against plain Whisper, and memory with several experts
loaded.

    python recipes/clsr/cost.py output/experts_js/77/model --manifest data/real_experts/in_domain.jsonl --out
    results/experts/cost-tiny.json

Plain Whisper and experts are timed alternately, utterance by utterance, so that other load on the machine affects both alike.
The script reports the medians over the repeats and their ratio, once with the language of each utterance given and once with
the language detected (utterances that use an expert are then encoded twice). Gates are used as trained; with `--gates half`
every other token goes to an expert, which is the most expensive case. If the model has fewer than `--experts` experts, experts
for further languages are added to measure the memory.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from efficient_asr.data import iterate_batches, read_manifest
from efficient_asr.evaluation.result import provenance
from efficient_asr.evaluation.runtime import device_name
from efficient_asr.inference.load import load_transcriber
from efficient_asr.inference.transcriber import Transcriber, transcribe_rows
from efficient_asr.settings.options import at_least
from efficient_asr.techniques.clsr.network import DistilWhisperForConditionalGeneration
from efficient_asr.utils.errors import UserError, check_writable, exit_code
from efficient_asr.utils.files import atomic_write_text

MORE = ("it", "ru", "pt", "pl", "ca", "tr", "uk", "cs")


def weight_bytes(*modules: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


class EveryOther:
    """Opens the gates for every other token, which costs the most."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, int], int] = {}

    def __call__(self, place: tuple[str, int], logits: torch.Tensor) -> torch.Tensor:
        """Return gate logits [rows, size] for the layer at `place`; the computed ones are paid for, but not used."""
        start = self.seen.get(place, 0)  # the decoder gets one token at a time
        self.seen[place] = start + logits.shape[1]
        positions = torch.arange(start, start + logits.shape[1])
        return torch.where(positions % 2 == 0, 1.0, -1.0).expand_as(logits)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="model folder of recipes/clsr")
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument(
        "--utterances", type=at_least(1), default=30, help="maximum number of utterances, spread over the manifest"
    )
    parser.add_argument("--repeats", type=at_least(1), default=5)
    parser.add_argument("--experts", type=at_least(1), default=5)
    parser.add_argument("--gates", choices=("trained", "half"), default="trained")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def load_all(args: argparse.Namespace) -> dict[str, Transcriber]:
    """Load plain Whisper and experts, each with the language given and with it detected."""
    # With a detected language, an utterance that uses an expert is encoded twice.
    transcribers = {
        name + suffix: load_transcriber(args.model, language=language, max_tokens_per_s=12.0)
        for suffix, language in (("", "manifest"), ("_detecting", None))
        for name in ("plain", "experts")
    }
    network = transcribers["experts"].model.network
    if not isinstance(network, DistilWhisperForConditionalGeneration):
        raise UserError(f"{args.model} has no language experts")
    for name, transcriber in transcribers.items():
        if name.startswith("plain"):
            transcriber.model.network.unwrap()
        elif args.gates == "half":
            transcriber.model.network.routing.override_gates = EveryOther()
    return transcribers


def main() -> None:
    args = parse()
    check_writable(args.out.parent, "--out")
    rows = read_manifest(args.manifest)
    rows = rows.select(range(0, len(rows), max(1, len(rows) // args.utterances)))[: args.utterances]
    transcribers = load_all(args)
    network = transcribers["experts"].model.network
    utterances = list(iterate_batches(rows, 1))
    times: dict[str, list[float]] = {name: [] for name in transcribers}
    for repeat in tqdm(range(args.repeats + 1), desc="timing", unit="pass", leave=False):  # the first warms up
        totals = dict.fromkeys(times, 0.0)
        for chunk, wavs, wav_lens in utterances:
            for name, transcriber in transcribers.items():
                start = time.perf_counter()
                transcribe_rows(transcriber, chunk, wavs, wav_lens)
                totals[name] += time.perf_counter() - start
        for name, total in totals.items() if repeat else ():
            times[name].append(total)
    medians = {name: statistics.median(values) for name, values in times.items()}
    one = max(weight_bytes(*network.expert(a).values()) for a in network.languages)
    for language in [a for a in MORE if a not in network.languages][: max(0, args.experts - len(network.languages))]:
        network.add_language(language)
    weights = weight_bytes(network)
    result = {
        "model": args.model, "gates": args.gates, "utterances": len(utterances), "audio_s": float(rows.durations.sum()),
        "repeats": args.repeats, "threads": torch.get_num_threads(), "device_name": device_name("cpu"),
        **{f"{name}_s": median for name, median in medians.items()}, "ratio": medians["experts"] / medians["plain"],
        "ratio_detecting": medians["experts_detecting"] / medians["plain_detecting"], "all_s": times,
        "plain_bytes": weight_bytes(transcribers["plain"].model.network), "expert_bytes": one,
        "experts": network.languages, "bytes_with_experts": weights, "provenance": provenance(None),
    }  # fmt: skip
    atomic_write_text(args.out, json.dumps(result, indent=1) + "\n")
    for suffix, what in (("", "given"), ("_detecting", "detected")):
        plain_s, experts_s = medians[f"plain{suffix}"], medians[f"experts{suffix}"]
        print(
            f"language {what}: plain {plain_s:.2f} s, with experts {experts_s:.2f} s ({experts_s / plain_s:.3f}x) for "
            f"{result['audio_s']:.0f} s of audio"
        )
    print(
        f"weights: {result['plain_bytes'] / 1e6:.0f} MB plain, {weights / 1e6:.0f} MB with {len(network.languages)} experts"
    )
    print(f"result: {args.out}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
