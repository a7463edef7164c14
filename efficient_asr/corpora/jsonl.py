"""jsonl: anyone's JSON lines, as they are.

`data_folder` is a folder of manifests: each `<split>.jsonl` is a split, or the rows name theirs in a field `split`. Or list
the files of every split yourself, from the same folder, with `#name` for the rows of one split only:

    corpus_options:
        manifests: {train: [a.jsonl#train, more/b.jsonl], dev: [a.jsonl#dev], test: [c.jsonl]}
        columns: {audio: path, text: [sentence, text_machine]}

`columns` maps manifest fields to the names used in the files; of a list, the first that a row has counts.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from efficient_asr.data import BROKEN, FIELDS, ORIGIN, Row, check_columns, write_manifest
from efficient_asr.errors import UserError


def _read(source: str, folder: Path, columns: dict[str, list[str]]) -> list[Row]:
    """Read `file.jsonl` or `file.jsonl#split` with mapped columns and absolute audio paths; broken lines become
    rows that say so, for the manifest reader to report or skip."""
    name, _, split = source.partition("#")
    path = folder / name
    if not path.is_file():
        raise UserError(f"no manifest at {path}")
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            origin = f"{path}:{number}"
            try:
                raw = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                rows.append({BROKEN: "not UTF-8", ORIGIN: origin})
                continue
            except json.JSONDecodeError as error:
                rows.append({BROKEN: f"not JSON ({error})", ORIGIN: origin})
                continue
            if not isinstance(raw, dict):
                rows.append({BROKEN: "not a JSON object", ORIGIN: origin})
                continue
            if split and raw.get("split") != split:
                continue
            row = {key: value for key, value in raw.items() if key not in FIELDS}
            for field, names in columns.items():
                value = next((raw[n] for n in names if raw.get(n) is not None), None)
                if value is not None:
                    row[field] = value
            if "audio" in row:
                row.setdefault("id", row["audio"])
                row["audio"] = str(path.absolute().parent / str(row["audio"]))
            row[ORIGIN] = origin
            rows.append(row)
    if not rows:
        raise UserError(f"{path} has no rows" + (f" of split '{split}'" if split else ""))
    return rows


def prepare(
    data_folder: str | None,
    out_folder: Path,
    manifests: dict[str, Any] | None = None,
    columns: dict[str, Any] | None = None,
) -> dict[str, Path]:
    """Write one manifest a split.

    Arguments
    ---------
    data_folder : str
        Folder of the files.
    out_folder : Path
        Gets `<split>.jsonl` with absolute audio paths.
    manifests : dict, optional
        Split -> file or list of files, relative to `data_folder`; None finds them.
    columns : dict, optional
        Manifest field -> name or names in the files.

    Raises
    ------
    UserError
        Where a folder, file, split or column is missing.
    """
    if not data_folder or not Path(data_folder).is_dir():
        raise UserError(f"data_folder: '{data_folder}' is no folder; name the one that holds your .jsonl files")
    folder, mapping = Path(data_folder), check_columns(columns)
    splits: dict[str, list[Row]] = defaultdict(list)
    if manifests is not None and not isinstance(manifests, dict):
        raise UserError(f"corpus_options: manifests must map splits to files, not {manifests!r}")
    if manifests:
        for split, sources in manifests.items():
            for source in [sources] if isinstance(sources, str) else sources:
                splits[split] += _read(source, folder, mapping)
    else:
        files = sorted(folder.glob("*.jsonl"))
        if not files:
            raise UserError(f"data_folder: {folder} holds no .jsonl file")
        for path in files:
            for row in _read(path.name, folder, mapping):
                splits[str(row.get("split") or path.stem)].append(row)
    return {split: write_manifest(Path(out_folder) / f"{split}.jsonl", rows) for split, rows in splits.items()}
