"""Features of a split in Parquet shards, on a disk or in any object store that fsspec knows.

A folder, given as a path or URL (`s3://bucket/folder`), holds `<split>/part-00000.parquet` and so on. Beside every shard,
`part-00000.json` has its checksum and its utterances; it is written last, so a shard without one is not complete. `index.json`
completes the split. The shards can be read with `datasets.load_dataset("parquet", ...)` too. Credentials come from the
environment, never from the URL.

Features end with columns that repeat (the silence behind the audio); those are stored once, which loses nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from efficient_asr.data.manifest import Row, Rows
from efficient_asr.utils.errors import UserError, check_writable
from efficient_asr.utils.files import file_state, sha256_of

FORMAT, INDEX = "efficient_asr features 1", "index.json"
DTYPES = ("float32", "float16")
LEFT_BEHIND_S = 3600.0  # a download that was not touched for so long is not going on
_OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs")  # without folders; making one would make a bucket
_WORDS = {
    "s3": "pip install s3fs; credentials: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, for other stores, AWS_ENDPOINT_URL",
    "gs": "pip install gcsfs; credentials: GOOGLE_APPLICATION_CREDENTIALS",
    "gdrive": "pip install gdrivefs",
    "hopsfs": "pip install hopsfs-fsspec",
}


def import_datasets() -> Any:
    """Return the package datasets.

    Raises
    ------
    UserError
        If it is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise UserError("features in Parquet need the package datasets; pip install 'efficient_asr[storage]'") from None
    datasets.disable_progress_bars()
    return datasets


