"""A rank's sign of life, so that a job that stands still is ended with the stacks of its ranks.

    training loop ──beat(phase)──> beat-RANK (how many, in which phase) ──> the supervisor of `castalia train --procs`:
                                    no change for too long: SIGUSR1 ──> stacks-RANK ──> printed, all ranks are ended
                   └─ under another launcher: a timer in the rank itself, which prints its stacks and exits

All ranks soon wait for the one that hangs; that one has the fewest beats, or has not beaten at all. The
supervisor goes by its own monotonic clock: when it saw a count change. Stacks come through faulthandler,
which needs no interpreter lock, so that a rank that hangs inside a kernel answers too.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FAILURES = "CASTALIA_FAILURES"
"""Variable with the job's folder, in which each rank beats and notes its failure."""
_PHASE = 40  # characters of a phase's name


Beating = Callable[..., None]
"""`beat(phase="training")`: a sign of life, and what is done now."""


@contextmanager
def heartbeat(rank: int, size: int, timeout: float | None) -> Iterator[Beating]:
    """Watch this rank for the time of the block; gives the function to call at each sign of life.

    Args:
        rank, size: of the process and of the job; a single process is not watched.
        timeout: performance.hang_timeout, in seconds; None: nothing is watched.
    """
    if size == 1 or timeout is None:
        yield lambda phase="training": None
        return
    folder = os.environ.get(FAILURES)
    if not folder:

        def rearm(phase: str = "training") -> None:
            faulthandler.dump_traceback_later(timeout, exit=True, file=sys.__stderr__ or 2)

        rearm()
        try:
            yield rearm
        finally:
            faulthandler.cancel_dump_traceback_later()
        return
    answer_with_stacks(Path(folder), rank)
    path = Path(folder) / f"beat-{rank}"
    with path.open("wb", buffering=0) as file:
        count = 0

        def beat(phase: str = "training") -> None:
            nonlocal count
            count += 1
            # One write of one size, so that no reader sees half of two.
            os.pwrite(file.fileno(), f"{count:20d} {phase[:_PHASE]:<{_PHASE}}".encode("ascii", "replace"), 0)

        beat("meeting the other ranks")
        try:
            yield beat
        finally:  # whoever has left is not waited for
            path.unlink(missing_ok=True)


def answer_with_stacks(folder: Path, rank: int) -> None:
    """From now on to the end of the process, SIGUSR1 has the stacks of all threads written into the job's folder."""
    path = folder / f"stacks-{rank}"
    if not path.exists():
        faulthandler.register(signal.SIGUSR1, file=path.open("w"))


@dataclass(frozen=True)
class Beat:
    """What a rank's file says: how often it has beaten, and what it did then."""

    count: int
    phase: str


def beats(folder: Path) -> dict[int, Beat]:
    """The ranks that are watched in a job's folder."""
    found = {}
    for path in folder.glob("beat-*"):
        try:
            count, _, phase = path.read_text(encoding="ascii").lstrip().partition(" ")
        except FileNotFoundError:  # it has just left
            continue
        if count:
            found[int(path.name.removeprefix("beat-"))] = Beat(int(count), phase.strip())
    return found


class Watch:
    """The supervisor's view of a job: when it last saw each rank move.

    Args:
        folder: the job's.
        timeout: seconds after which a rank stands still.
    """

    def __init__(self, folder: Path, timeout: float) -> None:
        self._folder, self._timeout = folder, timeout
        self._moved: dict[int, tuple[int, float]] = {}

    def still(self, now: float, running: Collection[int]) -> str | None:
        """Which ranks are to blame for that nothing moves, in words; None while all move.

        Args:
            now: of a monotonic clock, in seconds.
            running: the ranks that have not ended.
        """
        seen = beats(self._folder)
        for rank, beat in seen.items():
            if rank not in self._moved or self._moved[rank][0] != beat.count:
                self._moved[rank] = beat.count, now
        if not any(now - self._moved[rank][1] > self._timeout for rank in seen):
            return None
        absent = sorted(rank for rank in running if rank not in self._moved)
        if absent:
            return f"{_ranks(absent)} never came to where the ranks meet, and the others wait there"
        fewest = min(beat.count for beat in seen.values())
        first = sorted(rank for rank, beat in seen.items() if beat.count == fewest)
        return f"{_ranks(first)} stood still first, while {seen[first[0]].phase}"


def _ranks(numbers: Sequence[int]) -> str:
    return ("rank " if len(numbers) == 1 else "ranks ") + ", ".join(map(str, numbers))
