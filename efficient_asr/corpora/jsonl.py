"""jsonl: your own JSON Lines, used as they are; also CSV and TSV files with a header, and JSON arrays.

`data_folder` is a folder of manifests. Each `<split>.jsonl` is a split, unless its rows name their split in a field `split`. If
there is no JSON Lines file, all `.csv` files are taken, else all `.tsv` files, else all `.json` files. Alternatively, list the
files of every split yourself, relative to the folder or with their full path. Append `#name` to use only the rows of one split
(or `#language=fr`, or any other field; combine several with `&`), and `/3` after that to use every third of those rows:

    corpus_options:
        manifests: {train: [a.jsonl#train, more/b.jsonl], dev: [a.jsonl#dev], test: [c.jsonl]}
        columns: {audio: path, text: [sentence, text_machine]}

`columns` maps manifest fields to the names used in the files. If a list is given, the first name present in a row is used.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from efficient_asr.data import BROKEN, ORIGIN, TABLES, Row, check_columns, lines_of, parse_line
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.files import atomic_write, expanded


def _read(source: str, folder: Path, columns: dict[str, list[str]]) -> Iterator[Row]:
    """Read `file.jsonl`, `file.jsonl#split`, `file.jsonl#field=value&field=value/3` with mapped columns and absolute audio paths.

    Broken lines become rows that hold the error, which the manifest reader reports or skips.
    """
    name, split = _file_and_part(expanded(source), folder)
    split, _, every = split.partition("/")
    if every and (not every.isdigit() or int(every) < 1):
        raise UserError(f"'{source}': expected a split after # and, after a slash, a whole number of at least 1")
    wishes = [wish if "=" in wish else f"split={wish}" for wish in split.split("&") if wish]
    fields = [wish.split("=", 1) for wish in wishes]
    path, found = folder / name, 0
    if not path.is_file():
        raise UserError(f"no manifest at {path}")
    for number, _, line in lines_of(path):
        try:
            row = parse_line(line, str(path.absolute().parent), columns, need_text=False)
        except ValueError as error:
            row = {BROKEN: str(error)}
        if BROKEN not in row and any(str(row.get(field)) != value for field, value in fields):
            continue
        found += 1
        if every and found % int(every) != 1 % int(every):
            continue
        wanted = " or ".join(map(repr, columns["text"]))
        hint = (
            "" if "text" in row or columns["text"] == ["text"] or BROKEN in row else f" (there is no column {wanted})"
        )
        yield row | {ORIGIN: f"{path}:{number}{hint}"}
    if not found:
        raise UserError(f"{path} has no rows" + (f" with {' and '.join(wishes)}" if wishes else ""))


def _file_and_part(source: str, folder: Path) -> tuple[str, str]:
    """Split `file.jsonl#part`; names of files and folders may contain `#` too."""
    pieces = source.split("#")
    names = ["#".join(pieces[:count]) for count in range(len(pieces), 0, -1)]
    name = next((name for name in names if (folder / name).is_file()), pieces[0])
    return name, source[len(name) + 1 :]


class _Writers:
    """One file per split; the files get their final names once all of them are complete."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.stack, self.files = folder, stack, {}
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, split: str, row: Row) -> None:
        """Append a row."""
        if split not in self.files:
            if not _can_be_a_file(split):
                raise UserError(f"split '{split[:60]}' cannot be used as a file name; see {row[ORIGIN]}")
            path = self.stack.enter_context(atomic_write(self.folder / f"{split}.jsonl"))
            self.files[split]: TextIO = self.stack.enter_context(open(path, "w", encoding="utf-8"))
        self.files[split].write(json.dumps(row, ensure_ascii=False) + "\n")


def _can_be_a_file(split: str) -> bool:
    return split not in ("", ".", "..") and not {"/", "\0"} & set(split) and len(split.encode()) <= 200


def _by_split(path: Path, rows: Iterable[Row], writers: _Writers) -> None:
    """Write each row to its `split`, by default the file's name; broken rows go to all of the file's splits."""
    splits, broken = set(), []
    for row in rows:
        split = str(row.get("split") or path.stem)
        if BROKEN not in row and not _can_be_a_file(split):
            row = {BROKEN: f"split '{split[:60]}' cannot be used as a file name", ORIGIN: row[ORIGIN]}
        if BROKEN in row:
            broken.append(row)
        else:
            writers.write(split, row)
            splits.add(split)
    for split in sorted(splits) or [path.stem]:
        for row in broken:
            writers.write(split, row)


def _files_of_one_kind(folder: Path) -> list[Path]:
    """Return the manifests of a folder, all with the same ending; say which others are not used.

    Raises
    ------
    UserError
        If there are none.
    """
    endings = (".jsonl", *TABLES, ".json")
    found = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in endings and path.is_file()]
    if not found:
        raise UserError(f"data_folder: {folder} contains no {', '.join(endings[:-1])} or {endings[-1]} file")
    chosen = min((path.suffix.lower() for path in found), key=endings.index)
    files = [path for path in found if path.suffix.lower() == chosen]
    stems = {path.stem for path in files}
    if others := [path.name for path in found if path not in files and path.stem not in stems]:
        print(
            f"data_folder: {chosen} files are used; not used: {', '.join(others)} (name them in corpus_options: manifests)"
        )
    return files


def prepare(
    data_folder: str | None,
    out_folder: Path,
    manifests: dict[str, Any] | None = None,
    columns: dict[str, Any] | None = None,
) -> dict[str, Path]:
    """Write one manifest per split.

    Arguments
    ---------
    data_folder : str
        Folder of the manifests.
    out_folder : Path
        Output folder for `<split>.jsonl` with absolute audio paths.
    manifests : dict, optional
        Split -> file or list of files, relative to `data_folder`; None to use all files in the folder.
    columns : dict, optional
        Manifest field -> name or names in the files.

    Raises
    ------
    UserError
        If a folder, file, split or column is missing.
    """
    if not data_folder or not Path(data_folder).is_dir():
        raise UserError(f"data_folder: '{data_folder}' is not a folder; give the one that contains your .jsonl files")
    folder, mapping = Path(data_folder), check_columns(columns)
    if Path(out_folder).resolve() == folder.resolve():
        raise UserError(
            f"prepared_folder: {out_folder} is the data_folder, whose files would be overwritten; choose another one"
        )
    if manifests is not None and not isinstance(manifests, dict):
        raise UserError(f"corpus_options: manifests must map splits to files, not {manifests!r}")
    with ExitStack() as stack:
        writers = _Writers(Path(out_folder), stack)
        if manifests:
            for split, sources in manifests.items():
                several = [sources] if isinstance(sources, str) else sources
                if not isinstance(several, list) or not all(isinstance(source, str) for source in several):
                    raise UserError(
                        f"corpus_options: manifests: '{split}' must be a file or a list of files, not {sources!r}"
                    )
                for source in several:
                    for row in _read(source, folder, mapping):
                        writers.write(str(split), row)
        else:
            files = _files_of_one_kind(folder)
            for path in files:
                _by_split(path, _read(path.name, folder, mapping), writers)
    return {split: Path(out_folder) / f"{split}.jsonl" for split in writers.files}
