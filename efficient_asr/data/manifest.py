"""Manifests: JSON lines with one utterance per line. CSV and TSV files with a header and JSON arrays are supported too.

A line has `id`, `audio` (absolute, or relative to the manifest), `duration` in seconds, `text`, and optionally `language` and
`speaker`; all other fields are kept. A line with `offset` (or `start`) describes a segment of its file, which lasts `duration`
seconds, or until `end`, or to the end of the file. Reading a manifest checks all of it, but its lines are loaded only when they
are accessed, so that a million lines take little memory.
"""

from __future__ import annotations

import json
import math
import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from efficient_asr.data.audio import silence
from efficient_asr.data.checking import check_files
from efficient_asr.data.tables import MAX_LINE_BYTES, check_manifest, lines_of, read_number
from efficient_asr.text.languages import has_code_form, normalise_language
from efficient_asr.utils.distributed import if_main_process
from efficient_asr.utils.errors import UserError, did_you_mean, listing
from efficient_asr.utils.files import atomic_write

FIELDS = ("id", "audio", "duration", "text", "language", "speaker", "offset", "end")
# Alternative names of fields.
_NAMES = {"offset": ["offset", "start", "start_time", "start_s", "begin"], "end": ["end", "end_time", "end_s"]}
SEGMENT_FIELDS = (*_NAMES["offset"], *_NAMES["end"])  # fields that say which part of a file a row is
ORIGIN, BROKEN = "_efficient_asr_origin", "_efficient_asr_broken"  # set on rows during corpus preparation
LEVELS = ("header", "samples")
Row = dict[str, Any]


class Rows(Sequence[Row]):
    """Utterances that are loaded when they are accessed.

    Arguments
    ---------
    read : callable
        Maps the index of an utterance to its row.
    durations : numpy.ndarray
        Durations of all utterances in seconds, [count].
    index : numpy.ndarray, optional
        Indices of the utterances to include, in order; None for all.
    """

    def __init__(self, read: Callable[[int], Row], durations: np.ndarray, index: np.ndarray | None = None) -> None:
        self._read, self._durations = read, durations
        self._index = np.arange(len(durations)) if index is None else index

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Rows:
        """Wrap utterances that are already in memory."""
        rows = list(rows)
        return cls(rows.__getitem__, np.array([row["duration"] for row in rows], dtype=np.float64))

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, item: int | slice) -> Any:
        if isinstance(item, slice):
            return Rows(self._read, self._durations, self._index[item])
        return self._read(int(self._index[item]))

    @property
    def durations(self) -> np.ndarray:
        """Durations in seconds, [count]."""
        return self._durations[self._index]

    def select(self, which: np.ndarray | Sequence[int]) -> Rows:
        """Return the utterances with the given indices, in that order."""
        return Rows(self._read, self._durations, self._index[np.asarray(which, dtype=np.int64)])

    def map(self, change: Callable[[Row], Row]) -> Rows:
        """Return the utterances with `change` applied when they are loaded; it must not change durations."""
        return Rows(partial(_changed, self._read, change), self._durations, self._index)


def _changed(read: Callable[[int], Row], change: Callable[[Row], Row], number: int) -> Row:
    return change(read(number))


