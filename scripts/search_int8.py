"""Find the layers of a Whisper that int8 weights harm, and write a selection of the others.

    python scripts/search_int8.py WHISPER --calibration recordings.jsonl --language en --out int8-tiny.json
    python scripts/search_int8.py WHISPER --calibration recordings.jsonl --manifest test.jsonl --language en --out int8-tiny.json
    efficient-asr evaluate WHISPER --manifest test.jsonl --quantise int8-tiny.json --out result.json

Every block of a layer is quantised alone, and the divergence of the output distributions is measured on the recordings, whose
texts are not used (efficient_asr/techniques/int8_search/search.py). Then as many blocks as possible are chosen within a
budget. With --manifest, the float model, int8 decoder, full int8 and the selection transcribe it, and their WER and time are
added to the file. Rerun the command to resume: divergences that are known are not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from efficient_asr.data import Row, iterate_batches, load_row, read_manifest
from efficient_asr.evaluation.comparison import manifest_names
from efficient_asr.evaluation.result import provenance
from efficient_asr.evaluation.wer import compared, count_errors
from efficient_asr.inference.transcriber import transcribe_rows
from efficient_asr.inference.whisper import WhisperTranscriber
from efficient_asr.models.hub import model_source
from efficient_asr.models.sources import fingerprint
from efficient_asr.settings.options import at_least
from efficient_asr.techniques.int8_search.search import Sensitivity, observe, search
from efficient_asr.text.languages import normalise_or_keep
from efficient_asr.text.normalise import get_normaliser, whisper_normaliser
from efficient_asr.utils.errors import UserError, check_writable, exit_code
from efficient_asr.utils.files import LineStore, atomic_write_text

CHECKED = (None, "decoder-int8", "int8")  # beside the selection


def select(args: argparse.Namespace) -> dict[str, Any]:
    """Return the selection of layers, and what it was chosen by."""
    transcriber = WhisperTranscriber.from_source(
        model_source(args.model), args.language, encoder_padding=30.0, max_tokens_per_s=8.0
    )
    if transcriber.languages and transcriber.language is None:
        raise UserError(f"--language: {args.model} knows several languages; name that of the recordings")
    rows = list(read_manifest(args.calibration, need_text=False))
    rows = [row for row in rows if row["duration"] < transcriber.window_s - 1][: args.utterances]
    if not rows:
        raise UserError(f"--calibration: {args.calibration} has no recording that fits into the model's window")
    wavs = [load_row(row) for row in rows]
    texts = [transcriber.transcribe(wav[None])[0].text for wav in tqdm(wavs, desc="texts of the float model")]
    divergence = Sensitivity(
        transcriber.model, observe(transcriber.model, wavs, texts, transcriber.language), transcriber.language
    )
    key = {
        "model": fingerprint(model_source(args.model)),
        "recordings": [[row["id"], row["duration"]] for row in rows],
        "language": args.language,
    }
    known: dict[tuple[str, ...], float] = {}  # also of an interrupted search
    lines = LineStore(
        args.out.with_suffix(".part.jsonl"),
        key,
        lambda record, *_: known.update({tuple(record["groups"]): record["nats"]}),
    )

    def measure(groups: Iterable[str]) -> float:
        groups = tuple(groups)
        if groups not in known:
            known[groups] = divergence(groups)
            lines.append({"groups": groups, "nats": known[groups]})
        return known[groups]

    with lines, tqdm(total=len(divergence.groups), desc="blocks", unit="block") as progress:

        def report(group: str, nats: float) -> None:
            progress.update()
            tqdm.write(f"{group:40} {nats:.6f} nats a token", file=sys.stderr)

        alone, chosen, together = search(measure, divergence.groups, args.budget_nats, report)
    return {
        "format": "efficient_asr int8 selection 1", "layers": sum(map(len, divergence.groups.values())),
        "model": Path(args.model).name,
        "modules": [name for group in chosen for name in divergence.groups[group]],
        "budget_nats": args.budget_nats, "kl_nats": together[len(chosen)], "recordings": len(rows),
        "blocks": [{"block": g, "kl_nats": n, "chosen": g in chosen} for g, n in sorted(alone.items(), key=lambda a: a[1])],
        "kl_nats_of_all": together[len(alone)],
    }  # fmt: skip


def check(args: argparse.Namespace, rows: list[Row]) -> list[dict[str, Any]]:
    """Return WER and time on rows of the float model, int8 modes and the selection."""
    language = normalise_or_keep(args.language or "en")
    normalise = get_normaliser(whisper_normaliser([language]))
    found, plain = [], None
    for mode in (*CHECKED, str(args.out)):
        transcriber = WhisperTranscriber.from_source(
            model_source(args.model), args.language, encoder_padding=30.0, quantise=mode, max_tokens_per_s=8.0
        )
        texts, start = [], time.perf_counter()
        for batch, wavs, wav_lens in tqdm(
            iterate_batches(rows, 1), total=len(rows), desc=transcriber.label, unit="utt"
        ):
            texts += [transcript.text for transcript in transcribe_rows(transcriber, batch, wavs, wav_lens)]
        pairs = [(normalise(a["text"], language), normalise(b, language)) for a, b in zip(rows, texts, strict=True)]
        errors = count_errors([a for a, _ in pairs], [b for _, b in pairs])
        plain = errors if plain is None else plain
        found.append({
            "mode": transcriber.model.quantised or "float32", **compared(plain, errors),
            "seconds": time.perf_counter() - start, "utterances": len(rows), "audio": manifest_names([args.manifest])[0],
        })  # fmt: skip
        print(f"{found[-1]['mode']:32} WER {found[-1]['wer_percent']:.2f} %, {found[-1]['seconds']:.0f} s")
    return found


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="WHISPER", help="Whisper directory, hub id, or model folder of a recipe")
    parser.add_argument("--calibration", type=Path, required=True, help="JSON lines: id, audio, duration")
    parser.add_argument(
        "--utterances", type=at_least(1), default=24, help="recordings of it, the first ones (default 24)"
    )
    parser.add_argument("--manifest", type=Path, help="JSON lines with texts, to check the WER on")
    parser.add_argument("--tested", type=at_least(1), default=60, help="utterances of it, the first ones (default 60)")
    parser.add_argument(
        "--budget_nats", type=float, default=0.005, help="divergence of all chosen blocks together, in nats a token"
    )
    parser.add_argument("--language", help="language of the audio, for models that know several")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the selection")
    args = parser.parse_args()
    check_writable(args.out.parent, "--out")
    if args.out.suffix != ".json":
        raise UserError(f"--out: {args.out} must end in .json")
    if args.budget_nats < 0:
        raise UserError("--budget_nats must be at least 0")
    rows = list(read_manifest(args.manifest))[: args.tested] if args.manifest is not None else []
    rows = sorted(rows, key=lambda row: row["duration"])
    result = select(args) | {"provenance": provenance(None)}
    atomic_write_text(args.out, json.dumps(result, indent=1) + "\n")
    count = sum(block["chosen"] for block in result["blocks"])
    nats = f"{result['kl_nats']:.5f} nats a token; all of them: {result['kl_nats_of_all']:.5f}"
    print(f"{count} of {len(result['blocks'])} blocks in int8: {nats}")
    if args.manifest is not None:
        result["check"] = check(args, rows)
        atomic_write_text(args.out, json.dumps(result, indent=1) + "\n")
    args.out.with_suffix(".part.jsonl").unlink(missing_ok=True)
    print(f"result: {args.out}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
