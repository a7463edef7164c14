"""Settings: YAML files and the command line, merged and checked before anything runs.

YAML files are HyperPyYAML and can execute code: run only those you trust. `base: !include:other.yaml` (or a list of them) takes
over all keys of another file; the file's own keys win, and every key can be overridden on the command line.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import io
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ruamel.yaml
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml.comments import CommentedMap, CommentedSeq, TaggedScalar
from speechbrain.utils.run_opts import RunOptions

from efficient_asr.command_line import Overrides, key_hint
from efficient_asr.errors import UserError
from efficient_asr.text import NORMALISERS

# Lowest value of numeric keys; whole numbers where the limit is one.
LIMITS: dict[str, int | float] = {
    "batch_size": 1, "test_batch_size": 1, "number_of_epochs": 1, "num_workers": 0, "runtime_repeats": 0, "threads": 0,
    "frames_per_state": 1, "head_neurons": 1, "head_layers": 1, "lm_beam_size": 1, "grad_accumulation_factor": 1,
    "downsampling_kernel": 1, "max_batch_length_s": 1e-3, "max_duration_s": 1e-3, "lr_encoder": 0.0, "lr_head": 0.0,
    "max_grad_norm": 1e-9, "head_dropout": 0.0, "augment_probability": 0.0, "nonfinite_patience": 0,
    "ckpt_interval_minutes": 0.0, "calibration_utterances": 1, "exit_patience": 1, "first_step_epochs": 0, "lr": 0.0,
    "weight_decay": 0.0, "num_beams": 1, "label_smoothing": 0.0, "calibrate_large_share": 0.0, "calibrate_macs_g": 0.0,
    "calibrate_wer_percent": 0.0, "cyclic_lr_steps": 1, "calibrate_mean_layer": 1.0, "calibrate_wer_loss_percent": -100.0,
    "test_layerdrop_seed": 0, "gate_budget": 0.0, "gate_dim": 1, "expert_rank": 1, "skip_gate_prob": 0.0, "teacher_entries": 1,
    "lora_rank": 1, "lora_alpha": 0.0, "lora_dropout": 0.0, "warmup_ratio": 0.0, "temperature": 1e-3, "kd_warm_up": 0.0,
    "lr_gates": 0.0, "expert_dropout": 0.0,
}  # fmt: skip

# Those that are shares, so that 1 is the most; of warmup_ratio and kd_warm_up their classes see to it.
SHARES = frozenset(
    "gate_budget skip_gate_prob expert_dropout head_dropout lora_dropout label_smoothing augment_probability "
    "calibrate_large_share".split()
)

OPEN_KEYS = ("kept_layers", "expert_layers")  # a number, a word or a list

# Keys that are null, or must be given, in the YAML files and mean a text: what is given for them is never a number.
TEXT_KEYS = frozenset(
    "experiment recipe variant corpus corpus_name data_folder prepared_folder output_folder results_folder lm_path source "
    "pretrained_model language teacher teacher_cache noise_manifest rir_manifest states_folder labels_folder".split()
)

# Keys that a training does not depend on: they may change between its start and its end.
FREE_KEYS = frozenset(
    "experiment output_folder results_folder test_only train_only go_on skip_bad check_audio corpus_name "
    "prepared_folder test_splits test_normaliser num_workers threads test_batch_size measure_macs measure_runtime "
    "runtime_repeats time_lm lm_path lm_alpha lm_beta lm_beam_size lm_case number_of_epochs ckpt_interval_minutes "
    "nonfinite_patience tensorboard data_folder epoch_counter recipe variant test_layerdrop test_layerdrop_seed "
    "exit_rule exit_threshold exit_patience calibrate_mean_layer calibrate_wer_loss_percent language task num_beams "
    "length_penalty timestamps temperatures no_speech_threshold long_audio calibrate_large_share calibrate_macs_g "
    "calibrate_wer_percent keep_checkpoints".split()
)


def merge_includes(path: Path) -> CommentedMap:
    """Read a YAML file without constructing anything, with the keys of its `base` files merged in.

    Raises
    ------
    UserError
        Where a file is missing or is not YAML.
    """
    merged = CommentedMap()
    for tree in _files(path):
        merged.update(tree)
    return merged


def nullable_keys(path: Path) -> set[str]:
    """Return the keys of a YAML file that may be null: they are in one of its files, or the comment beside them says so."""
    keys = set()
    for tree in _files(path):
        for key, value in tree.items():
            comment = tree.ca.items.get(key, [None] * 3)[2]
            if value is None or (comment is not None and re.search(r"\bnull\b", comment.value)):
                keys.add(key)
    return keys


def _files(path: Path) -> Iterator[CommentedMap]:
    """Yield the trees of a YAML file's bases, and its own last."""
    yaml = ruamel.yaml.YAML()
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"no YAML file at {path}") from None
    except (ruamel.yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, CommentedMap):
        raise UserError(f"{path} holds no keys")
    bases = tree.pop("base", [])
    for base in bases if isinstance(bases, list) else [bases]:
        tag = base.tag.value if isinstance(base, TaggedScalar) else ""
        if not tag.startswith("!include:"):
            raise UserError(f"{path}: base must be !include:<file> or a list of these")
        yield from _files(Path(path).parent / tag.removeprefix("!include:"))
    for key, value in tree.items():
        if isinstance(value, datetime.date):  # `experiment: 2024-01-01` is a name
            tree[key] = value.isoformat()
    yield tree


