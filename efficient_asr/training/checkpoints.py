"""Checkpoints that survive a kill at any moment, and cannot execute anything.

A checkpoint is a folder: `model.safetensors`, `state.pt` (optimisers, schedulers, position; read with `weights_only`) and
`meta.json` with size and SHA-256 of both. It is written aside, synced to the disk and renamed, so it is there whole or
not at all; before it is trusted, the sums are compared. SpeechBrain's own checkpointer does none of this and reads YAML that
can execute code.
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

FORMAT = {"format": "efficient_asr checkpoint", "version": 1}
PREFIX, PARTIAL, DAMAGED = "CKPT+", ".partial-", "DAMAGED-"
WORKER_DIED = "DataLoader worker"  # begins what torch raises, anywhere in the main process, when one has died
MODEL, STATE, META = "model.safetensors", "state.pt", "meta.json"


class Recoverable(Protocol):
    """Whatever has a state made of tensors, numbers, texts, lists and dicts."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Take a state over."""


class StateAdapter:
    """Makes attributes of an object recoverable that has no `state_dict`.

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
    """A whole checkpoint on the disk."""

    path: Path
    meta: dict[str, Any]


class Checkpointer:
    """Saves and recovers a training; keeps the newest checkpoint and the best finished epoch.

    Arguments
    ---------
    folder : Path
        Where checkpoints go.
    model : torch.nn.Module
        Its weights get a file of their own.
    settings : dict
        What the training depends on; stored with every checkpoint.
    min_key : str
        Entry of `meta` that makes an epoch the best one where it is lowest.
    """

    def __init__(self, folder: Path, model: torch.nn.Module, settings: dict[str, str], min_key: str = "WER") -> None:
        self.checkpoints_dir, self.model, self.settings, self.min_key = Path(folder), model, settings, min_key
        self.recoverables: dict[str, Recoverable] = {}

    def add_recoverable(self, name: str, recoverable: Recoverable, optional_load: bool = False) -> None:
        """Save and recover this too."""
        self.recoverables[name] = recoverable

    def save(self, name: str, meta: dict[str, Any]) -> None:
        """Write a checkpoint on the main process, then delete those that it makes superfluous.

        Raises
        ------
        UserError
            Where it cannot be written; earlier checkpoints stay as they are.
        """
        target = self.checkpoints_dir / f"{PREFIX}{name}"
        if not if_main_process() or any(c.path == target and not self._damage(c) for c in self.list()):
            return  # the same place in the same training
        while True:
            try:
                self._write(target, meta)
                break
            except RuntimeError as error:
                if WORKER_DIED not in str(error):
                    raise
                # Raised here by chance, once for each of them: this is what must be saved now.
        self._clean_up(target)

    def _write(self, target: Path, meta: dict[str, Any]) -> None:
        """Write a checkpoint that appears whole."""
        partial = target.with_name(f"{PARTIAL}{target.name.removeprefix(PREFIX)}")
        try:
            self.remove_leftovers()
            partial.mkdir(parents=True)
            # copies, since tied weights share memory, which safetensors refuses; each is stored once
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
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap what the system says
            shutil.rmtree(partial, ignore_errors=True)
            if WORKER_DIED in str(error):
                raise
            last = next((c for c in self.list() if not self._damage(c)), None)
            raise UserError(
                f"no checkpoint could be written to {self.checkpoints_dir} ({_reason(error)}; "
                f"{_free(self.checkpoints_dir)} free). "
                + (f"The last good one, {last.path.name}, is still there. " if last else "There is none yet. ")
                + "Make room or fix the permissions, then start the same command again."
            ) from None

    def remove_leftovers(self) -> None:
        """Remove what a save or a deletion left that was killed."""
        for leftover in self.checkpoints_dir.glob(f"{PARTIAL}*") if self.checkpoints_dir.is_dir() else []:
            shutil.rmtree(leftover, ignore_errors=True)

    def _clean_up(self, written: Path) -> None:
        """Delete what is neither just written nor the best; renamed first, so that a kill leaves nothing half deleted."""
        checkpoints = self.list()
        best = min(self._finished(checkpoints), key=self._rank, default=None)
        keep = {written, best.path if best else written}
        for checkpoint in checkpoints:
            if checkpoint.path not in keep:
                doomed = checkpoint.path.with_name(f"{PARTIAL}{checkpoint.path.name}")
                os.rename(checkpoint.path, doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def list(self) -> list[Checkpoint]:
        """Return all checkpoints that look whole, the newest first.

        Raises
        ------
        UserError
            Where a folder holds a checkpoint of another kind, which could execute code when read.
        """
        found = []
        for path in self.checkpoints_dir.glob(f"{PREFIX}*") if self.checkpoints_dir.is_dir() else []:
            if (path / "CKPT.yaml").exists():
                raise UserError(
                    f"{path} is a checkpoint in SpeechBrain's format, which can execute code when it is read; it is not "
                    "read here. Remove it, or take another --output_folder."
                )
            meta = _read_meta(path)
            if meta is not None:
                found.append(Checkpoint(path, meta))
        return sorted(found, key=lambda c: (c.meta["position"], c.path.name), reverse=True)

    def newest(self) -> Checkpoint | None:
        """Return the newest checkpoint whose sums are right; damaged ones are put aside, by the main process."""
        self._put_damaged_aside()
        return next(iter(self.list()), None)

    def best(self) -> Checkpoint | None:
        """Return the finished epoch with the lowest `min_key` whose sums are right; of equals the later."""
        self._put_damaged_aside()
        return min(self._finished(self.list()), key=self._rank, default=None)

    def _finished(self, checkpoints: list[Checkpoint]) -> list[Checkpoint]:
        return [checkpoint for checkpoint in checkpoints if checkpoint.meta.get(self.min_key) is not None]

    def _rank(self, checkpoint: Checkpoint) -> float:
        return checkpoint.meta[self.min_key]

    def _put_damaged_aside(self) -> None:
        """Rename damaged checkpoints, so that they neither count nor make others superfluous. All processes wait for that."""
        for checkpoint in self.list() if if_main_process() else []:
            problem = self._damage(checkpoint)
            if problem is not None:
                aside = checkpoint.path.with_name(f"{DAMAGED}{checkpoint.path.name}")
                print(f"{checkpoint.path} is damaged ({problem}); put aside as {aside.name}")
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
                return f"{name} is not what was written"
        return None

    def recover(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint.

        Raises
        ------
        UserError
            Where it does not fit, or holds what could execute code.
        """
        self.load_model(checkpoint)
        state = load_state(checkpoint.path / STATE)
        missing = set(self.recoverables) - set(state)
        if missing:
            raise UserError(f"{checkpoint.path} holds no {', '.join(sorted(missing))}; take another --output_folder")
        for key, recoverable in self.recoverables.items():
            try:
                recoverable.load_state_dict(state[key])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{checkpoint.path}: the state of '{key}' does not fit ({error})") from None

    def load_model(self, checkpoint: Checkpoint) -> None:
        """Take over the weights of a checkpoint."""
        path = checkpoint.path / MODEL
        try:
            found = load_file(path)
            for key, first in tied(self.model.state_dict()).items():
                if key not in found and first in found:
                    found[key] = found[first]
            self.model.load_state_dict(found)
        except SafetensorError as error:
            raise UserError(f"{path} is no safetensors file ({error}); nothing of it was used") from None
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"{path} does not fit the model of this YAML ({reason})") from None


