"""Locks that keep two runs out of one folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import Any

from efficient_asr.utils.errors import UserError


class FolderLock:
    """Keeps two runs out of one folder; the system releases it when the process ends, however it ends.

    Arguments
    ---------
    folder : Path
        The folder.
    wait : bool
        Wait for the other process instead of refusing.

    Raises
    ------
    UserError
        Where another process holds the folder, naming it.
    """

    def __init__(self, folder: Path, wait: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = open(folder / ".lock", "a+", encoding="utf-8")
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not kept alive by forked workers
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                print(f"{folder} cannot be locked ({error.strerror}): see to it that no two runs use it")
                return
            self.file.seek(0)
            holder = self.file.read().strip() or "another process"
            if not wait:
                self.file.close()
                raise UserError(
                    f"{folder} is in use by {holder}; wait for it, stop it, or take another --output_folder"
                ) from None
            print(f"waiting for {holder}, which is at work in {folder}")
            fcntl.lockf(self.file, fcntl.LOCK_EX)
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self.file.flush()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()

    def release(self) -> None:
        """Let others in."""
        self.file.close()
