"""Errors that are the user's to mend.

Whatever a person can put right (a wrong key, a missing file, a broken line) is raised as `UserError` with a message
that names the thing and says what to do. Entry points print that message without a traceback and exit with code 2.
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
    """A mistake in the input; `str(error)` is all a person needs to mend it."""


def print_json(content: Any) -> None:
    """Print one line of JSON, in ASCII where the output has another encoding than UTF-8: it must stay JSON."""
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
    """Return the first lines, indented, and how many more there are."""
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join(f"  {line}" for line in lines[:most] + more)


def check_writable(folder: Path, what: str) -> None:
    """Make a folder and see that a file can be written into it.

    Raises
    ------
    UserError
        Naming the option and the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{what}: cannot write to {folder} ({error.strerror})") from None


# What the system refuses and a person can mend; anything else that goes wrong with a file is a fault of ours.
_MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EMFILE)


def exit_code(main: Callable[[], None]) -> int:
    """Run `main` the way a command ends.

    Returns 0 (done), 2 (the user's mistake, or a full disk and the like), 130 (interrupted) or 141 (nobody reads the output any
    more, as behind `| head`); our own faults keep their traceback and end with 1. What the terminal cannot show is escaped.
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
        # Python would try to write the rest when it ends, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except UserError as error:
        print(f"{who}error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in _MENDABLE:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"{who}error: {error.strerror}{where}; mend that and start the same command again", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(
            f"{who}{error}" if error.args else f"{who}interrupted; the same command goes on where this one stopped",
            file=sys.stderr,
        )
        return 130
    return 0