def load_hparams(
    path: Path, overrides: dict[str, Any], run_opts: RunOptions | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Construct the objects of a YAML file.

    Returns
    -------
    hparams : dict
        Every key with its value or object.
    plain : dict
        The keys with plain values, as they take effect, for the record.

    Raises
    ------
    UserError
        For an unknown key (naming the closest), a value that does not fit, and what the classes themselves refuse.
    """
    tree = overridden(path, overrides)
    for key in run_opts.overridden_args if run_opts is not None else ():
        _check_limit(key, getattr(run_opts, key))
    for key, value in tree.items():
        if isinstance(value, TaggedScalar) and value.tag.value == "!PLACEHOLDER":
            raise UserError(f"{path}: '{key}' must be given, for example --{key} VALUE")
        _check_limit(key, value)
    stream = io.StringIO()
    ruamel.yaml.YAML().dump(tree, stream)
    try:
        hparams = load_hyperpyyaml(stream.getvalue())
    except (ImportError, AttributeError, TypeError, ValueError, KeyError, RuntimeError, ruamel.yaml.YAMLError) as error:
        raise UserError(f"{path}: {error}") from error
    plain = {k: v for k, v in hparams.items() if isinstance(v, (str, int, float, list, dict, type(None)))}
    plain |= {k: _words(v) for k, v in tree.items() if k not in plain and not k.startswith("__")}  # objects
    for key in run_opts.overridden_args if run_opts is not None else ():  # options that SpeechBrain takes to itself
        if key in plain:
            plain[key] = getattr(run_opts, key)
    return hparams, plain


def training_settings(path: Path, overrides: dict[str, Any], run_opts: RunOptions) -> dict[str, str]:
    """Return what a training depends on, as text by key: the YAML's own words, objects included."""
    tree = overridden(path, overrides)
    # options of the command line that SpeechBrain takes to itself
    tree.update({key: getattr(run_opts, key) for key in run_opts.overridden_args if key in tree})
    return {key: _words(value) for key, value in tree.items() if key not in FREE_KEYS}


def _words(value: Any) -> str:
    """Return a value as its YAML file writes it, on one line and without comments."""
    stream = io.StringIO()
    yaml = ruamel.yaml.YAML()
    yaml.width = 1 << 20
    yaml.dump(CommentedMap({"x": _without_comments(copy.deepcopy(value))}), stream)
    return " ".join(line.strip() for line in stream.getvalue().split("\n") if line.strip())[3:]


def _without_comments(value: Any) -> Any:
    """Take the comments out of a value in place, and return it."""
    if isinstance(value, (CommentedMap, CommentedSeq)):
        value.ca.items.clear()
        value.ca.comment = None
        value.ca.end = []
        for item in value.values() if isinstance(value, CommentedMap) else value:
            _without_comments(item)
    return value


def overridden(path: Path, overrides: dict[str, Any]) -> CommentedMap:
    """Return the tree of a YAML file with the values of the command line.

    Raises
    ------
    UserError
        For an unknown key, naming the closest, and for a value that does not fit.
    """
    tree = merge_includes(path)
    if not overrides:
        return tree
    nullable = nullable_keys(path)
    text = overrides.text if isinstance(overrides, Overrides) else {}
    for key, value in overrides.items():
        if key not in tree:
            raise UserError(f"--{key}: {_unknown(key, path, tree)}")
        default, written = tree[key], text.get(key, "")
        if written is None and not isinstance(default, bool):
            raise UserError(f"--{key} needs a value; it is {default!r} now")
        if written and value is not None and _is_text(key, default) and not _tag(value):
            value = value if isinstance(value, str) else written
        if isinstance(default, (CommentedSeq, CommentedMap)) and isinstance(value, str) and value[:1] in ("[", "{"):
            raise UserError(
                f"command line: '--{key} {value}' cannot be read as --key value pairs; is a bracket or quotation mark left open?"
            )
        if not (value is None and key in nullable):
            _check_type(key, default, value)
        tree[key] = value
    return tree


def _tag(value: Any) -> str:
    """Return the YAML tag of a value, such as `!new:torch.nn.Linear`; empty for none."""
    return getattr(getattr(value, "tag", None), "value", None) or ""


def _is_text(key: str, default: Any) -> bool:
    """Whether the value of a key is a text whatever it looks like."""
    tag = _tag(default)
    if tag == "!ref":  # one key alone is of that key's type
        return re.fullmatch(r"<[^<>]*>", str(default.value)) is None
    return (not tag and isinstance(default, str) and key not in OPEN_KEYS) or key in TEXT_KEYS


def _unknown(key: str, path: Path, tree: CommentedMap) -> str:
    """Return what to say of a key that a YAML file does not have."""
    head, dot, inner = key.partition(".")
    if not dot or head not in tree:
        return f"{path} has no such key.{key_hint(key, tree)}"
    value = tree[head]
    for part in inner.split("."):
        value = value.get(part) if isinstance(value, CommentedMap) else None
    reference = re.fullmatch(r"<([^<>]*)>", str(value.value)) if _tag(value) == "!ref" else None
    if reference:
        return f"keys inside others cannot be given; write --{reference[1]}, which it is taken from"
    what = f"give the whole of it: --{head} '{_words(tree[head])}' with your value in it"
    return f"keys inside others cannot be given; {what}"


def _check_type(key: str, default: Any, value: Any) -> None:
    """Refuse a number where a word stood, and the like."""
    if _tag(value):
        return  # an object of the user's choice
    tag = _tag(default)
    if tag and not tag.startswith(("!PLACEHOLDER", "!ref")):
        raise UserError(
            f"--{key}: it is an object ({tag}); change its settings, or give another !new: or !name: object"
        )
    for kind in (bool, (int, float), str, CommentedSeq, CommentedMap):
        if isinstance(default, kind) and not tag and key not in OPEN_KEYS:
            fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
            fits = fits or (kind is str and value is None) or (kind is CommentedSeq and isinstance(value, str))
            if not fits:
                raise UserError(f"--{key}: {value!r} does not fit; its value is {default!r} now")
            return


def _check_limit(key: str, value: Any) -> None:
    """Refuse numbers that make no sense."""
    if key in LIMITS and value is not None and not isinstance(value, (TaggedScalar, CommentedMap)):
        least = LIMITS[key]
        whole = isinstance(least, int)
        if (
            isinstance(value, bool)
            or not isinstance(value, int if whole else (int, float))
            or not least <= value < math.inf
        ):
            raise UserError(f"{key}: {value!r} is not a {'whole ' if whole else ''}number of at least {least}")
        if key in SHARES and value > 1:
            raise UserError(f"{key}: {value!r} is not a share, a number from 0 to 1")


# ---------------------------------------------------------------- the commands that measure a model on a manifest


def measuring_parser(description: str, repeats: int | None) -> argparse.ArgumentParser:
    """Return a parser of the options that these commands share; `repeats` is the default of timed runs, None for none at all."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--manifest", type=Path, required=True, help="JSON lines: id, audio, duration, text")
    parser.add_argument("--columns", default="{}", help="other column names, e.g. '{audio: path, text: sentence}'")
    parser.add_argument(
        "--normaliser", default="plain", choices=sorted(NORMALISERS), help="of references and hypotheses"
    )
    if repeats is not None:
        parser.add_argument(
            "--batch_size", type=at_least(1), default=8, help="runtimes are taken at batch 1 and at this size"
        )
        parser.add_argument("--repeats", type=at_least(0), default=repeats, help="timed runs; 0 leaves runtimes out")
    parser.add_argument(
        "--skip_bad",
        type=yes_or_no,
        nargs="?",
        const=True,
        default=False,
        help="leave bad lines out instead of stopping",
    )
    return parser


def yes_or_no(value: str) -> bool:
    """Read True or False, as the recipes take it."""
    if value.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{value!r} is not True or False")
    return value.lower() == "true"


def at_least(least: int) -> Callable[[str], int]:
    """Return a reader of whole numbers with a lower limit."""

    def read(value: str) -> int:
        if not value.lstrip("-").isdigit() or int(value) < least:
            raise argparse.ArgumentTypeError(f"{value!r} is not a whole number of at least {least}")
        return int(value)

    return read


def parse_columns(text: str) -> Any:
    """Read the value of `--columns`.

    Raises
    ------
    UserError
        Where it is not YAML.
    """
    try:
        return ruamel.yaml.YAML(typ="safe").load(text)
    except ruamel.yaml.YAMLError:
        raise UserError(f"--columns: {text!r} cannot be read; write '{{audio: path, text: sentence}}'") from None


def add_lm_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of decoding with a language model, for CTC models."""
    group = parser.add_argument_group("language models, for CTC models")
    group.add_argument("--lm", help="ARPA file or kenlm binary")
    group.add_argument("--lm_alpha", type=float, help="its weight (0.5)")
    group.add_argument("--lm_beta", type=float, help="reward for each word (1.0)")
    group.add_argument("--lm_beam_size", type=at_least(1), help="hypotheses kept a frame (100)")
    group.add_argument("--lm_case", choices=["lower", "upper"], help="how it writes its words (lower)")


def lm_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return those that were given, for `load_transcriber`.

    Raises
    ------
    UserError
        For options of a language model without one.
    """
    names = ("alpha", "beta", "beam_size", "case")
    given = {name: getattr(args, f"lm_{name}") for name in names if getattr(args, f"lm_{name}") is not None}
    if given and not args.lm:
        raise UserError(f"--lm_{next(iter(given))}: there is no language model; name one with --lm")
    return {"lm_path": args.lm} | given if args.lm else {}


def add_whisper_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of Whisper's decoding and of long audio, for models and cascades."""
    group = parser.add_argument_group("Whisper and cascades")
    group.add_argument(
        "--language",
        help="language of the audio (ISO 639-1), or 'manifest': what each line says; detected where not given",
    )
    group.add_argument(
        "--long_audio", choices=("pauses", "overlap", "sequential"), default="pauses", help="how long audio is cut"
    )
    group.add_argument("--task", choices=("transcribe", "translate"), help="translate: into English")
    group.add_argument("--num_beams", type=at_least(1), help="beam search; 1 (the default) is greedy")
    group.add_argument("--length_penalty", type=float, help="of beam search")
    group.add_argument("--max_new_tokens", type=at_least(1), help="most tokens of a transcript")
    group.add_argument(
        "--max_tokens_per_s", type=float, help="ends a transcript after 10 tokens and so many a second of audio"
    )
    group.add_argument("--timestamps", action="store_true", default=None, help="predict timestamps")
    group.add_argument("--temperatures", type=float, nargs="+",
        help="fallback; by default none for short audio, and Whisper's own (0 0.2 0.4 0.6 0.8 1) for pieces of long audio",
    )  # fmt: skip
    group.add_argument(
        "--no_speech_threshold", type=float, help="empty text where silence is likelier (Whisper's own: 0.6)"
    )


def whisper_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return those that were given, for `load_transcriber`."""
    names = (
        "task",
        "num_beams",
        "length_penalty",
        "max_new_tokens",
        "max_tokens_per_s",
        "timestamps",
        "temperatures",
        "no_speech_threshold",
    )
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return {"language": args.language, "long_audio": args.long_audio, **given}
