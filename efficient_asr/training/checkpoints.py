"""Checkpoints that survive a kill at any moment and cannot execute code.

A checkpoint is a folder: `model.safetensors`, `state.pt` (optimisers, schedulers, position; read with `weights_only`) and
`meta.json` with size and SHA-256 of both. It is written to a temporary folder, synced to disk and renamed, so it is either
complete or absent; the checksums are verified before it is loaded. SpeechBrain's own checkpointer does none of this and reads
YAML that can execute code.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from efficient_asr.settings.limits import former_values
from efficient_asr.settings.renamed import current_settings
from efficient_asr.utils.distributed import ddp_barrier, if_main_process
from efficient_asr.utils.errors import UserError, listing
from efficient_asr.utils.files import sha256_of
from efficient_asr.utils.safe_load import load_state
from efficient_asr.utils.technique import merged

FORMAT = {"format": "efficient_asr checkpoint", "version": 1}
PREFIX, PARTIAL, DAMAGED = "CKPT+", ".partial-", "DAMAGED-"
WORKER_DIED = "DataLoader worker"  # prefix of the error that torch raises, anywhere in the main process, if one died
MODEL, STATE, META = "model.safetensors", "state.pt", "meta.json"


class Recoverable(Protocol):
    """An object with a state made of tensors, numbers, strings, lists and dicts."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Load a state."""