def write_manifest(path: Path, rows: Iterable[Row]) -> Path:
    """Write rows as JSON lines; the file is written atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial_path, open(partial_path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def check_columns(columns: dict[str, Any] | None) -> dict[str, list[str]]:
    """Return a full column mapping: manifest field -> column names, of which the first one present is used.

    Raises
    ------
    UserError
        If a key is not a manifest field, or a value is not a column name or a list of column names.
    """
    if columns is not None and not isinstance(columns, dict):
        raise UserError(f"columns must map manifest fields to column names, not {columns!r}")
    for key in columns or {}:
        if key not in FIELDS:
            raise UserError(
                f"columns: '{key}' is not a manifest field ({', '.join(FIELDS)}).{did_you_mean(str(key), FIELDS)}"
            )
    wanted = {field: _NAMES.get(field, [field]) for field in FIELDS}
    for name, names in (columns or {}).items():
        if not isinstance(names, (str, list)) or not all(isinstance(n, str) for n in names):
            raise UserError(f"columns: {name} must be a column name or a list of them, not {names!r}")
        wanted[name] = [names] if isinstance(names, str) else list(names)
    return wanted


def parse_line(line: bytes | ValueError | None, folder: str, columns: dict[str, list[str]], need_text: bool) -> Row:
    """Parse a line from `lines_of` and check everything except the audio itself; `audio` becomes an absolute path.

    Raises
    ------
    ValueError
        Describing the problem.
    """
    if line is None:
        raise ValueError(f"longer than {MAX_LINE_BYTES} bytes, the maximum for one line")
    if isinstance(line, ValueError):
        raise line
    try:
        text = line.decode("utf-8")
        raw = json.loads(text)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None
    except (RecursionError, ValueError) as error:
        raise ValueError(f"invalid JSON ({type(error).__name__})") from None
    if not isinstance(raw, dict):
        raise ValueError("not a JSON object")
    if BROKEN in raw:  # detected during corpus preparation
        raise ValueError(raw[BROKEN])
    if "\\u" in text:
        _check_surrogates(raw)
    row = dict(raw)
    for name, names in columns.items():
        given = [raw[n] for n in names if raw.get(n) is not None]
        value = next((each for each in given if not isinstance(each, str) or each.strip()), given[0] if given else None)
        row.pop(name, None)
        if value is not None:
            row[name] = value
    if "audio" not in row:
        raise ValueError(f"no audio: there is no column {' or '.join(map(repr, columns['audio']))}")
    if not isinstance(row["audio"], str) or not row["audio"] or "\0" in row["audio"]:
        raise ValueError(f"audio {row['audio']!r} is not a path")
    _check_times(row)
    if "id" not in row:
        row["id"] = row["audio"]
        if "offset" in row:
            row["id"] += f"#{row['offset']:g}" + (f"+{row['duration']:g}" if "duration" in row else "")
    if isinstance(row["id"], (dict, list, bool)) or row["id"] == "":
        raise ValueError(f"invalid id {row['id']!r}; use a non-empty string or a number")
    row["id"] = str(row["id"])
    row["audio"] = os.path.join(folder, row["audio"])
    if need_text:
        _check_text(row.get("text"), columns)
    if not isinstance(row.get("language", ""), str):
        raise ValueError(f"language {row['language']!r} is not a string")
    if row.get("language", "").strip():
        try:
            row["language"] = normalise_language(row["language"])
        except UserError as error:
            row["language"] = row["language"].strip().lower()
            if not has_code_form(row["language"]):
                raise ValueError(f"language {error}") from None
    else:
        row.pop("language", None)
    return row


def _check_times(row: Row) -> None:
    """Check the times of a row and convert them to `offset` and `duration`; a whole file has no `offset`."""
    times = {}
    for name in ("offset", "duration", "end"):
        value = read_number(row.get(name))
        if value is None:
            row.pop(name, None)
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not (0 <= value < 1e15 if name == "offset" else 0 < value < 1e15):
            least = "number of seconds >= 0" if name == "offset" else "positive number of seconds"
            hint = "; if it does not describe a segment, rename the column" if name != "duration" else ""
            raise ValueError(f"{name} {row[name]!r} is not a {least}{hint}")
        times[name] = value
    if "offset" in times and times.get("duration", 1.0) < 1e-3:
        raise ValueError(f"duration {times['duration']} s is too short for a segment")
    if "end" in times:
        row.pop("end")
        length = times["end"] - times.setdefault("offset", 0.0)
        if length <= 0:
            raise ValueError(f"end {times['end']} s is not after offset {times['offset']} s")
        if abs(length - times.setdefault("duration", length)) > 0.05:
            raise ValueError(
                f"duration {times['duration']} s, but the segment from {times['offset']} to {times['end']} s lasts {length:.3f} s"
            )
    row |= {name: times[name] for name in ("offset", "duration") if name in times}


def _check_text(text: Any, columns: dict[str, list[str]]) -> None:
    if text is None:
        raise ValueError(f"no text: there is no column {' or '.join(map(repr, columns['text']))}")
    if not isinstance(text, str):
        raise ValueError(f"text {text!r} is not a string")
    if not text.strip():
        raise ValueError("empty text")


def _check_surrogates(raw: dict[str, Any]) -> None:
    try:
        json.dumps(raw, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("contains half of a surrogate pair, which is not valid Unicode") from None


@dataclass
class _Lines:
    """Positions of the valid lines in a manifest file; calling it with an index loads one line."""

    path: Path
    columns: dict[str, list[str]]
    need_text: bool
    offsets: array = field(default_factory=lambda: array("q"))
    sizes: array = field(default_factory=lambda: array("q"))
    numbers: array = field(default_factory=lambda: array("q"))
    durations: array = field(default_factory=lambda: array("d"))  # NaN if the manifest gives none
    kept: list[bytes] | None = None  # the lines of a manifest that is not JSON lines
    descriptor: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"descriptor": None}

    def __del__(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)

    def __call__(self, i: int) -> Row:
        if self.kept is not None:
            line = self.kept[i]
        else:
            if self.descriptor is None:
                self.descriptor = os.open(self.path, os.O_RDONLY)
            line = os.pread(self.descriptor, self.sizes[i], self.offsets[i])
        try:
            row = parse_line(line, str(self.path.parent), self.columns, self.need_text)
        except ValueError as error:
            raise UserError(
                f"{self.path}, line {self.numbers[i]}, has changed since it was checked ({error}); rerun the command"
            ) from None
        if not math.isnan(self.durations[i]):
            row["duration"] = self.durations[i]
        return row


def _scan(lines: _Lines, problems: dict[int, str]) -> dict[int, str | None]:
    """Read all lines; add valid ones to `lines`, and the problems of bad ones to `problems`, by line number.

    Returns the origins of the bad lines, if the corpus recorded them.
    """
    first: dict[int, int] = {}  # hash of an id -> its index in `lines`
    origins: dict[int, str | None] = {}
    folder = str(lines.path.parent)
    for number, start, data in lines_of(lines.path):
        try:
            row = parse_line(data, folder, lines.columns, lines.need_text)
            place = first.get(hash(row["id"]))
            earlier = lines(place) if place is not None else {}
            if earlier.get("id") == row["id"]:
                where = earlier.get(ORIGIN) or f"line {lines.numbers[place]}"
                raise ValueError(f"id '{row['id']}' was already used in {where}")
        except ValueError as error:
            problems[number] = str(error)
            origins[number] = _origin(data)
            continue
        first.setdefault(hash(row["id"]), len(lines.offsets))
        if start is None:
            lines.kept = lines.kept or []
            lines.kept.append(data)
        lines.offsets.append(start or 0)
        lines.sizes.append(len(data))
        lines.numbers.append(number)
        lines.durations.append(row.get("duration", math.nan))
    return origins


def _origin(line: bytes | None) -> str | None:
    """Return the origin of a line of a prepared manifest, if the corpus recorded it."""
    try:
        return json.loads(line).get(ORIGIN)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None  # not even JSON


def read_manifest(
    path: Path,
    columns: dict[str, Any] | None = None,
    need_text: bool = True,
    skip_bad: bool | None = None,
    skipped_file: Path | None = None,
    check_audio: str = "header",
    refuse_silence: bool = False,
    cache: Path | None = None,
) -> Rows:
    """Read and check a manifest.

    Arguments
    ---------
    path : Path
        The manifest: JSON lines, CSV, TSV or a JSON array.
    columns : dict, optional
        Manifest field -> column name, or a list of names of which the first one present is used.
    need_text : bool
        Whether an utterance without text is an error.
    skip_bad : bool or None
        Skip bad lines instead of raising an error. None raises it, and does not suggest the option, for commands without one.
    skipped_file : Path, optional
        File to which `skip_bad` writes the skipped lines and their problems, as JSON lines.
    check_audio : str
        `header` reads the header of every audio file; `samples` decodes all of them, in parallel.
    refuse_silence : bool
        Whether silent audio is an error (only detected by `samples`).
    cache : Path, optional
        File that caches the check results, so that unchanged files are not checked again.

    Returns
    -------
    Rows
        The utterances, with `audio` as an absolute path.

    Raises
    ------
    UserError
        If the file is missing, has no usable utterance, or has bad lines and `skip_bad` is False; bad lines are listed.
    """
    path = Path(path).absolute()
    if check_audio not in LEVELS:
        raise UserError(f"check_audio: '{check_audio}' is not one of {', '.join(LEVELS)}")
    check_manifest(path)
    lines = _Lines(path, check_columns(columns), need_text)
    problems: dict[int, str] = {}
    try:
        origins = _scan(lines, problems)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    found = check_files(lines, lines.durations, check_audio == "samples", cache, path.name)
    durations = np.array(found.durations, dtype=np.float64)
    for i, problem in found.problems.items():
        problems[lines.numbers[i]] = problem
    for i in found.silent if refuse_silence else []:
        problems[lines.numbers[i]] = silence(lines(i)["audio"], i in found.cancelled)
    good = np.array([i for i, number in enumerate(lines.numbers) if number not in problems], dtype=np.int64)
    for number in sorted(problems):
        if number not in origins:
            i = np.searchsorted(np.frombuffer(lines.numbers, dtype=np.int64), number) if len(lines.numbers) else 0
            known = i < len(lines.numbers) and lines.numbers[i] == number
            origins[number] = lines(i).get(ORIGIN) if known else None
    bad = [{"line": n, "origin": origins[n], "problem": problems[n]} for n in sorted(problems)]
    if bad and not skip_bad:
        shown = listing([f"{b['origin'] or 'line ' + str(b['line'])}: {b['problem']}" for b in bad])
        advice = "Fix them." if skip_bad is None else "Fix them, or skip them with --skip_bad True."
        raise UserError(f"{len(bad)} bad line{'s' * (len(bad) > 1)} in {path}:\n{shown}\n{advice}")
    if bad:
        report_skipped(path.name, bad, skipped_file)
    if not len(good):
        raise UserError(f"{path} holds no usable utterance")
    for what, which in (("silent", () if refuse_silence else found.silent), ("clipped", found.clipped)):
        if which:
            names = ", ".join(lines(i)["id"] for i in which[:3])
            print(f"{path.name}: {len(which)} of {len(good)} utterances are {what} (such as {names}); they are kept")
    lines.durations = array("d", durations.tobytes())
    return Rows(lines, durations, good)


def report_skipped(what: str, bad: list[dict[str, Any]], skipped_file: Path | None) -> None:
    """Print the number of skipped utterances, and write them to `skipped_file` if given."""
    if not if_main_process():  # all ranks have the same list
        return
    where = ""
    if skipped_file is not None:
        write_manifest(skipped_file, bad)
        where = f"; listed in {skipped_file}"
    print(f"{what}: {len(bad)} bad utterance{'s' * (len(bad) > 1)} left out{where}")
