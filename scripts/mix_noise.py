"""Make a noisy copy of a manifest: reverberation, then additive noise at random signal-to-noise ratios.

    python scripts/mix_noise.py test.jsonl --noise noises.jsonl --rir rirs.jsonl --out data/noisy/test

Writes FLAC files and `manifest.jsonl` to --out. `-noisy` is appended to each id, and the fields `snr_db`, `noise` and `rir`
record what was applied. Every random choice depends only on --seed and the utterance's id, so any subset is reproducible. With
--part train and --part test, training and test use different noises and rooms (every fifth is reserved for tests).
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch
from speechbrain.processing.signal_processing import reverberate
from tqdm import tqdm

import efficient_asr  # noqa: F401
from efficient_asr.data import SAMPLE_RATE, Row, load_row, read_manifest, write_manifest
from efficient_asr.data.augmentation import add_noise
from efficient_asr.data.manifest import SEGMENT_FIELDS
from efficient_asr.settings.options import at_least
from efficient_asr.utils.errors import UserError, check_writable, exit_code


def files_of(manifest: Path | None, part: str, kind: str) -> list[Row]:
    """Return the rows of a manifest of noises or room impulse responses that belong to a part."""
    if manifest is None:
        return []
    rows = sorted(read_manifest(manifest, need_text=False), key=lambda row: row["id"])
    rows = [row for row in rows if row.get("kind", kind) == kind]
    chosen = [row for i, row in enumerate(rows) if part == "all" or (i % 5 == 4) == (part == "test")]
    if not chosen:
        raise UserError(f"{manifest} contains no rows of kind '{kind}' for part '{part}'")
    return chosen


def mix(row: Row, noises: list[Row], rirs: list[Row], args: argparse.Namespace) -> tuple[torch.Tensor, dict]:
    """Return the noisy waveform [time] of an utterance, and a description of what was applied."""
    digest = hashlib.sha256(f"{args.seed} {row['id']}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    wav, about = load_row(row), {}
    draw = rng.random()  # always drawn, so that the noises do not depend on --rir
    if rirs and draw < args.rir_probability:
        rir = rirs[rng.integers(len(rirs))]
        response = load_row(rir)
        wav = reverberate(wav[None], response[None], rescale_amp="avg")[0]
        about["rir"] = rir["id"]
    if noises:
        noise = noises[rng.integers(len(noises))]
        about |= {"noise": noise["id"], "snr_db": round(float(rng.uniform(args.snr_low_db, args.snr_high_db)), 2)}
        sound = load_row(noise)
        sound = sound.roll(-int(rng.integers(len(sound)))).repeat(len(wav) // len(sound) + 1)[: len(wav)]
        wav = add_noise(wav, sound, about["snr_db"])
    return wav / max(1.0, float(wav.abs().max()) / 0.99), about


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "manifest", type=Path, help="JSON lines: id, audio, duration; texts are kept where there are any"
    )
    parser.add_argument("--noise", type=Path, help="manifest of noises")
    parser.add_argument("--rir", type=Path, help="manifest of room impulse responses")
    parser.add_argument("--part", choices=("all", "train", "test"), default="all")
    parser.add_argument("--snr_low_db", type=float, default=0.0)
    parser.add_argument("--snr_high_db", type=float, default=20.0)
    parser.add_argument(
        "--rir_probability", type=float, default=0.3, help="fraction of the utterances with reverberation"
    )
    parser.add_argument("--split", help="only the rows of this split")
    parser.add_argument(
        "--count", type=at_least(1), help="maximum number of utterances, evenly spread over the manifest"
    )
    parser.add_argument("--seed", type=int, default=1986)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.noise is None and args.rir is None:
        raise UserError("give noises with --noise, room impulse responses with --rir, or both")
    if args.snr_low_db > args.snr_high_db:
        raise UserError(f"--snr_low_db {args.snr_low_db} is greater than --snr_high_db {args.snr_high_db}")
    noises, rirs = files_of(args.noise, args.part, "noise"), files_of(args.rir, args.part, "rir")
    rows = [row for row in read_manifest(args.manifest, need_text=False) if args.split in (None, row.get("split"))]
    if not rows:
        raise UserError(f"--split: {args.manifest} has no rows of split '{args.split}'")
    if args.count and args.count < len(rows):
        rows = [rows[i] for i in np.linspace(0, len(rows) - 1, args.count).round().astype(int)]
    check_writable(args.out / "audio", "--out")
    lines = []
    for number, row in enumerate(tqdm(rows, desc=f"mixing {args.out.name}", unit="utt", leave=False)):
        wav, about = mix(row, noises, rirs, args)
        name = f"{number:05d}.flac"
        soundfile.write(args.out / "audio" / name, wav.numpy(), SAMPLE_RATE)
        # segments are now files of their own
        whole = {key: value for key, value in row.items() if key not in SEGMENT_FIELDS}
        line = {**whole, "id": f"{row['id']}-noisy", "audio": f"audio/{name}", **about}
        lines.append(line)
    write_manifest(args.out / "manifest.jsonl", lines)
    print(f"{len(rows)} noisy utterances: {args.out / 'manifest.jsonl'}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