class StateAdapter:
    """Saves and restores attributes of an object that has no `state_dict`.

    Arguments
    ---------
    owner : object
        The object.
    *names : str
        Attributes that change during training.
    """

    def __init__(self, owner: Any, *names: str) -> None:
        self.owner, self.names = owner, names

    def state_dict(self) -> dict[str, Any]:
        """Return the attributes."""
        return {name: getattr(self.owner, name) for name in self.names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the attributes."""
        for name in self.names:
            setattr(self.owner, name, state[name])


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    meta: dict[str, Any]


class Checkpointer:
    """Saves and restores a training; keeps the newest checkpoint and the best finished epoch.

    Arguments
    ---------
    folder : Path
        Folder of the checkpoints.
    model : torch.nn.Module
        Its weights are stored in a separate file.
    settings : dict
        Settings that the training depends on; stored with every checkpoint.
    min_key : str
        Entry of `meta` to minimise when choosing the best epoch.
    """

    def __init__(self, folder: Path, model: torch.nn.Module, settings: dict[str, str], min_key: str = "WER") -> None:
        self.checkpoints_dir, self.model, self.settings, self.min_key = Path(folder), model, settings, min_key
        self.recoverables: dict[str, Recoverable] = {}

    def add_recoverable(self, name: str, recoverable: Recoverable, optional_load: bool = False) -> None:
        """Register an object to save and restore with every checkpoint."""
        self.recoverables[name] = recoverable

    def save(self, name: str, meta: dict[str, Any]) -> None:
        """Write a checkpoint on the main process, then delete the checkpoints it makes redundant.

        Raises
        ------
        UserError
            If it cannot be written; earlier checkpoints are kept.
        """
        target = self.checkpoints_dir / f"{PREFIX}{name}"
        if not if_main_process() or any(c.path == target and not self._damage(c) for c in self.list()):
            return  # already saved at this position
        while True:
            try:
                self._write(target, meta)
                break
            except RuntimeError as error:
                if WORKER_DIED not in str(error):
                    raise
                # torch happened to raise it here, once per dead worker; the checkpoint must still be written.
        self.clean_up(target)

    def _write(self, target: Path, meta: dict[str, Any]) -> None:
        """Write a checkpoint atomically."""
        partial = target.with_name(f"{PARTIAL}{target.name.removeprefix(PREFIX)}")
        try:
            self.remove_leftovers()
            partial.mkdir(parents=True)
            # copies, because tied weights share memory, which safetensors rejects; each is stored once
            state = self.model.state_dict()
            tensors = {
                key: state[key].detach().cpu().contiguous().clone()
                for key, first in tied(state).items()
                if key == first
            }
            save_file(tensors, partial / MODEL)
            torch.save({key: item.state_dict() for key, item in self.recoverables.items()}, partial / STATE)
            files = {file: _describe(partial / file) for file in (MODEL, STATE)}
            content = FORMAT | meta | {"settings": self.settings, "files": files}
            (partial / META).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            for file in (MODEL, STATE, META):
                _sync(partial / file)
            _sync(partial)
            if target.exists():  # damaged
                shutil.rmtree(target)
            os.rename(partial, target)
            _sync(self.checkpoints_dir)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap system errors
            shutil.rmtree(partial, ignore_errors=True)
            if WORKER_DIED in str(error):
                raise
            last = next((c for c in self.list() if not self._damage(c)), None)
            raise UserError(
                f"no checkpoint could be written to {self.checkpoints_dir} ({_reason(error)}; "
                f"{_free(self.checkpoints_dir)} free). "
                + (f"The last good one, {last.path.name}, was kept. " if last else "There is no earlier one. ")
                + "Free up space or fix the permissions, then rerun the command to resume."
            ) from None

    def remove_leftovers(self) -> None:
        """Remove leftovers of interrupted saves and deletions."""
        for leftover in self.checkpoints_dir.glob(f"{PARTIAL}*") if self.checkpoints_dir.is_dir() else []:
            shutil.rmtree(leftover, ignore_errors=True)

    def clean_up(self, written: Path) -> None:
        """Delete all checkpoints but the one just written and the best; rename first, so that a kill leaves none half deleted."""
        checkpoints = self.list()
        best = min(self._finished(checkpoints), key=self._rank, default=None)
        keep = {written, best.path if best else written}
        for checkpoint in checkpoints:
            if checkpoint.path not in keep:
                doomed = checkpoint.path.with_name(f"{PARTIAL}{checkpoint.path.name}")
                os.rename(checkpoint.path, doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def list(self) -> list[Checkpoint]:
        """Return all checkpoints that look complete, newest first.

        Raises
        ------
        UserError
            If a folder holds a checkpoint in SpeechBrain's format, which could execute code when read.
        """
        found = []
        for path in self.checkpoints_dir.glob(f"{PREFIX}*") if self.checkpoints_dir.is_dir() else []:
            if (path / "CKPT.yaml").exists():
                raise UserError(
                    f"{path} is a checkpoint in SpeechBrain's format, which can execute code when it is read; it "
                    "was not loaded. Remove it, or choose another --output_folder."
                )
            meta = _read_meta(path)
            if meta is not None:
                found.append(Checkpoint(path, meta))
        return sorted(found, key=lambda c: (c.meta["position"], c.path.name), reverse=True)

    def newest(self) -> Checkpoint | None:
        """Return the newest checkpoint with correct checksums; the main process renames damaged ones."""
        self._put_damaged_aside()
        return next(iter(self.list()), None)

    def best(self) -> Checkpoint | None:
        """Return the finished epoch with the lowest `min_key` and correct checksums; the later one if equal."""
        self._put_damaged_aside()
        return min(self._finished(self.list()), key=self._rank, default=None)

    def _finished(self, checkpoints: list[Checkpoint]) -> list[Checkpoint]:
        return [checkpoint for checkpoint in checkpoints if checkpoint.meta.get(self.min_key) is not None]

    def _rank(self, checkpoint: Checkpoint) -> float:
        return checkpoint.meta[self.min_key]

    def _put_damaged_aside(self) -> None:
        """Rename damaged checkpoints, so that they are ignored and replace no others. All processes wait for this."""
        for checkpoint in self.list() if if_main_process() else []:
            problem = self._damage(checkpoint)
            if problem is not None:
                aside = checkpoint.path.with_name(f"{DAMAGED}{checkpoint.path.name}")
                print(f"{checkpoint.path} is damaged ({problem}); renamed to {aside.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(checkpoint.path, aside)
        ddp_barrier()

    @staticmethod
    def _damage(checkpoint: Checkpoint) -> str | None:
        for name in (MODEL, STATE):
            path = checkpoint.path / name
            if not path.is_file():
                return f"{name} is missing"
            if _describe(path) != checkpoint.meta["files"][name]:
                return f"{name} does not match its checksum"
        return None

    def recover(self, checkpoint: Checkpoint) -> None:
        """Restore the training from a checkpoint.

        Raises
        ------
        UserError
            If it does not match the training, or if it could execute code.
        """
        self.load_model(checkpoint)
        state = load_state(checkpoint.path / STATE)
        missing = set(self.recoverables) - set(state)
        if missing:
            raise UserError(f"{checkpoint.path} lacks {', '.join(sorted(missing))}; choose another --output_folder")
        for key, recoverable in self.recoverables.items():
            try:
                recoverable.load_state_dict(state[key])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{checkpoint.path}: the state of '{key}' does not match ({error})") from None

    def load_model(self, checkpoint: Checkpoint) -> None:
        """Load the weights of a checkpoint."""
        path = checkpoint.path / MODEL
        try:
            found = _with_current_names(load_file(path))
            for key, first in tied(self.model.state_dict()).items():
                if key not in found and first in found:
                    found[key] = found[first]
            self.model.load_state_dict(found)
        except SafetensorError as error:
            raise UserError(f"{path} is not a valid safetensors file ({error}); no weights were loaded") from None
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"{path} does not match the model of this YAML file ({reason})") from None


def _with_current_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint, which may be from an earlier version, under their current names."""
    former = merged("former_weights")

    def current(name: str) -> str:
        prefix = next((prefix for prefix in former if name.startswith(prefix)), None)
        return name if prefix is None else former[prefix] + name.removeprefix(prefix)

    return {current(name): value for name, value in weights.items()}


def tied(state: dict[str, torch.Tensor]) -> dict[str, str]:
    """Map each weight to the first weight with the same memory and shape; to itself if it is not tied to an earlier one."""
    first: dict[tuple, str] = {}
    return {
        key: first.setdefault((value.data_ptr(), value.shape, value.stride()) if value.numel() else (key,), key)
        for key, value in state.items()
    }


def worker_died(error: BaseException) -> str:
    """Return the message for a data loading process that was killed."""
    reason = " ".join(str(error).split())
    return (
        f"a data loading process has died ({reason}), most likely because memory ran out. Rerun the command to resume from "
        "the last checkpoint, with fewer workers (--num_workers 0) or smaller batches."
    )


def _read_meta(folder: Path) -> dict[str, Any] | None:
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        fits = {key: meta[key] for key in FORMAT} == FORMAT and set(meta["files"]) == {MODEL, STATE}
        return meta if fits and isinstance(meta["position"], list) and isinstance(meta["settings"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error)).splitlines()[0]


def _free(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB"


# entries of `RecipeBrain.made_of` and `validates_by` that checkpoints of former versions do not have
NOTED_LATER = ("labels", "stored states", "max_new_tokens of the validation")


def changed_settings(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Return a line for every setting that differs; keys that did not exist before have their former values."""
    before, former = current_settings(before), former_values()
    for key, value in (former | {key: now[key] for key in NOTED_LATER if key in now}).items():
        if key in now:
            before.setdefault(key, value)
    # arguments of objects that refer to a key which did not exist when the checkpoint was written
    new_arguments = re.compile(rf"\s*\w+: !ref <(?:{'|'.join(former)})>")
    return [
        f"{key}: {before.get(key, '(not set)')} before, {now.get(key, '(not set)')} now"
        for key in sorted(set(before) | set(now))
        if new_arguments.sub("", before.get(key, "")) != new_arguments.sub("", now.get(key, ""))
    ]


def check_settings(checkpoint: Checkpoint, settings: dict[str, str], allow_changed_settings: bool) -> None:
    """Compare the settings of a checkpoint with the current ones.

    Raises
    ------
    UserError
        Naming every difference, unless `allow_changed_settings` is set.
    """
    changed = changed_settings(checkpoint.meta["settings"], settings)
    if changed and not allow_changed_settings:
        raise UserError(
            f"the settings have changed since {checkpoint.path} was written:\n{listing(changed)}\n"
            "Restore the previous settings, resume with the current ones (--allow_changed_settings True; learning rates "
            "and optimiser states "
            "stay those of the checkpoint), or choose another --output_folder."
        )
    if changed:
        print(f"resuming from {checkpoint.path} with changed settings:\n{listing(changed)}")
