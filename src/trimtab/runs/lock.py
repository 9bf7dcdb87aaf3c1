"""One writer for each run directory: an advisory lock that the system frees when the process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from trimtab.errors import UserError

LOCK_NAME = ".lock"


class RunLock:
    """Holds the lock of `directory`, which is made if it is absent.

    Raises:
        UserError: somebody holds it, or the directory cannot be made.
    """

    def __init__(self, directory: Path) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._handle: int | None = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise UserError(f"run {directory}", why, "choose another --run directory") from error
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._handle, 32).decode(errors="replace").strip()
            self.release()
            who = "this process already" if holder == str(os.getpid()) else f"process {holder or 'unknown'}"
            hint = "close it first" if holder == str(os.getpid()) else "wait for it or choose another --run directory"
            raise UserError(f"run {directory}", f"{who} has it open", hint) from None
        except OSError:
            return  # a file system without locks
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        """Free the lock. Twice does nothing."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.release()
