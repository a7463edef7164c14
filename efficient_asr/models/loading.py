"""Load transformers networks; a checkpoint that does not provide every weight of the network is rejected."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import re
import sys
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.utils
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from efficient_asr.models.sources import read_config
from efficient_asr.utils.errors import UserError

_LOADING_ERRORS = (
    OSError, ValueError, RuntimeError, SafetensorError, EOFError, KeyError, TypeError, AttributeError, StrictDataclassError,
)  # fmt: skip
HUB_TIMEOUT_S = 5.0
# Prefixes that wrappers add to all weight names: DataParallel, torch.compile, Lightning and other training code.
PREFIXES = ("module.", "_orig_mod.", "model.", "encoder.model.", "network.")
# Weights that may be missing: this embedding replaces masked features and is learned when training with spec_augment.
_OPTIONAL = re.compile(r"(.*\.)?masked_spec_embed")
QUANTISED_HINT = (
    "Use the original model; or load this one with transformers on a machine with that package, call .dequantize(), and save "
    "it to another folder with save_pretrained."
)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' warnings about conditions checked here, and its progress bars for short operations."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@functools.cache
def hub_problem() -> str | None:
    """Return why the Hugging Face Hub cannot be reached, None if it can; asked once, without the hub client's retries."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # whatever the HTTP client raises
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    return None


def hub_options(source: str) -> dict[str, Any]:
    """Return options for `from_pretrained`: for a hub id without a connection, only files that were downloaded before."""
    return {} if os.path.isdir(source) or hub_problem() is None else {"local_files_only": True}


def not_found(source: str, what: str, reason: str) -> UserError:
    """Return the error for a source that is neither a local directory nor a downloaded or reachable hub id."""
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        return UserError(
            f"'{source}' is not a {what} ({'damaged: ' + reason if os.path.isdir(source) else 'no such folder'})"
        )
    if os.path.isdir(source) or hub_problem() is None:
        return UserError(f"'{source}' is neither a {what} nor a reachable hub id, or it is damaged ({reason})")
    return UserError(
        f"'{source}' is neither a {what} nor a hub id that was downloaded before, and the Hugging Face Hub cannot be reached "
        f"({hub_problem()}). Where there is a network, run: hf download {source} --local-dir FOLDER; copy FOLDER here and use "
        "its path"
    )


def load_network(kind: type, source: str, **options: Any) -> torch.nn.Module:
    """Load a network in float32 from a local directory or hub id, and verify that no weight stays random.

    Arguments
    ---------
    kind : type
        A transformers class.
    source : str
        Local directory or hub id.
    **options
        Passed to `from_pretrained`.

    Returns
    -------
    torch.nn.Module
        The network.

    Raises
    ------
    UserError
        If the network cannot be loaded; if weights are missing, have a different shape, or are left over although they belong to
        the body of the network; or if it was saved quantised.
    """
    network, found = _load(kind, source, **options)
    if _missing(found):
        prefix = next((p for p in PREFIXES if _all_begin_with(found, p)), None)
        if prefix is not None:
            network, found = _load(kind, source, key_mapping={f"^{re.escape(prefix)}": ""}, **options)
            print(f"{source}: the names of its weights begin with '{prefix}'; this prefix was removed", file=sys.stderr)
    missing, surplus = _missing(found), _surplus(network, found)
    if missing or surplus:
        what = [f"the model lacks {len(missing)} of its weights ({missing[0]})"] if missing else []
        what += [f"{len(surplus)} weights do not belong to any of the model's layers ({surplus[0]})"] if surplus else []
        raise UserError(
            f"'{source}': the weights do not match config.json: {', and '.join(what)}. Copy the model again, or "
            "rename its weights."
        )
    return network


def _load(kind: type, source: str, **options: Any) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Call `from_pretrained` and convert its errors to UserError."""
    try:
        with quiet_transformers():
            options |= hub_options(source)
            return kind.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **options)
    except pickle.UnpicklingError:
        raise UserError(
            f"'{source}' cannot be loaded: its weights are a pickle that contains more than tensors. It could execute code "
            "and was not read; use a model with model.safetensors"
        ) from None
    except ImportError as error:
        raise UserError(f"'{source}' cannot be loaded here ({str(error).splitlines()[0]})") from None
    except _LOADING_ERRORS as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise not_found(source, "local model directory", reason) from None


def _missing(found: dict[str, Any]) -> list[str]:
    """Return the names of the weights that stayed random."""
    mismatched = [key[0] if isinstance(key, tuple) else key for key in found.get("mismatched_keys", ())]
    return sorted(key for key in {*found["missing_keys"], *mismatched} if not _OPTIONAL.fullmatch(key))


def _surplus(network: torch.nn.Module, found: dict[str, Any]) -> list[str]:
    """Return unused checkpoint weights of modules that the network has, such as a thirteenth layer for a network of twelve.

    Weights of heads that the network does not have are not included.
    """
    own = {name for name, _ in network.named_modules() if name.endswith(".layers") or name.endswith(".conv_layers")}
    surplus = []
    for key in sorted(found["unexpected_keys"]):
        parent = re.split(r"\.\d+\.", key, maxsplit=1)[0]
        if any(parent == name or parent.endswith(f".{name}") or name.endswith(f".{parent}") for name in own):
            surplus.append(key)
    return surplus


def _all_begin_with(found: dict[str, Any], prefix: str) -> bool:
    keys = found["unexpected_keys"]
    return bool(keys) and all(key.startswith(prefix) for key in keys)


def weights_digest(network: torch.nn.Module, without: Container[str] = ()) -> str:
    """Return a checksum of the weights of a network, except for some names."""
    found = hashlib.sha256()
    for name, value in network.state_dict().items():
        if name in without:
            continue
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def local_config(source: str) -> dict[str, Any]:
    """Return the config.json of a complete model in a local directory; an empty dictionary for an adapter or a hub id."""
    return read_config(source) if os.path.isdir(source) and not is_adapter(source) else {}


def refuse_quantised(source: str, config: dict[str, Any]) -> None:
    """Reject a model saved quantised: its weights have another number format and need other kernels.

    Raises
    ------
    UserError
        Naming the method.
    """
    about = config.get("quantization_config")
    if not about:
        return
    method = about.get("quant_method", "an unknown method") if isinstance(about, dict) else str(about)
    bits = [f"{n} bits" for n in (8, 4) if isinstance(about, dict) and about.get(f"load_in_{n}bit")]
    raise UserError(
        f"'{source}' was saved quantised, by {method}{f' ({bits[0]})' if bits else ''}, which is not supported here. "
        + QUANTISED_HINT
    )


def is_adapter(source: str) -> bool:
    """Whether a local directory contains a peft adapter instead of a complete model."""
    folder = Path(source)
    return (
        os.path.isdir(source) and (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()
    )


def load_config(source: str, kind: type = AutoConfig, what: str = "model directory") -> Any:
    """Load a model's configuration (or its tokenizer) from a local directory or hub id; see `refuse_quantised`.

    Raises
    ------
    UserError
        If it cannot be loaded, or the model was saved quantised.
    """
    try:
        with quiet_transformers():
            config = kind.from_pretrained(source, **hub_options(source))
    except _LOADING_ERRORS as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise not_found(source, what, reason) from None
    if kind is AutoConfig:
        refuse_quantised(source, config.to_dict())
    return config