class Place:
    """A folder on a file system of fsspec.

    Arguments
    ---------
    url : str
        Path or URL.

    Raises
    ------
    UserError
        If the file system is unknown or not installed, or the URL holds credentials.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.url, self.scheme = url.rstrip("/"), urlsplit(url).scheme if "://" in url else "file"
        if self.scheme != "file" and "@" in urlsplit(url).netloc:
            raise UserError(
                f"{self.scheme} URL: leave the credentials out of the URL; they are read from the environment"
            )
        self._process = os.getpid()
        try:
            with self.explained():
                self._files, self.root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            hint = _WORDS.get(self.scheme, "see fsspec.available_protocols()")
            raise UserError(f"{self.url}: this file system cannot be used ({error}); {hint}") from None

    @property
    def files(self) -> Any:
        """The file system; one for each process, because those with a loop of events do not survive a fork."""
        if os.getpid() != self._process:
            import fsspec

            self._files, _ = fsspec.core.url_to_fs(self.url, skip_instance_cache=True)
            self._process = os.getpid()
        return self._files

    def path(self, name: str) -> str:
        """Return the path of a file for `files`."""
        return f"{self.root}/{name}"

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Within the context, turn what a store refuses into a UserError that names the place."""
        try:
            yield
        except UserError:
            raise
        except FileNotFoundError as error:
            raise UserError(
                f"{self.url}: not found ({_short(error)}); check the name of the bucket or folder"
            ) from None
        except PermissionError as error:
            hint = _WORDS.get(self.scheme, "").partition("; ")[2] or "check the permissions"
            raise UserError(f"{self.url}: access denied ({_short(error)}); {hint}") from None
        except (OSError, TimeoutError) as error:
            raise UserError(f"{self.url}: {_short(error)}; rerun the command to resume") from None
        except Exception as error:  # botocore's and other stores' own exceptions
            if type(error).__module__.partition(".")[0] not in (
                "botocore",
                "aiobotocore",
                "aiohttp",
                "gcsfs",
                "google",
            ):
                raise
            hint = _WORDS.get(self.scheme, "").partition("; ")[2]
            raise UserError(f"{self.url}: {_short(error)}; {hint}; then rerun the command to resume") from None

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Return the content of a JSON file; None if there is none, or it is damaged."""
        try:
            with self.explained():
                self.files.invalidate_cache()
                if not self.files.exists(self.path(name)):
                    return None
                return json.loads(self.files.cat_file(self.path(name)))
        except ValueError:
            return None

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file."""
        with self.explained():
            self.files.pipe_file(self.path(name), json.dumps(content, ensure_ascii=False).encode())

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes; None if there is none."""
        with self.explained():
            return self.files.info(self.path(name))["size"] if self.files.exists(self.path(name)) else None

    def remove(self, *names: str) -> None:
        """Remove files, if they are there."""
        with self.explained():
            for name in names:
                if self.files.exists(self.path(name)):
                    self.files.rm_file(self.path(name))

    def put(self, local: Path, name: str) -> None:
        """Upload a file, and check that all of it arrived."""
        with self.explained():
            target = self.path(name)
            if self.scheme not in _OBJECT_STORES:
                self.files.makedirs(target.rpartition("/")[0], exist_ok=True)
            self.files.put_file(str(local), target)
            self.files.invalidate_cache()
            size = self.files.info(target)["size"]
        if size != local.stat().st_size:
            raise UserError(f"{self.url}/{name}: {size} of {local.stat().st_size} bytes arrived; rerun to resume")


def _short(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


# ------------------------------------------------------------ writing


def write_shards(
    place: Place,
    split: str,
    rows: Rows,
    meta: dict[str, Any],
    compute: Callable[[Row], tuple[torch.Tensor, list[int]]],
    dtype: str = "float32",
    shard_size: int = 64,
) -> dict[str, int]:
    """Write the features of a split; shards that are complete already are kept.

    Arguments
    ---------
    place : Place
        The folder.
    split : str
        Name of the split.
    rows : Rows
        Its utterances.
    meta : dict
        What the features depend on; a shard that was written with other values is written again.
    compute : callable
        `(row) -> (features [mels, frames], labels)`.
    dtype : str
        `float32`, or `float16` for half of the size.
    shard_size : int
        Utterances in a shard.

    Returns
    -------
    dict
        Number of `shards`, of shards that were `kept`, of `utterances` and of `bytes`.
    """
    datasets = import_datasets()
    meta = {"format": FORMAT, "dtype": dtype, "shard_size": shard_size} | meta
    entries, kept = [], 0
    with tqdm(total=len(rows), desc=f"features of {split}", unit="utt", mininterval=1) as progress:
        for number, start in enumerate(range(0, len(rows), shard_size)):
            chunk = [rows[i] for i in range(start, min(start + shard_size, len(rows)))]
            key = hashlib.sha256(
                json.dumps([meta, [_about(row) for row in chunk]], sort_keys=True).encode()
            ).hexdigest()
            name = f"{split}/part-{number:05d}"
            known = place.read_json(f"{name}.json")
            if known is not None and known.get("key") == key and place.size(f"{name}.parquet") == known["bytes"]:
                kept += 1
                entry = known
            else:
                place.remove(f"{split}/{INDEX}")  # until all shards are there again
                entry = {"key": key} | _write_shard(datasets, place, name, chunk, compute, dtype, progress)
                place.write_json(f"{name}.json", entry)
            entries.append({"name": f"{name}.parquet"} | entry)
            progress.n = start + len(chunk)
            progress.refresh()
    number = len(entries)
    while place.size(f"{split}/part-{number:05d}.json") is not None:  # of an earlier, larger split
        place.remove(f"{split}/part-{number:05d}.json", f"{split}/part-{number:05d}.parquet")
        number += 1
    place.write_json(f"{split}/{INDEX}", {"meta": meta, "shards": entries})
    size = sum(entry["bytes"] for entry in entries)
    return {"shards": len(entries), "kept": kept, "utterances": len(rows), "bytes": size}


def _about(row: Row) -> list[Any]:
    """Return what features and labels of an utterance depend on."""
    keys = ("id", "duration", "text", "language", "offset", "timed", "segments", "previous_text")
    return [*(row.get(key) for key in keys), file_state(row["audio"]) if "audio" in row else None]


def _write_shard(
    datasets: Any,
    place: Place,
    name: str,
    chunk: list[Row],
    compute: Callable[[Row], tuple[torch.Tensor, list[int]]],
    dtype: str,
    progress: Any,
) -> dict[str, Any]:
    """Compute and upload one shard; return what its JSON file says."""
    columns: dict[str, list[Any]] = {
        key: [] for key in ("id", "text", "language", "duration", "frames", "labels", "features")
    }
    for row in chunk:
        features, labels = compute(row)
        kept = _without_repetition(features).to(getattr(torch, dtype)).T.contiguous().numpy()
        values = (row["id"], row["text"], row.get("language") or "", row["duration"], features.shape[1], labels, kept)
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
        progress.update()
    mels = columns["features"][0].shape[1]
    text, number = datasets.Value("string"), datasets.Value("int32")
    types = datasets.Features(
        {
            "id": text, "text": text, "language": text, "duration": datasets.Value("float64"), "frames": number,
            "labels": datasets.List(number), "features": datasets.Array2D((None, mels), dtype),
        }
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "shard.parquet"
        datasets.Dataset.from_dict(columns, features=types).to_parquet(str(local))
        place.put(local, f"{name}.parquet")
        utterances = [
            {"id": row["id"], "duration": row["duration"], "text": row["text"], "language": row.get("language")}
            for row in chunk
        ]
        return {"sha256": sha256_of(local), "bytes": local.stat().st_size, "utterances": utterances}


def _without_repetition(features: torch.Tensor) -> torch.Tensor:
    """Return [mels, frames] without columns at the end that equal the last one that is kept."""
    different = (features != features[:, -1:]).any(dim=0).nonzero()
    return features[:, : (int(different[-1]) if len(different) else -1) + 2]


# ------------------------------------------------------------ reading


class Shards:
    """The shards of a split, downloaded when they are needed into a cache of limited size.

    Arguments
    ---------
    place : Place
        The folder.
    split : str
        Name of the split.
    cache : Path
        Local folder for shards; several processes may use it.
    cache_gb : float
        Size of the cache. The shard that is being read is kept in any case.

    Attributes
    ----------
    meta : dict
        What the features depend on.
    rows : Rows
        The utterances, each with its `shard` and its place `in_shard`.

    Raises
    ------
    UserError
        If the split is missing or not complete.
    """

    def __init__(self, place: Place, split: str, cache: Path, cache_gb: float = 5.0) -> None:
        self.place, self.cache, self.cache_bytes = place, Path(cache), int(cache_gb * 1e9)
        index = place.read_json(f"{split}/{INDEX}")
        if index is None:
            raise UserError(
                f"{place.url}: no complete split '{split}' ({split}/{INDEX}); run scripts/prepare_features.py"
            )
        if index["meta"].get("format") != FORMAT:
            raise UserError(f"{place.url}/{split}: written by another version; prepare the features again")
        self.meta, self.shards = index["meta"], index["shards"]
        self.rows = Rows.of(
            {key: value for key, value in each.items() if value is not None} | {"shard": number, "in_shard": i}
            for number, shard in enumerate(self.shards)
            for i, each in enumerate(shard["utterances"])
        )
        check_writable(self.cache, "features_cache")
        self._open: OrderedDict[int, dict[str, Any]] = OrderedDict()

    def read(self, row: Row) -> dict[str, Any]:
        """Return the `features` [mels, frames] in float32 and the `labels` of an utterance."""
        table = self._table(row["shard"])
        i = row["in_shard"]
        frames_of_mels = table["features"][i].value.values  # a list of frames, each a list of mel values
        kept = frames_of_mels.flatten().to_numpy(zero_copy_only=False).reshape(len(frames_of_mels), -1)
        features = torch.from_numpy(kept.astype(np.float32)).T
        frames = table["frames"][i].as_py()
        repeated = features[:, -1:].expand(-1, frames - features.shape[1])
        return {"features": torch.cat([features, repeated], dim=1), "labels": table["labels"][i].as_py()}

    def _table(self, number: int) -> Any:
        """Return a shard; the last few are kept in memory."""
        if number not in self._open:
            import pyarrow.parquet

            while len(self._open) >= 4:
                self._open.popitem(last=False)
            columns = ["frames", "labels", "features"]
            try:
                self._open[number] = pyarrow.parquet.read_table(self._local(number), columns=columns)
            except FileNotFoundError:  # another process has made room in the meantime
                self._open[number] = pyarrow.parquet.read_table(self._local(number), columns=columns)
        self._open.move_to_end(number)
        return self._open[number]

    def _local(self, number: int) -> Path:
        """Return the local copy of a shard, downloaded if there is none that is intact."""
        shard = self.shards[number]
        path = self.cache / f"{shard['sha256'][:32]}.parquet"
        if path.is_file() and path.stat().st_size == shard["bytes"]:
            with contextlib.suppress(OSError):
                os.utime(path)  # used most recently
            return path
        self._make_room(shard["bytes"], path)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            with self.place.explained():
                self.place.files.get_file(self.place.path(shard["name"]), str(partial))
            if sha256_of(partial) != shard["sha256"]:
                raise UserError(
                    f"{self.place.url}/{shard['name']} is damaged: its checksum differs; delete it and its .json file, then "
                    "rerun scripts/prepare_features.py"
                )
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    def _make_room(self, needed: int, keep: Path) -> None:
        """Delete the shards that were not used for the longest time."""
        found = []
        for path in {*self.cache.glob("*.parquet"), *self.cache.glob("*.partial")} - {keep}:
            with contextlib.suppress(FileNotFoundError):  # another process deletes too
                state = path.stat()
                is_old = time.time() - state.st_mtime > LEFT_BEHIND_S
                if path.suffix != ".partial" or is_old:
                    found.append((state.st_mtime, state.st_size, path))
        size = sum(each for _, each, _ in found)
        for _, own, path in sorted(found):
            if size + needed <= self.cache_bytes:
                return
            size -= own
            path.unlink(missing_ok=True)


class StoredUtterances(Dataset):
    """Dataset of stored features: like `Utterances`, with `features` [mels, frames] instead of `wav`."""

    def __init__(self, rows: Rows, shards: Shards) -> None:
        self.rows, self.shards = rows, shards

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self.rows[number]
        found = self.shards.read(row)
        return {
            "id": row["id"], "features": found["features"], "tokens": torch.tensor(found["labels"], dtype=torch.long),
            "text": row["text"], "duration": row["duration"], "language": row.get("language") or "",
        }  # fmt: skip
