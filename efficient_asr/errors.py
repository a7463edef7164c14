"""Errors that are the user's to mend.

Whatever a person can put right (a wrong key, a missing file, a broken line) is raised as `UserError` with a message
that names the thing and says what to do. Entry points print that message without a traceback and exit with code 2.
"""

from __future__ import annotations

import difflib
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path


class UserError(Exception):
    """A mistake in the input; `str(error)` is all a person needs to mend it."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


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


def exit_code(main: Callable[[], None]) -> int:
    """Run `main` the way a command ends: 0 done, 2 the user's mistake, 130 interrupted; our own faults keep a traceback."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0
