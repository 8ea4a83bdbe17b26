"""A rank's sign of life, so that a job that stands still is ended with the stacks of its ranks.

    training loop ──beat()──> beat-RANK (how many; mtime: when) ──> the supervisor of `castalia train --procs`:
                                    too old: SIGUSR1 ──> stacks-RANK ──> printed, all ranks are ended
                   └─ under another launcher: a timer in the rank itself, which prints its stacks and exits

All ranks soon wait for the one that hangs; that one has the fewest beats. Both ways go through
faulthandler, which needs no interpreter lock, so that a rank that hangs inside a kernel answers too.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FAILURES = "CASTALIA_FAILURES"
"""Variable with the job's folder, in which each rank beats and notes its failure."""


@contextmanager
def heartbeat(rank: int, size: int, timeout: float | None) -> Iterator[Callable[[], None]]:
    """Watch this rank for the time of the block; gives the function to call at each sign of life.

    Args:
        rank, size: of the process and of the job; a single process is not watched.
        timeout: performance.hang_timeout, in seconds; None: nothing is watched.
    """
    if size == 1 or timeout is None:
        yield lambda: None
        return
    folder = os.environ.get(FAILURES)
    if not folder:

        def rearm() -> None:
            faulthandler.dump_traceback_later(timeout, exit=True, file=sys.__stderr__ or 2)

        rearm()
        try:
            yield rearm
        finally:
            faulthandler.cancel_dump_traceback_later()
        return
    path = Path(folder) / f"beat-{rank}"
    with (Path(folder) / f"stacks-{rank}").open("w") as stacks, path.open("wb", buffering=0) as file:
        faulthandler.register(signal.SIGUSR1, file=stacks)
        beats = 0

        def beat() -> None:
            nonlocal beats
            beats += 1
            os.pwrite(file.fileno(), b"%20d" % beats, 0)

        beat()
        try:
            yield beat
        finally:  # whoever has left is not waited for; the signal stays harmless until the process ends
            path.unlink(missing_ok=True)
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            faulthandler.unregister(signal.SIGUSR1)
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)


@dataclass(frozen=True)
class Beat:
    """What a rank's file says: how often it has beaten, and when last (seconds since the epoch)."""

    count: int
    when: float


def beats(folder: Path) -> dict[int, Beat]:
    """The ranks that are watched in a job's folder."""
    found = {}
    for path in folder.glob("beat-*"):
        try:
            text, when = path.read_bytes(), path.stat().st_mtime
        except FileNotFoundError:  # it has just left
            continue
        if text:
            found[int(path.name.removeprefix("beat-"))] = Beat(int(text), when)
    return found
