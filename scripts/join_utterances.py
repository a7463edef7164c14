"""Join short utterances, such as single digits, into longer ones: random utterances of one speaker, with pauses between them.

    python scripts/join_utterances.py digits.jsonl --split train --passes 2 --out data/digit_strings/train

Writes FLAC files and `manifest.jsonl` to --out; the field `joined` names the utterances of each string. Every pass uses each
utterance of the manifest once, in another order; the last string of a speaker may be shorter than --fewest.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import soundfile
import torch
from tqdm import tqdm

import efficient_asr  # noqa: F401
from efficient_asr.data import SAMPLE_RATE, Row, load_row, read_manifest, write_manifest
from efficient_asr.settings.options import at_least
from efficient_asr.utils.errors import UserError, check_writable, exit_code


def strings_of(rows: list[Row], passes: int, fewest: int, most: int, rng: random.Random) -> Iterator[list[Row]]:
    """Yield groups of `fewest` to `most` rows, each of one speaker; a pass contains each row once."""
    speakers: dict[str, list[Row]] = {}
    for row in rows:
        speakers.setdefault(str(row.get("speaker")), []).append(row)
    for _ in range(passes):
        for name in sorted(speakers):
            own = rng.sample(speakers[name], len(speakers[name]))
            while own:
                count = rng.randint(fewest, most)
                yield own[:count]
                own = own[count:]


def join(rows: list[Row], gaps_s: tuple[float, float], rng: random.Random) -> torch.Tensor:
    """Return the waveform [time] of the utterances, with a random pause between each two."""
    wav = load_row(rows[0])
    for row in rows[1:]:
        wav = torch.cat([wav, torch.zeros(round(rng.uniform(*gaps_s) * SAMPLE_RATE)), load_row(row)])
    return wav


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("manifest", type=Path, help="JSON lines: id, audio, duration, text, and speaker where known")
    parser.add_argument("--split", help="only the rows of this split")
    parser.add_argument("--fewest", type=at_least(1), default=3, help="utterances of the shortest string")
    parser.add_argument("--most", type=at_least(1), default=8, help="utterances of the longest string")
    parser.add_argument("--gap_low_s", type=float, default=0.05, help="shortest pause, in seconds")
    parser.add_argument("--gap_high_s", type=float, default=0.3, help="longest pause, in seconds")
    parser.add_argument("--passes", type=at_least(1), default=1, help="how often each utterance is used")
    parser.add_argument("--count", type=at_least(1), help="maximum number of strings")
    parser.add_argument("--seed", type=int, default=1986)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for low, high in (("fewest", "most"), ("gap_low_s", "gap_high_s")):
        if not 0 <= getattr(args, low) <= getattr(args, high) < math.inf:
            raise UserError(f"--{low} {getattr(args, low)}: expected a value from 0 to --{high} {getattr(args, high)}")
    rows = [row for row in read_manifest(args.manifest) if args.split in (None, row.get("split"))]
    if not rows:
        raise UserError(f"--split: {args.manifest} has no rows of split '{args.split}'")
    check_writable(args.out / "audio", "--out")
    rng, written = random.Random(args.seed), []
    groups = list(strings_of(rows, args.passes, args.fewest, args.most, rng))[: args.count]
    for number, group in enumerate(tqdm(groups, desc=f"joining {args.out.name}", unit="utt", leave=False)):
        wav = join(group, (args.gap_low_s, args.gap_high_s), rng)
        soundfile.write(args.out / "audio" / f"{number:05d}.flac", wav.numpy(), SAMPLE_RATE)
        line = {key: group[0][key] for key in ("language", "speaker", "split", "licence") if key in group[0]}
        line |= {"id": f"joined-{number:05d}", "audio": f"audio/{number:05d}.flac"}
        line |= {"duration": round(len(wav) / SAMPLE_RATE, 4), "text": " ".join(row["text"] for row in group)}
        written.append(line | {"joined": [row["id"] for row in group]})
    write_manifest(args.out / "manifest.jsonl", written)
    print(f"{len(written)} utterances: {args.out / 'manifest.jsonl'}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
