"""The command line of recipes: a YAML file, SpeechBrain's run options, and `--key value` for any key of the YAML file.

Each value is parsed separately, and a string stays a string: `/x/corpus #2`, `a: b` and `@home` are taken literally. Only
numbers, True, False, null, lists in [], maps in {} and HyperPyYAML's objects (`!new:`, `!name:`, `!apply:`, `!ref`) are
interpreted. Option names cannot be abbreviated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ruamel.yaml
import torch
from speechbrain.utils.run_opts import RunOptions

from efficient_asr.utils.devices import choose_device, named_device
from efficient_asr.utils.errors import UserError, did_you_mean

_OBJECTS = ("!new:", "!name:", "!apply:", "!ref ", "!copy ")
_SCALAR = re.compile(r"[-+.\w]+|~")
_LISTS = ("jit_module_keys", "compile_module_keys")
_HIDDEN = ("param_file", "overridden_args", "tqdm_barcolor")
RUN_OPTIONS = {field.name: field.default for field in dataclasses.fields(RunOptions) if field.name not in _HIDDEN}
# Names that other programs use for our keys, or for parts of them.
_SYNONYMS = {
    "learning_rate": "lr",
    "num_epochs": "epochs",
    "max_epochs": "epochs",
    "n_epochs": "epochs",
    "optim": "optimizer",
}


_REFUSED = {  # options of SpeechBrain's that would do nothing here, or not what the Result says
    "auto_mix_prec": "use --precision fp16",
    "bfloat16_mix_prec": "use --precision bf16",
    "remove_vector_weight_decay": "not supported; set weight_decay in the YAML file",
}


class Overrides(dict[str, Any]):
    """Values of YAML keys given on the command line.

    Attributes
    ----------
    text : dict
        Each value as written; None for an option without a value.
    """

    def __init__(self) -> None:
        super().__init__()
        self.text: dict[str, str | None] = {}


def parse_command_line(argv: list[str], here: bool = True) -> tuple[Path, RunOptions, Overrides]:
    """Return the YAML file, SpeechBrain's run options, and overrides of YAML keys.

    `here` says whether this machine must have the device.

    Raises
    ------
    UserError
        If there is no YAML file, or an argument is malformed.
    """
    if not argv or argv[0].startswith("-"):
        raise UserError(
            "the first argument must be a YAML file: python recipes/<exp>/train.py hparams/<exp>.yaml [--key VALUE]"
        )
    overrides, options, refused = Overrides(), [argv[0]], []
    rest = list(argv[1:])
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--") or len(name) < 3:
            raise UserError(f"command line: cannot parse {name!r}; use --key value pairs after the YAML file")
        key = name[2:]
        if key in _REFUSED:
            raise UserError(f"{name}: {_REFUSED[key]}")
        if key in _LISTS:
            options.append(name)
            while rest and not rest[0].startswith("--"):
                options.append(rest.pop(0))
            continue
        flag = RUN_OPTIONS.get(key) is False
        given: str | None = value if equals else None
        if given is None and rest and not rest[0].startswith("--"):
            if not flag or rest[0].lower() in ("true", "false"):
                given = rest.pop(0)
        if flag:
            if (given or "true").lower() not in ("true", "false"):
                raise UserError(f"{name}: {given!r} is not True or False")
            (options if (given or "true").lower() == "true" else refused).append(name)
        elif key in RUN_OPTIONS:
            if given is None:
                raise UserError(f"{name} needs a value")
            options.append(f"{name}={given}")
        else:
            overrides[key] = True if given is None else read_value(given)
            overrides.text[key] = given
    run_opts = _run_options(options)
    if here:
        choose_device(run_opts.device)
    elif run_opts.device is not None:
        named_device(run_opts.device)
    if "distributed_backend" not in run_opts.overridden_args and (
        run_opts.device == "cpu" or not torch.cuda.is_available()
    ):
        # NCCL, SpeechBrain's default, requires GPUs.
        run_opts = _run_options([*options, "--distributed_backend=gloo"])
    off = {name[2:]: False for name in refused}  # flags that a YAML file may set
    run_opts = dataclasses.replace(run_opts, **off, overridden_args={*run_opts.overridden_args, *off})
    return Path(argv[0]), run_opts, overrides


def _run_options(arguments: list[str]) -> RunOptions:
    """Let SpeechBrain parse its options; argparse errors are raised as `UserError`."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options = RunOptions.from_command_line_args(arguments)[1]
    except SystemExit:
        raise UserError(f"command line: {said.getvalue().strip().rpartition('error: ')[2]}") from None
    limit = options.optimizer_step_limit  # SpeechBrain leaves it a string, and compares it with a number
    if limit is None:
        return options
    if not limit.isdecimal() or int(limit) < 1:
        raise UserError(f"--optimizer_step_limit: {limit!r} is not a whole number of at least 1")
    return dataclasses.replace(options, optimizer_step_limit=int(limit))


def read_value(text: str) -> Any:
    """Parse a value; see the module docstring."""
    yaml = ruamel.yaml.YAML()
    quoted = len(text) > 1 and text[0] in "'\"" and text[-1] == text[0]
    if not (_SCALAR.fullmatch(text) or quoted or text[:1] in ("[", "{") or text.startswith(_OBJECTS)):
        return text
    try:
        value = yaml.load(text)
    except ruamel.yaml.YAMLError:
        return text
    if _SCALAR.fullmatch(text) and not isinstance(value, (bool, int, float, type(None))):
        return text  # a date, for example
    return str(value) if isinstance(value, str) else value


def key_hint(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'number_of_epochs'?` for an unknown key: the keys that start with it or contain it as a word."""
    known = [*known, *RUN_OPTIONS]
    name = _SYNONYMS.get(name, name)
    close = [key for key in known if key.startswith(name) or name in key.split("_")] if len(name) > 1 else []
    close = list(dict.fromkeys(close))[:4]
    if not close:
        return did_you_mean(name, known)
    words = [f"'{key}'" for key in close]
    return f" Did you mean {' or '.join(filter(None, [', '.join(words[:-1]), words[-1]]))}?"
