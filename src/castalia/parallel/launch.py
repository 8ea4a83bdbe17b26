"""Start several processes of one job on this machine, and end them all when one fails.

    supervise(command, 4) ──> 4 processes with RANK, WORLD_SIZE, ... ──> exit code of the job

A rank that fails makes the others fail too, each with an error about a lost connection. So every rank
notes when it failed and why; the one that failed first is the one that is shown.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from castalia.errors import UserError
from castalia.parallel.heartbeat import FAILURES, Watch, answer_with_stacks

GRACE = 3.0  # seconds that the others have to fail by themselves, and so to say why, after one has failed
LINES = 24  # of each rank's stacks that are shown


def supervise(command: Sequence[str], processes: int, hang_timeout: float | None = None) -> int:
    """Run a command as several ranks; SIGINT, SIGTERM and SIGHUP go on to all of them.

    Args:
        command: the same for each rank; it finds its own in the environment.
        processes: how many.
        hang_timeout: seconds without a sign of life of a rank that has given one (heartbeat.py) after which the
            job is ended; None: never.

    Returns:
        The job's exit code: that of the rank that failed first; 0 if none did. A rank that was killed
        by a signal counts as 1, and so does a job that stood still.
    """
    with tempfile.TemporaryDirectory(prefix="castalia-job-") as folder:
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // processes))
        common = {
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "OMP_NUM_THREADS": threads,
            FAILURES: folder,
        }
        ranks = [
            subprocess.Popen(
                command,
                env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=None if rank == 0 else subprocess.DEVNULL,
                stdout=None if rank == 0 else subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C reaches them through us, once
            )
            for rank in range(processes)
        ]
        try:
            with _passed_on(ranks):
                codes, hung = _wait(ranks, Path(folder), hang_timeout)
            if hung is not None:
                _show_stacks(ranks, Path(folder), hung, hang_timeout)
                return 1
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        failed = {rank: code for rank, code in codes.items() if code not in (0, 3)}
        if not failed:
            return max(codes.values())
        first, text = _first_failure(Path(folder), failed)
        if text is not None:
            print(f"castalia: rank {first} of {processes} failed, and the job was ended: {text}", file=sys.stderr)
        return max(failed[first], 1)


def _wait(
    ranks: Sequence[subprocess.Popen[bytes]], folder: Path, hang_timeout: float | None
) -> tuple[dict[int, int], str | None]:
    """Wait for all, and when one fails or stands still only for so long.

    Returns:
        Exit codes of the ranks that ended by themselves, in order; who stood still, if anybody did.
    """
    looked = time.monotonic()
    watch = None if hang_timeout is None else Watch(folder, hang_timeout)
    codes: dict[int, int] = {}
    deadline = float("inf")
    while len(codes) < len(ranks) and time.monotonic() < deadline:
        for number, rank in enumerate(ranks):
            code = rank.poll()
            if code is not None and number not in codes:
                codes[number] = code
                if code not in (0, 3):
                    deadline = min(deadline, time.monotonic() + GRACE)
        if watch is not None and deadline == float("inf") and time.monotonic() - looked > 0.5:
            looked = time.monotonic()
            hung = watch.still(looked, set(range(len(ranks))) - codes.keys())
            if hung is not None:
                return codes, hung
        time.sleep(0.02)
    return codes, None


def _show_stacks(ranks: Sequence[subprocess.Popen[bytes]], folder: Path, hung: str, hang_timeout: float | None) -> None:
    """Have every rank write down what all its threads do, and print that with the rank's name."""
    answering = [(rank, folder / f"stacks-{rank}") for rank in range(len(ranks))]
    answering = [(rank, path) for rank, path in answering if path.exists() and ranks[rank].poll() is None]
    for rank, _ in answering:
        ranks[rank].send_signal(signal.SIGUSR1)
    time.sleep(1.0)  # they answer at once, or not at all
    for rank, path in answering:
        # The main thread comes last, and is the one that says most.
        threads = path.read_text(encoding="utf-8").strip().split("\n\n")[::-1]
        shown = [line for line in "\n".join(threads).splitlines() if line][:LINES]
        print(f"rank {rank}:", *(shown or ["no answer"]), sep="\n  ", file=sys.stderr)
    print(
        f"castalia: of {len(ranks)} ranks, {hung}; nothing moved for {hang_timeout:g} s, and the job was ended: "
        "if that may take longer, raise performance.hang_timeout",
        file=sys.stderr,
    )


def _first_failure(folder: Path, failed: dict[int, int]) -> tuple[int, str | None]:
    """The rank that failed first, and its story; None where rank 0 has told that itself.

    A signal kills nobody in answer to a lost connection, so whoever was killed was first.
    """
    for rank, code in failed.items():
        if code < 0:
            return rank, f"it was killed by {signal.Signals(-code).name}"
    notes = {rank: folder / f"failure-{rank}.json" for rank in failed}
    told = {rank: json.loads(path.read_text(encoding="utf-8")) for rank, path in notes.items() if path.exists()}
    first = min(told, key=lambda rank: float(told[rank]["when"])) if told else next(iter(failed))
    text = told[first]["text"] if told else f"exit code {failed[first]}"
    if 0 in told and told[0]["text"] == text:  # what all ranks found wrong alike
        return 0, None
    return first, text


@contextmanager
def noted_failure() -> Iterator[None]:
    """In a rank: note a failure for the supervisor, if there is one, and show it the stacks when it asks."""
    folder = os.environ.get(FAILURES)
    if folder:
        answer_with_stacks(Path(folder), int(os.environ.get("RANK", "0")))
    try:
        yield
    except BaseException as error:
        if folder:
            text = str(error) if isinstance(error, UserError) else f"\n{traceback.format_exc()}"
            note = {"when": time.time(), "text": text}
            path = Path(folder) / f"failure-{os.environ.get('RANK', '0')}.json"
            path.with_suffix(".new").write_text(json.dumps(note), encoding="utf-8")
            path.with_suffix(".new").replace(path)
        raise


@contextmanager
def _passed_on(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Send the signals that we get to all ranks."""

    def handler(number: int, _: object) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
