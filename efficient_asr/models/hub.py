"""Model folders on the Hugging Face Hub: fetch one by its id, publish one.

`transformers` loads a plain Whisper by its id. Everything else that this project saves (CTC models, cascades, Whispers with a
cache or converted to another engine) is a folder with files of its own, which is fetched as a whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError

from efficient_asr.models.loading import hub_options, hub_problem
from efficient_asr.models.sources import resolve_source
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.files import atomic_write, atomic_write_text

# Entries of config.json that only this project writes: what made the model, the engine, the padding.
OURS = ("about", "backend", "encoder_padding")
CARD_MARK = "<!-- written by efficient_asr; without this line, the file is not overwritten -->"
_NOT_OURS = {".gitattributes", ".gitignore"}
_LOGIN = "the hub refused it; log in with `hf auth login`, or set HF_TOKEN to a token that may do this"


def is_hub_id(source: str) -> bool:
    """Return whether a source has the form `organisation/name` and is no local path."""
    parts = source.split("/")
    return len(parts) == 2 and all(parts) and not source.startswith((".", "~")) and not os.path.exists(source)


def model_source(source: str | os.PathLike[str]) -> str:
    """Return what to load a model from: like `resolve_source`; a model of this project on the hub is fetched.

    Raises
    ------
    UserError
        If the source cannot be resolved, or a download fails.
    """
    return fetch(resolve_source(source))


def fetch(source: str) -> str:
    """Return the local folder of a model of this project on the hub; any other source as it is.

    Nothing in the folder is executed.

    Arguments
    ---------
    source : str
        Hub id, local directory, or anything else; whoever loads it says what is wrong with it.

    Raises
    ------
    UserError
        If it is a model of this project that cannot be downloaded as a whole.
    """
    if not is_hub_id(source):
        return source
    options = hub_options(source)
    try:
        path = huggingface_hub.hf_hub_download(source, "config.json", **options)
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (HTTPError, OSError, ValueError):
        return source
    # CTranslate2's config.json has no type; ours is then in a subfolder
    is_ours = isinstance(config, dict) and (
        config.get("format") == "efficient_asr" or any(key in config for key in OURS) or "model_type" not in config
    )
    if not is_ours:
        return source
    try:
        return huggingface_hub.snapshot_download(source, **options)
    except Exception as error:  # also those of the client's own transfer library
        raise UserError(f"'{source}' cannot be downloaded ({_first_line(error)}); run the command again") from None


def publish(folder: Path, target: str, private: bool = False, overwrite: bool = False) -> str:
    """Copy a model folder to the hub, or to another folder; return where it is.

    A card that this project wrote is changed to name the target.

    Arguments
    ---------
    folder : Path
        Model folder.
    target : str
        Hub id `organisation/name`, whose repository is created if it does not exist; or the path of a folder.
    private : bool
        Whether the repository must be private; a new one is made so.
    overwrite : bool
        Whether files that are there already are replaced, all of them.

    Raises
    ------
    UserError
        If there is no model in the folder, or the target cannot be written.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a model folder: it has no config.json")
    if "://" in target:
        raise UserError(f"{target}: give a hub id, organisation/name, or a local folder, not a URL")
    if not is_hub_id(target):
        return str(_copy(folder, Path(target).expanduser(), overwrite))
    if (problem := hub_problem()) is not None:
        raise UserError(
            f"the Hugging Face Hub cannot be reached ({problem}); a path such as ./{target} is a local folder"
        )
    try:
        return _upload(folder, target, private, overwrite)
    except UserError:
        raise
    except LocalTokenNotFoundError:
        raise UserError(f"{target}: {_LOGIN}") from None
    except HFValidationError as error:
        raise UserError(f"{target}: not a hub id ({_first_line(error)})") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        advice = f"; {_LOGIN}" if status in (401, 403) else ""
        raise UserError(f"{target}: {_first_line(error)}{advice}") from None
    except Exception as error:  # also those of the client's own transfer library
        raise UserError(f"{target}: the upload failed ({_first_line(error)}); run the command again") from None


def _upload(folder: Path, target: str, private: bool, overwrite: bool) -> str:
    """Upload a folder; see `publish`."""
    api = huggingface_hub.HfApi()
    address = str(api.create_repo(target, private=private or None, exist_ok=True))
    if private and not api.repo_info(target).private:
        raise UserError(f"{target} exists and is public; make it private on the hub, or choose another name")
    if not overwrite and set(api.list_repo_files(target)) - _NOT_OURS:
        raise UserError(f"{target} has files already; pass --overwrite to replace all of them")
    _name_in_card(folder, target)
    api.upload_folder(
        repo_id=target, folder_path=folder, commit_message="Model of efficient_asr", ignore_patterns=[".*", "*/.*"],
        delete_patterns=["*"],
    )  # fmt: skip
    return address


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _name_in_card(folder: Path, target: str) -> None:
    """Let the example in a card of this project load the model from the target."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if CARD_MARK in text:
        atomic_write_text(path, re.sub(r'load_transcriber\("[^"]*"\)', f'load_transcriber("{target}")', text))


def _copy(folder: Path, target: Path, overwrite: bool) -> Path:
    """Copy a folder atomically."""
    source, place = folder.resolve(), target.resolve()
    if place == source or source in place.parents or place in source.parents:
        raise UserError(f"{target}: one of the two folders contains the other; choose another one")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; choose another name")
    if target.is_dir() and any(target.iterdir()):
        if not (target / "config.json").is_file():
            raise UserError(f"{target} is not a model folder, and is not replaced; choose another one")
        if not overwrite:
            raise UserError(f"{target} exists already; pass --overwrite to replace it")
    place.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(place) as partial:
        shutil.copytree(folder, partial, ignore=shutil.ignore_patterns(".*"))
        _name_in_card(partial, str(target))
    return target
