"""Model folders on the Hugging Face Hub: fetch one by its id, publish one.

`transformers` loads a plain Whisper by its id. Everything else that this project saves (CTC models, cascades, Whispers with a
cache or converted to another engine) is a folder with files of its own, which is fetched as a whole.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError

from efficient_asr.models.backends import ENTRY
from efficient_asr.models.loading import hub_options, hub_problem
from efficient_asr.models.whisper.model import PADDING
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.files import atomic_write

_OURS = ("about", ENTRY, PADDING)  # entries of config.json that only this project writes


def is_hub_id(source: str) -> bool:
    """Return whether a source has the form `organisation/name` and is no local path."""
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and not os.path.exists(source)


def fetch(source: str) -> str:
    """Return the local folder of a model of this project on the hub; any other source as it is.

    Whoever loads the source says what is wrong with it. Nothing in the folder is executed.

    Arguments
    ---------
    source : str
        Hub id, local directory, or anything else.
    """
    if not is_hub_id(source):
        return source
    options = hub_options(source)
    try:
        config = json.loads(
            Path(huggingface_hub.hf_hub_download(source, "config.json", **options)).read_text(encoding="utf-8")
        )
        is_ours = config.get("format") == "efficient_asr" or any(key in config for key in _OURS)
        # CTranslate2's config.json has no type; ours is then in a subfolder
        return huggingface_hub.snapshot_download(source, **options) if is_ours or "model_type" not in config else source
    except (HTTPError, OSError, ValueError, AttributeError):
        return source


def publish(folder: Path, target: str, private: bool = False, overwrite: bool = False) -> str:
    """Copy a model folder to the hub, or to another folder; return where it is.

    Arguments
    ---------
    folder : Path
        Model folder.
    target : str
        Hub id `organisation/name`, whose repository is created if it does not exist; or the path of a folder.
    private : bool
        Whether a new repository is private.
    overwrite : bool
        Whether a folder that exists is replaced.

    Raises
    ------
    UserError
        If there is no model in the folder, or the target cannot be written.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a model folder: it has no config.json")
    if not is_hub_id(target):
        return str(_copy(folder, Path(target).expanduser(), overwrite))
    if (problem := hub_problem()) is not None:
        raise UserError(
            f"the Hugging Face Hub cannot be reached ({problem}); a path such as ./{target} is a local folder"
        )
    api = huggingface_hub.HfApi()
    try:
        address = str(api.create_repo(target, private=private or None, exist_ok=True))
        api.upload_folder(
            repo_id=target, folder_path=folder, commit_message="Model of efficient_asr", ignore_patterns=[".*", "*/.*"]
        )
    except LocalTokenNotFoundError:
        raise UserError(f"{target}: {_LOGIN}") from None
    except HFValidationError as error:
        raise UserError(f"{target}: not a hub id ({str(error).splitlines()[0]})") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        raise UserError(f"{target}: {_LOGIN if status in (401, 403) else _first_line(error)}") from None
    except (HTTPError, OSError) as error:
        raise UserError(f"{target}: the upload failed ({_first_line(error)}); run the command again") from None
    return address


_LOGIN = "the hub refused it; log in with `hf auth login`, or set HF_TOKEN to a token that may write there"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _copy(folder: Path, target: Path, overwrite: bool) -> Path:
    """Copy a folder atomically."""
    source, place = folder.resolve(), target.resolve()
    if place == source or source in place.parents or place in source.parents:
        raise UserError(f"{target}: one of the two folders contains the other; choose another one")
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not overwrite):
        raise UserError(f"{target} exists already; pass --overwrite to replace it")
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file():
        raise UserError(f"{target} is not a model folder, and is not replaced; choose another one")
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as partial:
        shutil.copytree(folder, partial, ignore=shutil.ignore_patterns(".*"))
    return target
