"""Transcribe audio files of any length and format.

    efficient-asr transcribe MODEL a.wav b.flac                             # one JSON line per recording
    efficient-asr transcribe MODEL recordings/ --out transcripts.csv        # a folder, into one table
    efficient-asr transcribe WHISPER 'talks/*.m4a' --out subtitles/ --format srt --language en
    efficient-asr transcribe MODEL calls/ --channels split --names agent customer --out calls.json
    efficient-asr transcribe CTC_MODEL a.wav --lm 4gram.arpa --lm_case upper
    efficient-asr transcribe MODEL --manifest rows.jsonl --columns '{audio: path}' --out rows_with_hypotheses.jsonl

MODEL is the model folder written by a recipe, or a Whisper directory or hub id. Recordings that cannot be read are reported on
standard error; the others are still transcribed. With --out, rerun an interrupted command to resume it. With --manifest, JSON
lines with one utterance each (or CSV, TSV) are read; every row is written again, with its transcript in another field.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from efficient_asr import load_transcriber
from efficient_asr.data import (
    SAMPLE_RATE,
    inspect_audio,
    load_audio,
    load_channels,
    pad_wavs,
    read_manifest,
    silence,
)
from efficient_asr.data.audio import SILENT_PEAK
from efficient_asr.evaluation.manifest_transcripts import write_transcripts
from efficient_asr.inference.formats import (
    COLLECTED,
    FORMATS,
    SEPARATE,
    TIMED,
    format_record,
    format_records,
    rounded,
)
from efficient_asr.inference.recordings import find_audio, transcribe_parties, transcribe_timed
from efficient_asr.inference.transcriber import Transcriber
from efficient_asr.inference.transcript import Transcript
from efficient_asr.models.hub import model_source
from efficient_asr.models.sources import fingerprint, with_contents
from efficient_asr.settings.options import (
    add_lm_options,
    add_whisper_options,
    at_least,
    lm_options,
    parse_columns,
    whisper_options,
    yes_or_no,
)
from efficient_asr.utils.devices import choose_device
from efficient_asr.utils.errors import UserError, check_writable, print_json
from efficient_asr.utils.files import LineStore, atomic_write_text, is_unchanged, state_of
from efficient_asr.utils.progress import AudioProgress


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the options."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument(
        "audio", nargs="*", metavar="AUDIO",
        help="files in any format that libsndfile or FFmpeg can read, folders (searched recursively), or patterns in quotes",
    )  # fmt: skip
    parser.add_argument(
        "--manifest", type=Path, help="JSON lines: audio, and optionally id, duration, offset, language"
    )
    parser.add_argument("--columns", default="{}", help="with --manifest: custom column names, e.g. '{audio: path}'")
    parser.add_argument(
        "--output_column", default="hypothesis", help="with --manifest: field for the transcripts (default hypothesis)"
    )
    parser.add_argument(
        "--skip_bad", type=yes_or_no, nargs="?", const=True, default=False, help="with --manifest: skip bad lines"
    )
    parser.add_argument("--out", type=Path, help="file, or folder for one file per recording (default: print)")
    parser.add_argument(
        "--format", choices=FORMATS, help="default: that of the ending of --out, otherwise jsonl; txt, srt and vtt are one "
        "file per recording"
    )  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda or cuda:1; default: the GPU if there is one")
    parser.add_argument(
        "--batch_size",
        type=at_least(1),
        default=1,
        help="recordings transcribed together, unless times are asked for or channels split (default 1)",
    )
    parser.add_argument(
        "--channels", default="mix", help="mix: average all channels (default); split: transcribe each channel on its own, as "
        "for a call with one party per channel; or the number of one channel, counted from 0"
    )  # fmt: skip
    parser.add_argument(
        "--names", nargs="+", default=[], help="with --channels split: names of the parties, such as agent customer"
    )
    add_lm_options(parser)
    add_whisper_options(parser)
    args = parser.parse_args(argv)
    if bool(args.audio) == (args.manifest is not None):
        raise UserError("AUDIO, --manifest: give either audio files, or a manifest")
    args.device = choose_device(args.device)
    if args.manifest is not None:
        _check_for_manifest(args)
        return args
    _check_for_audio(args, {name: parser.get_default(name) for name in ("columns", "output_column", "skip_bad")})
    if args.format is None:
        ending = args.out.suffix.lower()[1:] if args.out and not args.out.is_dir() else ""
        if ending and ending not in FORMATS:
            raise UserError(f"--out: no format is called '{ending}'; give one of {', '.join(FORMATS)} with --format")
        args.format = ending or "jsonl"
    args.timed = bool(args.timestamps) or args.format in TIMED
    return args


def _check_for_audio(args: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """Check the options of a command with audio files; `defaults` are those of the options for manifests.

    Raises
    ------
    UserError
        Naming the option that does not suit.
    """
    for option, default in defaults.items():
        if getattr(args, option) != default:
            raise UserError(f"--{option} requires --manifest")
    if args.language == "manifest":
        raise UserError("--language manifest: audio files have no manifest; give the language, or omit --language")
    if args.channels not in ("mix", "split") and not args.channels.isdecimal():
        raise UserError(f"--channels: '{args.channels}' is not mix, split or the number of a channel")
    if args.names and args.channels != "split":
        raise UserError("--names requires --channels split")


def _check_for_manifest(args: argparse.Namespace) -> None:
    """Check the options of a command with a manifest.

    Raises
    ------
    UserError
        Naming the option that does not suit.
    """
    if args.out is None or args.out.suffix != ".jsonl" or args.format not in (None, "jsonl"):
        raise UserError("--out: the rows of a manifest are written as JSON lines; give a file that ends in .jsonl")
    if args.out.absolute() == args.manifest.absolute():
        raise UserError("--out: it is the manifest itself; give another file")
    if args.channels != "mix" or args.names:
        raise UserError("--channels, --names: utterances of a manifest are mixed to one channel; leave them out")


class Output:
    """Where transcripts go: printed, one file, or one file for each recording.

    Arguments
    ---------
    args : argparse.Namespace
        The options.
    recordings : list of tuple of Path
        Recordings with their relative paths.
    key : str
        Identifies the model and the options; transcripts of an interrupted command with the same key are kept.
    """

    def __init__(self, args: argparse.Namespace, recordings: list[tuple[Path, Path]], key: str) -> None:
        self.format, self.out = args.format, args.out
        if self.out and not self.out.name:  # the current folder, `.`
            self.out = self.out.absolute()
        self.by_segment = bool(args.timestamps) or args.channels == "split"
        self.records: dict[str, dict[str, Any]] = {}
        self.targets = self._targets(recordings) if self.out and self.format in SEPARATE else {}
        if not self.out:
            if self.format in TIMED and len(recordings) > 1:
                raise UserError(f"--format {self.format}: give a folder for {len(recordings)} recordings with --out")
            return
        if self.format in COLLECTED and (self.out.is_dir() or not self.out.suffix):
            self.out = self.out / f"transcripts.{self.format}"
        check_writable(self.out.parent, "--out")
        store = self.out.with_name(f"{self.out.name}.partial.jsonl")
        self.store = LineStore(store, {"key": key}, self._known)

    def _targets(self, recordings: list[tuple[Path, Path]]) -> dict[Path, Path]:
        """Return the file of each recording; recordings that differ only in their ending keep it."""
        if len(recordings) == 1 and self.out.suffix.lower() == f".{self.format}":
            return {recordings[0][0]: self.out}
        if self.out.is_file():
            raise UserError(
                f"--out: {self.out} is a file; {self.format} needs a folder, or one recording and a .{self.format} file"
            )
        if self.out.suffix.lower()[1:] in FORMATS:
            raise UserError(
                f"--out: {self.out} is not a folder; {len(recordings)} recordings need a folder for their .{self.format} files"
            )
        count = Counter(relative.with_suffix("") for _, relative in recordings)
        names = {
            path: relative.with_suffix("") if count[relative.with_suffix("")] == 1 else relative
            for path, relative in recordings
        }
        if len({*names.values()}) < len(names):
            raise UserError("--out: several recordings have the same name; give the folder that contains them")
        return {path: self.out / f"{name}.{self.format}" for path, name in names.items()}

    def _known(self, line: dict[str, Any], *_: int) -> None:
        if is_unchanged(line["record"]["audio"], line["file"]):
            self.records[line["record"]["audio"]] = line["record"]

    def add(self, record: dict[str, Any], state: str | None) -> None:
        """Keep a transcript with the state that its file had before it was read, or print it."""
        self.records[record["audio"]] = record
        if self.out:
            self.store.append({"record": record, "file": state})
        elif self.format == "jsonl":
            print_json(record)
        elif self.format in SEPARATE:
            print(format_record(record, self.format), end="", flush=True)

    def finish(self, order: list[Path], failed: int) -> None:
        """Write the files, in the order of the recordings; if some failed, keep what a rerun needs."""
        records = [self.records[str(path)] for path in order if str(path) in self.records]
        if not self.out:
            if self.format in ("json", "csv"):
                print(format_records(records, self.format, self.by_segment), end="")
            return
        if self.format in COLLECTED:
            atomic_write_text(self.out, format_records(records, self.format, self.by_segment))
        for record in records if self.format in SEPARATE else ():
            target = self.targets[Path(record["audio"])]
            target.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(target, format_record(record, self.format))
        self.store.close()
        if not failed:
            self.store.path.unlink(missing_ok=True)
        print(f"{len(records)} transcripts: {self.out}", file=sys.stderr)


def read(path: Path, channels: str) -> torch.Tensor:
    """Read a recording: [time], or [channels, time] with `split`; warn if it is silent."""
    if channels == "mix":
        wav = load_audio(path)
    else:
        wav = load_channels(path)
        if channels != "split" and int(channels) >= len(wav):
            raise UserError(f"there is no channel {channels}: the file has {len(wav)}, counted from 0")
        if channels == "split" and len(wav) == 1:
            print(f"warning: {path} has one channel, so its parties cannot be told apart", file=sys.stderr)
        wav = wav if channels == "split" else wav[int(channels)]
    if not wav.numel() or float(wav.abs().max()) < SILENT_PEAK:
        cancelled = channels == "mix" and inspect_audio(path, samples=True).cancelled
        print(f"warning: {silence(path, cancelled)}", file=sys.stderr)
    return wav


def transcribe(transcriber: Transcriber, args: argparse.Namespace, wavs: list[torch.Tensor]) -> list[Transcript]:
    """Transcribe recordings, each [time] or [channels, time]."""
    if args.channels == "split":
        return [transcribe_parties(transcriber, wav, args.names) for wav in wavs]
    if args.timed:
        return [transcribe_timed(transcriber, wav) for wav in wavs]
    return transcriber.transcribe(*pad_wavs(wavs))


def checked_name(path: Path) -> Path:
    """Return a path if it can be written in UTF-8.

    Raises
    ------
    UserError
        If it cannot, as names from an archive in another encoding.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{str(path)!a}: the name is not UTF-8, and cannot be written; rename the file") from None
    return path


