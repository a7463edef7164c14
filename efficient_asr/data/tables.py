"""Read the lines of manifests and tables (JSON lines, JSON arrays, CSV, TSV), with line numbers and problems."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from efficient_asr.utils.errors import UserError

MAX_LINE_BYTES = 1 << 20
TABLES = {".csv": ",", ".tsv": "\t"}  # delimiter by file extension
_OTHER_KINDS = {
    b"PAR1": "a Parquet file", b"PK\x03\x04": "a spreadsheet or a zip archive", b"\x1f\x8b": "compressed with gzip",
    b"\xff\xfe": "in UTF-16", b"\xfe\xff": "in UTF-16",
}  # fmt: skip
BOM = b"\xef\xbb\xbf"  # byte order mark that Windows editors write at the start


def check_manifest(path: Path) -> None:
    """Check that the manifest is a regular file, which can be read more than once.

    Raises
    ------
    UserError
        Describing what is at `path` instead.
    """
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(4)
        for beginning, kind in _OTHER_KINDS.items():
            if start.startswith(beginning):
                raise UserError(f"{path} is {kind}; save it as JSON lines, CSV or TSV in UTF-8")
        return
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a manifest")
    if path.exists():
        raise UserError(
            f"{path} is a pipe or a device, but a manifest is read more than once; write it to a file first"
        )
    raise UserError(f"no manifest at {path}")


def read_number(value: Any) -> Any:
    """Convert the text of a table cell to a number, and empty text to None; return any other value unchanged."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return float(value)
    except ValueError:
        return value


def lines_of(path: Path) -> Iterator[tuple[int, int | None, bytes | ValueError | None]]:
    """Yield the utterances of a manifest.

    Yields
    ------
    number : int
        Line number, from 1; for a JSON array, the number of the entry.
    offset : int or None
        Byte offset of the line in the file; None if the file is not in JSON lines format.
    line : bytes, ValueError or None
        A JSON object; or the problem of the line; or None if the line is too long.
    """
    if path.suffix.lower() in TABLES:
        for number, row in table_rows(path, TABLES[path.suffix.lower()]):
            yield number, None, row if isinstance(row, ValueError) else json.dumps(row, ensure_ascii=False).encode()
        return
    entries = _json_entries(path)
    if entries is not None:
        for number, entry in enumerate(entries, start=1):
            yield number, None, json.dumps(entry, ensure_ascii=False).encode("utf-8", "surrogatepass")
        return
    with open(path, "rb") as file:
        offset, number = 0, 0
        while data := file.readline(MAX_LINE_BYTES + 1):
            number, start = number + 1, offset
            offset += len(data)
            if len(data) > MAX_LINE_BYTES:
                while not data.endswith(b"\n") and (data := file.readline(MAX_LINE_BYTES)):
                    offset += len(data)
                yield number, start, None
                continue
            if number == 1 and data.startswith(BOM):
                data, start = data[len(BOM) :], start + len(BOM)
            if data.strip():
                yield number, start, data


def _json_entries(path: Path) -> list[Any] | None:
    """Return the entries of a file that is one JSON array, or one object of objects (id -> utterance, as in SpeechBrain).

    Return None for JSON lines.
    """
    with open(path, "rb") as file:
        first = file.read(4096).removeprefix(BOM).lstrip()[:1]
        if first != b"[" and not (first == b"{" and path.suffix.lower() == ".json"):
            return None
        try:
            file.seek(0)
            content = json.loads(file.read().removeprefix(BOM), object_pairs_hook=partial(_without_twins, path))
        except (ValueError, RecursionError):
            return None
    if isinstance(content, list) and all(isinstance(entry, dict) for entry in content):
        return content
    if isinstance(content, dict) and content and all(isinstance(entry, dict) for entry in content.values()):
        return [{"id": name} | entry for name, entry in content.items()]
    return None


def _without_twins(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; reject duplicate keys, whose first value would be lost silently."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise UserError(f"{path}: duplicate key '{twice}' in one JSON object")
    return found


def table_rows(
    path: Path, delimiter: str, columns: tuple[str, ...] | None = None, quoted: bool | None = None
) -> Iterator[tuple[int, dict[str, str] | ValueError]]:
    """Yield line number and cells of each line of a CSV or TSV file; for a bad line, its problem instead of the cells.

    Arguments
    ---------
    path : Path
        UTF-8 file, with or without a byte order mark.
    delimiter : str
        Separator of the cells.
    columns : tuple of str, optional
        Column names; None if the first line is a header.
    quoted : bool, optional
        Whether cells may be quoted, and may then contain delimiters and line breaks; None means yes for CSV, no for TSV.

    Raises
    ------
    UserError
        If the file cannot be read, or its header is invalid.
    """
    quoted = delimiter == "," if quoted is None else quoted
    try:
        content = path.read_bytes().removeprefix(BOM)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    lines = _quoted_lines(content, delimiter) if quoted else _plain_lines(content, delimiter)
    names = list(columns) if columns is not None else None
    for number, cells in lines:
        if names is None:
            if isinstance(cells, ValueError):
                raise UserError(f"{path}, line {number}: {cells}")
            names = [cell.strip() for cell in cells]
            if len(names) == 1 and names[0].count(";") and delimiter == ",":
                raise UserError(
                    f"{path}: the columns are separated by semicolons; save it with commas, or as .tsv with tabs"
                )
            if len({*names}) < len(names):
                raise UserError(f"{path}, line {number}: duplicate column in the header ({', '.join(names)})")
            continue
        if not isinstance(cells, ValueError) and len(cells) != len(names):
            cells = ValueError(
                f"{len(cells)} cells instead of {len(names)} ({', '.join(names)}); does a cell contain a "
                f"{'tab' if delimiter == chr(9) else 'delimiter'} or a line break?"
            )
        yield number, cells if isinstance(cells, ValueError) else dict(zip(names, cells, strict=True))


def _plain_lines(content: bytes, delimiter: str) -> Iterator[tuple[int, list[str] | ValueError]]:
    """Yield the cells of unquoted lines; only line feeds end a line."""
    for number, line in enumerate(content.split(b"\n"), start=1):
        line = line.removesuffix(b"\r")
        if not line.strip():
            continue
        try:
            yield number, line.decode("utf-8").split(delimiter)
        except UnicodeDecodeError:
            yield number, ValueError("not UTF-8")


def _holds_lines(cell: str, delimiter: str, columns: int) -> bool:
    """Whether the inner lines of a cell have as many delimiters as a row: then a quotation mark before them was not closed."""
    inner = cell.split("\n")[1:-1]
    return bool(inner) and all(line.count(delimiter) == columns - 1 for line in inner)


def _quoted_lines(content: bytes, delimiter: str) -> Iterator[tuple[int, list[str] | ValueError]]:
    """Yield the cells of lines in which cells may be quoted."""
    text = content.decode("utf-8", "surrogateescape")
    before = csv.field_size_limit(max(len(text), 1 << 17))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, ValueError(f"not CSV ({error})")
                continue
            if not any(cells):
                continue
            if len(cells) > 1 and any(_holds_lines(cell, delimiter, len(cells)) for cell in cells):
                lines = f"up to line {reader.line_num}"
                problem = (
                    f"unclosed quotation mark ({lines}), or lines in a cell that look like rows; write it in one line"
                )
                yield number, ValueError(problem)
                continue
            try:
                "".join(cells).encode("utf-8")
                yield number, cells
            except UnicodeEncodeError:
                yield number, ValueError("not UTF-8")
    finally:
        csv.field_size_limit(before)
