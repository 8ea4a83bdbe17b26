"""What is printed -> also in files, HOST_stdout.txt and HOST_stderr.txt (logging.log_dir).

The copies are appended to, since a run has several sittings. They hold what Python prints;
what a library in C writes past it goes to the terminal alone.
"""

from __future__ import annotations

import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from castalia.errors import UserError
from castalia.train.loop import Stopped


@contextmanager
def copied_output(folder: str, rank: int = 0) -> Iterator[None]:
    """Copy standard output and error while the block runs; an error that ends it is written down too.

    Args:
        folder: made if need be.
        rank: of this process; those after the first have it in their files' names.

    Raises:
        UserError: the files cannot be written.
    """
    host = socket.gethostname() + (f"_rank{rank}" if rank else "")
    names = ("stdout", "stderr")
    with ExitStack() as stack:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            paths = {n: Path(folder) / f"{host}_{n}.txt" for n in names}
            files = {n: stack.enter_context(p.open("a", encoding="utf-8", buffering=1)) for n, p in paths.items()}
        except OSError as error:
            raise UserError(f"logging.log_dir: {folder} cannot be written to ({error.strerror})") from None
        before = {n: getattr(sys, n) for n in names}
        for name, file in files.items():
            setattr(sys, name, _Copied(before[name], file))
            stack.callback(setattr, sys, name, before[name])
        try:
            yield
        except BaseException as error:
            # It is printed by whoever catches it, after the copying has ended.
            expected = isinstance(error, UserError | Stopped)
            text = f"castalia: {error}\n" if expected else "".join(traceback.format_exception(error))
            files["stderr"].write(text)
            raise


class _Copied:
    """A stream that writes to another one as well; in all else it is the first."""

    def __init__(self, stream: TextIO, copy: TextIO) -> None:
        self._stream, self._copy = stream, copy

    def write(self, text: str) -> int:
        self._copy.write(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