def report(path: Path, error: UserError) -> None:
    """Print the error of one recording, above the progress bar."""
    tqdm.write(f"error: {error}" if str(path) in str(error) else f"error: {path}: {error}", file=sys.stderr)


def process(transcriber: Transcriber, args: argparse.Namespace, paths: list[Path], output: Output) -> int:
    """Transcribe some recordings together; return the number of those that could not be read or transcribed."""
    wavs: dict[Path, torch.Tensor] = {}
    failed, states = 0, {path: state_of(path) for path in paths}
    for path in paths:
        try:
            wavs[checked_name(path)] = read(path, args.channels)
        except UserError as error:
            failed += 1
            report(path, error)
    try:
        transcripts = transcribe(transcriber, args, list(wavs.values())) if wavs else []
    except UserError as error:
        if len(wavs) > 1:  # find out which one it is
            return failed + sum(process(transcriber, args, [path], output) for path in wavs)
        report(next(iter(wavs)), error)
        return failed + 1
    for (path, wav), transcript in zip(wavs.items(), transcripts, strict=True):
        length = {"duration_s": wav.shape[-1] / SAMPLE_RATE}
        record = rounded({"audio": str(path), "text": transcript.text, **length, **transcript.details})
        output.add(record, states[path])
    return failed


def _transcribe_manifest(args: argparse.Namespace) -> None:
    """Transcribe the utterances of a manifest."""
    columns, skipped = parse_columns(args.columns), args.out.with_suffix(".skipped.jsonl")
    check_writable(args.out.absolute().parent, "--out")
    rows = read_manifest(args.manifest, columns=columns, need_text=False, skip_bad=args.skip_bad, skipped_file=skipped)
    options, source = whisper_options(args) | lm_options(args), model_source(args.model)
    key = [fingerprint(source), with_contents(options), args.output_column, args.batch_size]
    digest = hashlib.sha256(repr(key).encode())
    for row in rows:
        parts = (row["id"], row["audio"], row.get("offset"), row["duration"], row.get("language"))
        digest.update(f"{parts}\n".encode())
    transcriber = load_transcriber(source, **options).to(args.device)
    bad = write_transcripts(
        transcriber, rows, args.out, digest.hexdigest(), args.output_column, args.batch_size, args.skip_bad
    )
    if bad:
        print(
            f"{bad} of {len(rows)} utterances could not be read; they have a field '{args.output_column}_problem'",
            file=sys.stderr,
        )
    print(f"{len(rows) - bad} transcripts: {args.out}", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = parse(argv)
    if args.manifest is not None:
        _transcribe_manifest(args)
        return
    recordings = find_audio(args.audio)
    decoding = {key: value for key, value in whisper_options(args).items() if key != "timestamps"} | lm_options(args)
    source = model_source(args.model)
    key = [fingerprint(source), with_contents(decoding), args.channels, args.names, args.timed]
    output = Output(args, recordings, hashlib.sha256(repr(key).encode()).hexdigest())
    missing = [path for path, _ in recordings if str(path) not in output.records]
    if len(missing) < len(recordings):
        print(f"{len(recordings) - len(missing)} of {len(recordings)} are already transcribed", file=sys.stderr)
    transcriber = load_transcriber(source, **decoding).to(args.device)
    failed = 0
    shown = sys.stderr.isatty()  # otherwise there is no bar, and no need to read all headers first
    lengths_s = [inspect_audio(path, samples=False).duration_s if shown else 0.0 for path in missing]
    with AudioProgress(sum(lengths_s), "transcribing", leave=False, disable=not shown) as progress:
        for start in range(0, len(missing), args.batch_size):
            failed += process(transcriber, args, missing[start : start + args.batch_size], output)
            progress.advance(sum(lengths_s[start : start + args.batch_size]))
    output.finish([path for path, _ in recordings], failed)
    if failed:
        hint = "; a rerun transcribes only these" if args.out else ""
        raise UserError(f"{failed} of {len(recordings)} files could not be transcribed{hint}")
