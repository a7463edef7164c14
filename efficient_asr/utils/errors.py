"""Errors caused by user input.

Anything the user can fix (a wrong key, a missing file, a broken line) is raised as `UserError`. Its message names the
cause and the remedy. Entry points print the message without a traceback and exit with code 2.
"""

from __future__ import annotations

import difflib
import errno
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rapidfuzz.distance import OSA, Jaro


class UserError(Exception):
    """Invalid user input; `str(error)` names the cause and the remedy."""


def print_json(content: Any) -> None:
    """Print one line of JSON, escaped to ASCII unless the output encoding is UTF-8, so that it stays valid JSON."""
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "")
    print(json.dumps(content, ensure_ascii=encoding != "utf8"), flush=True)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=8, cutoff=0.5)
    if not close:
        return ""
    best = min(close, key=lambda other: (OSA.distance(name, other), -Jaro.similarity(name, other)))
    return f" Did you mean '{best}'?"


def listing(lines: list[str], most: int = 20) -> str:
    """Return the first `most` lines, indented, and the number of remaining lines."""
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join(f"  {line}" for line in lines[:most] + more)


def check_writable(folder: Path, what: str) -> None:
    """Create a folder and check that it is writable.

    Raises
    ------
    UserError
        If it is not writable, naming the option and the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{what}: cannot write to {folder} ({error.strerror})") from None


# Operating system errors that the user can fix; any other file error is a bug in this package.
_FIXABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EMFILE)


def _message(error: UserError) -> str:
    """Return the message of an error; torch wraps those of the processes that load data into a traceback."""
    text = str(error)
    return text.rpartition("UserError: ")[2].strip() if "\nOriginal Traceback" in text else text


def exit_code(main: Callable[[], None]) -> int:
    """Run `main` and return the exit code of the command.

    Returns 0 (success), 2 (user error, or an operating system error such as a full disk), 130 (interrupted) or 141 (output pipe
    closed, as by `| head`). Bugs keep their traceback and exit with 1. Characters that the terminal cannot encode are escaped.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    rank = os.environ.get("RANK", "0")
    who = "" if rank == "0" else f"[process {rank}] "
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        # Otherwise Python flushes the rest at exit and prints an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except UserError as error:
        print(f"{who}error: {_message(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in _FIXABLE:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"{who}error: {error.strerror}{where}; fix this, then rerun the command to resume", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(
            f"{who}{error}" if error.args else f"{who}interrupted; rerun the command to resume",
            file=sys.stderr,
        )
        return 130
    return 0
