"""The console script: `efficient-asr COMMAND ...`, also `python -m efficient_asr COMMAND ...`."""

from __future__ import annotations

import importlib
import os
import sys

from efficient_asr.utils.errors import UserError, did_you_mean, exit_code

COMMANDS = {
    "transcribe": "audio files, folders and calls to text, subtitles or tables",
    "evaluate": "WER, MACs and runtime of a model on a manifest",
    "time": "runtimes only, added to a result: on another device, for example",
    "report": "tables and plots of results; is a difference significant?",
    "compare": "several models on the same recordings: WER, MACs, and times in interleaved rounds",
    "calibrate": "a copy of a Whisper that encodes each utterance on its own length, without training",
    "app": "web page for models, with an endpoint for programs; explorer of results",
    "model_card": "README.md of a model folder, with its results",
    "publish": "a model folder with its card, on the Hugging Face Hub or in another folder",
    "export": "a trained model for transformers, SpeechBrain, ONNX Runtime or faster-whisper",
}


def usage() -> str:
    """Return the help text of the console script."""
    lines = [f"  {name:12}{what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: efficient-asr COMMAND ...",
            "",
            *lines,
            "",
            "efficient-asr COMMAND --help shows the options of a command. Models are trained by the recipes:",
            "python recipes/<exp>/train.py hparams/<exp>.yaml",
        ]
    )


def run_command(name: str, argv: list[str]) -> int:
    """Run one command and return its exit code."""

    def work() -> None:
        if name not in COMMANDS:
            raise UserError(f"there is no command '{name}'.{did_you_mean(name, COMMANDS)}\n{usage()}")
        importlib.import_module(f"efficient_asr.commands.{name}").main(argv)

    return exit_code(work)


def main(argv: list[str] | None = None) -> int:
    """Run the console script and return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    sys.argv[0] = f"{os.path.basename(sys.argv[0])} {arguments[0]}"  # the program's name in argparse's messages
    return run_command(arguments[0], arguments[1:])
