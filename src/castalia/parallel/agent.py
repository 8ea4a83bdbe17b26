"""torchrun for a host of a run, which ends as the run ends.

    SIGTERM ──> agent ──> its processes finish their step, save, note that they stopped ──> exit code 3

torchrun by itself ends with a traceback and exit code 1 on a signal, gives its processes 30 s, and takes
their exit code 3 for a failure that calls for a restart. So here a signal is passed on and no more, and a
process that has stopped with its state saved leaves a note and the exit code 0.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

STOPPED = "CASTALIA_STOPPED"
"""Variable with the file that notes that a process stopped early with its state saved."""
_PAUSE = 0.5  # seconds between two looks at the processes that a signal has to reach


def exit_code_of_stop() -> int:
    """In a process of a run: the exit code after a stop with the state saved; an agent is told by a note."""
    note = os.environ.get(STOPPED)
    if note is None:
        return 3
    Path(note).touch()
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run torchrun with these arguments.

    Returns:
        0; 3 where the processes stopped early with their state saved; else the exit code of the first that failed,
        1 where that was killed.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    with tempfile.TemporaryDirectory(prefix="castalia-agent-") as folder:
        note = Path(folder) / "stopped"
        os.environ[STOPPED] = str(note)
        asked: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, _: asked.append(number))
        threading.Thread(target=_pass_on, args=(asked,), daemon=True).start()
        try:
            # torch is left a signal of its own, as it wants one.
            run.run(run.parse_args(["--signals-to-handle", "SIGQUIT", *arguments]))
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            print(f"castalia: rank {rank} failed with exit code {failure.exitcode}", file=sys.stderr)
            return max(failure.exitcode, 1)
        return 3 if note.exists() else 0


def _pass_on(asked: list[int]) -> None:
    """Tell every process of this one once, those too that are started after the signal came."""
    told: set[int] = set()
    while True:
        if asked:
            for process in _children() - told:
                told.add(process)
                with suppress(ProcessLookupError):  # it has ended, or was `ps` itself
                    os.kill(process, asked[0])
        threading.Event().wait(_PAUSE)


def _children() -> set[int]:
    mine = os.getpid()
    if not Path("/proc/self/stat").exists():  # not Linux; and images for Linux may have no `ps`
        listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=False).stdout
        return {int(pid) for pid, parent in map(str.split, listed.splitlines()) if int(parent) == mine}
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            # After the name in brackets, which may hold anything: state, parent (proc(5)).
            if int(path.read_text(errors="replace").rpartition(")")[2].split()[1]) == mine:
                found.add(int(path.parent.name))
    return found


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
