"""Settings of a step that is not a training: a YAML file and `--key value`, as for train.py, and a copy beside the output."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficient_asr.settings.command_line import parse_command_line
from efficient_asr.settings.help import recipe_help
from efficient_asr.settings.yaml import complete_yaml, load_hparams
from efficient_asr.text.languages import normalise_or_keep
from efficient_asr.utils.devices import choose_device
from efficient_asr.utils.errors import UserError, check_writable
from efficient_asr.utils.files import atomic_write_text


@dataclass
class Step:
    """The settings of one command.

    Attributes
    ----------
    hparams : dict
        All keys with their values or objects.
    plain : dict
        All keys with plain values.
    asked : str or None
        Device of the command line.
    text : str
        The YAML file with its includes and the values of the command line.
    """

    hparams: dict[str, Any]
    plain: dict[str, Any]
    asked: str | None
    text: str

    @property
    def device(self) -> str:
        """The device to run on: `cpu`, `cuda` or `cuda:1`.

        Raises
        ------
        UserError
            If this machine does not have it.
        """
        return choose_device(self.asked)

    def keep(self, name: str) -> Path:
        """Write copies of the settings into the output folder: `<name>.yaml`, and `<name>.json` with plain values; return it."""
        folder = Path(self.hparams["output_folder"])
        check_writable(folder, "output_folder")
        atomic_write_text(folder / f"{name}.yaml", self.text)
        atomic_write_text(folder / f"{name}.json", json.dumps(self.plain, indent=1, default=str) + "\n")
        return folder


def read_step(script: str, recipe: str, argv: list[str] | None = None) -> Step | None:
    """Read the command line of `recipes/<recipe>/<script>`; None if it only asks for help or for the YAML, which is printed.

    Arguments
    ---------
    script : str
        Name of the script, such as `label.py`.
    recipe : str
        Name of the recipe; YAML files of other recipes are rejected.
    argv : list of str, optional
        Arguments; by default those of the process.

    Raises
    ------
    UserError
        For an invalid command line or YAML file.
    """
    argv = sys.argv[1:] if argv is None else argv
    if {"--help", "-h"} & {*argv}:
        path = Path(argv[0]) if argv[0].endswith((".yaml", ".yml")) else None
        print(recipe_help(path, recipe, "", script))
        return None
    path, run_opts, overrides = parse_command_line([word for word in argv if word != "--print_yaml"], here=False)
    for key in run_opts.overridden_args:
        if key not in ("device", "distributed_backend") and getattr(run_opts, key) is not False:
            raise UserError(f"--{key}: {script} trains nothing and has no such option")
    text = complete_yaml(path, overrides, run_opts)
    if "--print_yaml" in argv:
        print(text, end="")
        return None
    hparams, plain = load_hparams(path, overrides, run_opts)
    if hparams["recipe"] != recipe:
        raise UserError(f"{path} belongs to recipes/{hparams['recipe']}, not to recipes/{recipe}")
    if "language" in hparams:
        hparams["language"] = normalise_or_keep(hparams["language"])
    return Step(hparams, plain, run_opts.device, text)
