"""Settings: YAML files and the command line, merged and checked before anything runs.

YAML files are HyperPyYAML and can execute code: run only those you trust. `base: !include:other.yaml` (or a list of them) takes
over all keys of another file; the file's own keys win, and every key can be overridden on the command line.
"""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ruamel.yaml
import torch
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml.comments import CommentedMap, CommentedSeq, TaggedScalar
from speechbrain.utils.run_opts import RunOptions

from efficient_asr.errors import UserError, did_you_mean
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

# Keys that a training does not depend on: they may change between its start and its end.
FREE_KEYS = frozenset(
    "experiment output_folder results_folder test_only train_only go_on skip_bad check_audio corpus_name "
    "prepared_folder test_splits test_normaliser num_workers threads test_batch_size measure_macs measure_runtime "
    "runtime_repeats time_lm lm_path lm_alpha lm_beta lm_beam_size lm_case number_of_epochs ckpt_interval_minutes "
    "nonfinite_patience tensorboard data_folder epoch_counter recipe variant test_layerdrop test_layerdrop_seed "
    "exit_rule exit_threshold exit_patience calibrate_mean_layer calibrate_wer_loss_percent language task num_beams "
    "length_penalty timestamps temperatures no_speech_threshold long_audio calibrate_large_share calibrate_macs_g "
    "calibrate_wer_percent".split()
)


def merge_includes(path: Path) -> CommentedMap:
    """Read a YAML file without constructing anything, with the keys of its `base` files merged in.

    Raises
    ------
    UserError
        Where a file is missing or is not YAML.
    """
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
    merged = CommentedMap()
    for base in bases if isinstance(bases, list) else [bases]:
        tag = base.tag.value if isinstance(base, TaggedScalar) else ""
        if not tag.startswith("!include:"):
            raise UserError(f"{path}: base must be !include:<file> or a list of these")
        merged.update(merge_includes(Path(path).parent / tag.removeprefix("!include:")))
    merged.update(tree)
    return merged


def parse_command_line(argv: list[str]) -> tuple[Path, RunOptions, dict[str, Any]]:
    """Return the YAML file, SpeechBrain's run options, and overrides of YAML keys.

    Raises
    ------
    UserError
        Where there is no YAML file or an argument is malformed.
    """
    if not argv or argv[0].startswith("-"):
        raise UserError("name a YAML file first: python recipes/<exp>/train.py hparams/<exp>.yaml [--key value ...]")
    arguments = _split_test_only(argv)
    try:
        path, run_opts, text = RunOptions.from_command_line_args(arguments)
        lines = {line.partition(":")[0]: line for line in (text or "").splitlines()}  # of a key given twice, the last
        values = ruamel.yaml.YAML().load("\n".join(lines.values())) or {}
        overrides = dict(values)
    except Exception as error:  # argparse's and YAML's many ways to refuse a stray word or a bracket left open
        raise UserError(f"command line: {' '.join(argv[1:])!r} cannot be read as --key value pairs ({error})") from None
    for key in run_opts.overridden_args:
        _check_limit(key, getattr(run_opts, key))
    _check_device(run_opts.device)
    if "distributed_backend" not in run_opts.overridden_args and (
        run_opts.device == "cpu" or not torch.cuda.is_available()
    ):
        # NCCL, SpeechBrain's default, is for GPUs.
        _, run_opts, _ = RunOptions.from_command_line_args([*arguments, "--distributed_backend=gloo"])
    return Path(path), run_opts, overrides


def _check_device(device: str | None) -> None:
    """Refuse a device that is none, or is not here."""
    if device is None:
        return
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UserError(f"--device: '{device}' is no device; write cpu or cuda") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: there is no usable GPU here; write --device cpu")


def _split_test_only(argv: list[str]) -> list[str]:
    """Let `--test_only True` mean what SpeechBrain's bare `--test_only` means."""
    out, skip = [], False
    for i, arg in enumerate(argv):
        if skip:
            skip = False
            continue
        name, _, value = arg.partition("=")
        if name == "--test_only":
            following = argv[i + 1].lower() if i + 1 < len(argv) else ""
            skip = not value and following in ("true", "false")
            if (value.lower() or (following if skip else "true")) == "true":
                out.append(name)
        else:
            out.append(arg)
    return out


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
    tree = merge_includes(path)
    for key, value in overrides.items():
        if key not in tree:
            raise UserError(f"--{key}: {path} has no such key.{did_you_mean(key, tree)}")
        _check_type(key, tree[key], value)
        tree[key] = value
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
    for key in run_opts.overridden_args if run_opts is not None else ():  # options that SpeechBrain takes to itself
        if key in plain:
            plain[key] = getattr(run_opts, key)
    return hparams, plain


def training_settings(path: Path, overrides: dict[str, Any], run_opts: RunOptions) -> dict[str, str]:
    """Return what a training depends on, as text by key: the YAML's own words, objects included."""
    tree = merge_includes(path)
    tree.update(overrides)
    # options of the command line that SpeechBrain takes to itself
    tree.update({key: getattr(run_opts, key) for key in run_opts.overridden_args if key in tree})
    settings = {}
    for key, value in tree.items():
        if key not in FREE_KEYS:
            stream = io.StringIO()
            ruamel.yaml.YAML().dump(CommentedMap({"x": value}), stream)
            lines = [line.split(" #")[0].strip() for line in stream.getvalue().splitlines()]
            settings[key] = " ".join(line for line in lines if line and not line.startswith("#"))[3:]
    return settings


def _check_type(key: str, default: Any, value: Any) -> None:
    """Refuse a number where a word stood, and the like."""
    if getattr(getattr(value, "tag", None), "value", None):
        return  # an object of the user's choice
    tag = getattr(getattr(default, "tag", None), "value", None)
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
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
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


def add_whisper_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of Whisper's decoding and of long audio, for models and cascades."""
    group = parser.add_argument_group("Whisper and cascades")
    group.add_argument(
        "--language",
        help="language of the audio (ISO 639-1), or 'manifest': what each line says; detected where not given",
    )
    group.add_argument(
        "--long_audio", choices=("overlap", "pauses", "sequential"), default="overlap", help="how long audio is cut"
    )
    group.add_argument("--task", choices=("transcribe", "translate"), help="translate: into English")
    group.add_argument("--num_beams", type=at_least(1), help="beam search; 1 (the default) is greedy")
    group.add_argument("--length_penalty", type=float, help="of beam search")
    group.add_argument("--max_new_tokens", type=at_least(1), help="most tokens of a transcript")
    group.add_argument(
        "--max_tokens_per_s", type=float, help="ends a transcript after 10 tokens and so many a second of audio"
    )
    group.add_argument("--timestamps", action="store_true", default=None, help="predict timestamps")
    group.add_argument("--temperatures", type=float, nargs="+", help="fallback: 0 0.2 0.4 0.6 0.8 1 are Whisper's own")
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
