"""One process trains in a run's folder: a flock on run.lock, with the holder's name in it.

The kernel frees the lock when its holder dies, however it dies, so a lock is never stale. The
file stays; only the lock on it counts.
"""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType

from castalia.errors import UserError

_NAME = "run.lock"


class RunLock:
    """Context manager: holds the lock of a run's folder.

    Raises (on entering):
        UserError: another process has it, or the folder cannot be locked.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = Path(run_dir) / _NAME
        self._handle: int | None = None

    def __enter__(self) -> RunLock:
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(
                f"{self.path}: the run's folder cannot be locked ({error.strerror}): "
                "make sure that it exists and can be written to"
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = (
                os.pread(handle, 1000, 0).decode(errors="replace").strip() or "a process that has not said its name"
            )
            os.close(handle)
            if isinstance(error, BlockingIOError):
                raise UserError(
                    f"{self.path}: {holder} is using this run: wait for it to end, stop it, or choose another folder"
                ) from None
            raise UserError(
                f"{self.path}: the run's folder cannot be locked ({error.strerror}): "
                "choose a folder on a file system with locks"
            ) from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._handle = handle
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            os.ftruncate(self._handle, 0)
            os.close(self._handle)
            self._handle = None
