"""Load peft adapters by merging them into their Whisper base model."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from efficient_asr.models.hub import model_source
from efficient_asr.utils.errors import UserError


def load_adapted(kind: Any, source: str) -> Any:
    """Load a Whisper (`kind`, with `from_source`) from an adapter and its base; see `merge_adapter`."""
    base, network = merge_adapter(source, lambda name: kind.from_source(model_source(name)))
    own = any((Path(source) / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    tokenizer = type(base.tokenizer).from_pretrained(source) if own else base.tokenizer
    return type(base)(network, tokenizer).eval()


def merge_adapter(source: str, load_base: Callable[[str], Any]) -> tuple[Any, Any]:
    """Load an adapter's base, and merge the adapter into its network.

    Arguments
    ---------
    source : str
        Directory that contains adapter_config.json.
    load_base : callable
        Loads a model by name; the model has the attribute `network`.

    Returns
    -------
    base : Any
        The return value of `load_base`.
    network : torch.nn.Module
        The network of `base` with the adapter merged into it.

    Raises
    ------
    UserError
        If peft is not installed, the base cannot be loaded, or the adapter does not match it.
    """
    how = (
        "To merge it elsewhere: PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(other_folder), and "
        "save the base's tokenizer there too."
    )
    try:
        from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights
    except ImportError:
        raise UserError(f"'{source}' is an adapter, which requires peft: pip install peft. {how}") from None
    try:
        name = PeftConfig.from_pretrained(source).base_model_name_or_path
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"'{source}': adapter_config.json cannot be read ({str(error).splitlines()[0]})") from None
    if not name:
        raise UserError(f"'{source}': adapter_config.json has no base_model_name_or_path. {how}")
    try:
        base = load_base(name)
    except UserError as error:
        raise UserError(f"'{source}' is an adapter for '{name}', which cannot be loaded: {error}. {how}") from None
    try:
        adapted = PeftModel.from_pretrained(base.network, source)
        own = set(get_peft_model_state_dict(adapted))
        given = set(load_peft_weights(source, device="cpu"))
        network = adapted.merge_and_unload()
    except pickle.UnpicklingError as error:  # torch reads weights only
        raise UserError(f"'{source}' is not a file of weights ({str(error).splitlines()[0]})") from None
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"'{source}' does not match its base '{name}' ({str(error).splitlines()[0]})") from None
    missing = sorted(own - given)
    if missing:  # peft would leave them random and only print a warning
        raise UserError(f"'{source}' lacks {len(missing)} of its weights ({missing[0]}); copy the adapter again")
    return base, network