def tied(state: dict[str, torch.Tensor]) -> dict[str, str]:
    """Return for each weight the first one of the same memory and shape, itself where it is tied to none before it."""
    first: dict[tuple, str] = {}
    return {
        key: first.setdefault((value.data_ptr(), value.shape, value.stride()) if value.numel() else (key,), key)
        for key, value in state.items()
    }


def worker_died(error: BaseException) -> str:
    """Return what to say of a process that loaded data and was killed."""
    reason = " ".join(str(error).split())
    return (
        f"a process that loads data has died ({reason}), most likely since the memory was exhausted. Start the same command "
        "again to go on from the last checkpoint, with fewer of them (--num_workers 0) or smaller batches."
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


def check_settings(checkpoint: Checkpoint, settings: dict[str, str], allow_changed_settings: bool) -> None:
    """Compare the settings of a checkpoint with those of now.

    Raises
    ------
    UserError
        Naming every difference, unless `allow_changed_settings`.
    """
    before, former = current_settings(checkpoint.meta["settings"]), former_values()
    for key, value in former.items():
        if key in settings:
            before.setdefault(key, value)
    # objects that take a key which did not exist then
    new_arguments = re.compile(rf"\s*\w+: !ref <(?:{'|'.join(former)})>")
    changed = [
        f"{key}: {before.get(key, '(not there)')} then, {settings.get(key, '(not there)')} now"
        for key in sorted(set(before) | set(settings))
        if new_arguments.sub("", before.get(key, "")) != new_arguments.sub("", settings.get(key, ""))
    ]
    if changed and not allow_changed_settings:
        raise UserError(
            f"the settings have changed since {checkpoint.path} was written:\n{listing(changed)}\n"
            "Start with the settings of then, resume with those of now (--allow_changed_settings True; learning rates "
            "and the state "
            "of the optimisers stay those of the checkpoint), or choose another --output_folder."
        )
    if changed:
        print(f"going on from {checkpoint.path} with other settings:\n{listing(changed)}")
