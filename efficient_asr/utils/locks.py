"""Locks that prevent two runs from using the same folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
from pathlib import Path
from typing import Any

from efficient_asr.utils.errors import UserError


class FolderLock:
    """Prevents two runs from using the same folder; the system releases the lock when the process ends, even if killed.

    Arguments
    ---------
    folder : Path
        The folder.
    wait : bool
        Wait for the other process instead of raising an error.
    option : str
        Option that names the folder, for the message.

    Raises
    ------
    UserError
        If another process holds the lock, naming the process.
    """

    def __init__(self, folder: Path, wait: bool = False, option: str = "--output_folder") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = open(folder / ".lock", "a+", encoding="utf-8")
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not kept alive by forked workers
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                print(
                    f"{folder} cannot be locked ({error.strerror}); make sure that no other run uses it",
                    file=sys.stderr,
                )
                return
            self.file.seek(0)
            holder = self.file.read().strip() or "another process"
            if not wait:
                self.file.close()
                raise UserError(
                    f"{folder} is in use by {holder}; wait for it, stop it, or use another {option}"
                ) from None
            print(f"waiting for {holder}, which is using {folder}", file=sys.stderr)
            fcntl.lockf(self.file, fcntl.LOCK_EX)
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self.file.flush()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()

    def release(self) -> None:
        """Release the lock."""
        self.file.close()
