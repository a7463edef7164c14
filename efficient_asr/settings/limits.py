"""Properties of the YAML keys: limits and special cases. Techniques declare those of their own keys."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ruamel.yaml.comments import CommentedMap, TaggedScalar

from efficient_asr.utils.errors import UserError
from efficient_asr.utils.technique import Key, techniques

_EVAL_ONLY = (
    "experiment output_folder results_folder test_only train_only allow_changed_settings skip_bad check_audio corpus_name "
    "prepared_folder test_splits test_normaliser threads measure_macs measure_runtime time_lm lm_path lm_alpha lm_beta lm_case "
    "tensorboard data_folder epoch_counter recipe variant techniques language task length_penalty max_new_tokens suppress "
    "timestamps temperatures compression_ratio_threshold logprob_threshold no_speech_threshold long_audio keep_checkpoints "
    "test_batch_size num_workers number_of_epochs nonfinite_patience ckpt_interval_minutes runtime_repeats lm_beam_size "
    "num_beams overlap_s long_audio_batch runtime_devices encoder_padding padding_s quantise backend retry_logprob "
    "layer_states_folder"
).split()
_TEXT = (
    "experiment recipe variant corpus corpus_name data_folder prepared_folder output_folder results_folder lm_path source "
    "pretrained_model language quantise backend noise_manifest rir_manifest layer_states_folder"
).split()
_NUMBERS: dict[str, Key] = {
    key.name: key
    for key in (
        Key("seed", 0), Key("batch_size", 1), Key("test_batch_size", 1), Key("num_workers", 0),
        Key("number_of_epochs", 1), Key("grad_accumulation_factor", 1), Key("max_grad_norm", 1e-9),
        Key("nonfinite_patience", 0), Key("ckpt_interval_minutes", 0.0),
        Key("round_lengths_s", 1e-3, former="null"), Key("max_batch_length_s", 1e-3),
        Key("length_jitter", 0.0, 0.5, former="0.05"), Key("epoch_batches", 1, former="null"), Key("max_duration_s", 1e-3),
        Key("threads", 0), Key("runtime_repeats", 0), Key("lm_beam_size", 1),
        Key("lr", 0.0), Key("lr_encoder", 0.0), Key("lr_head", 0.0), Key("weight_decay", 0.0), Key("warmup_ratio", 0.0),
        Key("label_smoothing", 0.0, 1.0), Key("augment_probability", 0.0, 1.0),
        Key("train_layerdrop", 0.0, 0.99, former="null"),
        Key("spec_augment_masks", 0, former="2"), Key("spec_augment_frames", 0, former="40"),
        Key("spec_augment_bands", 0, former="15"),
        Key("freeze_layers", 0, former="0"), Key("layer_states_folder", former="null"),
        Key("frames_per_state", 1), Key("head_neurons", 1), Key("head_layers", 1), Key("head_dropout", 0.0, 1.0),
        Key("num_beams", 1), Key("max_new_tokens", 1),
        Key("overlap_s", 0.0), Key("padding_s", 0.0), Key("long_audio_batch", 1),
    )
}  # fmt: skip


CORE_KEYS: dict[str, Key] = {
    name: dataclasses.replace(_NUMBERS.get(name, Key(name)), eval_only=name in _EVAL_ONLY, text=name in _TEXT)
    for name in (*_NUMBERS, *_EVAL_ONLY, *_TEXT)
} | {name: Key(name, former="False") for name in ("activation_checkpointing", "spec_augment")}


def known_keys() -> dict[str, Key]:
    """Return the properties of all keys that have any, by name."""
    return CORE_KEYS | {key.name: key for technique in techniques() for key in technique.keys}


def key_of(name: str) -> Key:
    """Return the properties of a key."""
    return known_keys().get(name, Key(name))


def former_values() -> dict[str, str]:
    """Return the values that were fixed before their keys existed, by key."""
    return {name: key.former for name, key in known_keys().items() if key.former is not None}


def check_limit(name: str, value: Any) -> None:
    """Reject a number outside the limits of its key.

    Raises
    ------
    UserError
        Naming the key and its limits.
    """
    key = key_of(name)
    if key.least is None or value is None or isinstance(value, (TaggedScalar, CommentedMap)):
        return
    whole = isinstance(key.least, int)
    number = not isinstance(value, bool) and isinstance(value, int if whole else (int, float))
    if not number or not key.least <= value < math.inf:
        raise UserError(f"{name}: expected {'an integer' if whole else 'a number'} >= {key.least}, got {value!r}")
    if key.most is not None and value > key.most:
        raise UserError(f"{name}: expected a number from {key.least:g} to {key.most:g}, got {value!r}")
