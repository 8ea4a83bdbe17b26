"""Killed at any moment, a writer leaves a whole checkpoint behind; and two may not write in one run."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from castalia.checkpoint import RunLock, find_checkpoint, load_checkpoint
from castalia.errors import UserError

# One import of torch serves all: this program forks a child for each line it is given, and says how it ended.
#   alarm SECONDS  saves for ever, until the timer (whose signal nobody handles) kills it
#   touch COUNT    saves one step, and kills itself when it touches the directory for the COUNT-th time
WRITER = """
import os, signal, sys
from pathlib import Path
import torch
from castalia.checkpoint import find_checkpoint, save_checkpoint

torch.set_num_threads(1)
directory = Path(sys.argv[1])
left = None

def count(event, arguments):
    global left
    if left is not None and event != "import" and any(str(directory) in str(a) for a in arguments):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)

def save(step):
    tensors = {f"model.{i}": torch.full((100, 100), float(step)) for i in range(20)}
    save_checkpoint(directory, step, tensors, {"step": step}, keep_last=2)

for line in sys.stdin:
    kind, value = line.split()
    child = os.fork()
    if child == 0:
        found = find_checkpoint(directory, verify=False)
        step = found.step if found else 0
        if kind == "touch":
            left = int(value)
            save(step)  # the same again, which has to be replaced
            save(step + 1)
            os._exit(0)
        signal.setitimer(signal.ITIMER_REAL, float(value))
        while True:
            step += 1
            save(step)
            if step % 3:
                save(step)
    _, status = os.waitpid(child, 0)
    print("killed" if os.WIFSIGNALED(status) else f"ended {status}", flush=True)
"""


def tell(writer: subprocess.Popen[str], order: str) -> str:
    assert writer.stdin is not None and writer.stdout is not None
    print(order, file=writer.stdin, flush=True)
    return writer.stdout.readline().strip()


def check(directory: Path, reached: int) -> int:
    """The newest checkpoint is whole, of one step, and not older than what was there before."""
    found = find_checkpoint(directory)
    if found is None:
        assert reached == -1
        return -1
    assert found.step >= reached and found.skipped == () and found.state == {"step": found.step}
    tensors = {f"model.{i}": torch.full((100, 100), -1.0) for i in range(20)}
    load_checkpoint(found.path, tensors)
    assert all((t == found.step).all() for t in tensors.values()), "all tensors are of one step"
    return found.step


def test_killed_at_any_moment(tmp_path: Path) -> None:
    chance = random.Random(20)
    arguments = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        reached = -1
        for _ in range(10):
            assert tell(writer, f"alarm {chance.uniform(0.01, 0.25)}") == "killed"
            reached = check(tmp_path, reached)
        assert reached > 0, "some checkpoint was finished between the kills"
        touches = 0
        while (answer := tell(writer, f"touch {touches + 1}")) == "killed":
            reached = check(tmp_path, reached)
            touches += 1
        assert answer == "ended 0" and touches > 30
        assert check(tmp_path, reached) == reached + 1
    assert len([p for p in tmp_path.iterdir() if p.name.startswith(".")]) == 0, "nothing piles up"


def test_one_process_per_run(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from castalia.checkpoint.lock import RunLock\n"
        "with RunLock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            message = rf"process {holder.pid} on \S+ is using this run"
            with pytest.raises(UserError, match=message), RunLock(tmp_path):
                pass
        finally:
            holder.kill()
    with (
        RunLock(tmp_path),
        pytest.raises(UserError),
        RunLock(tmp_path),
    ):  # the dead hold nothing, the living do
        pass
    with RunLock(tmp_path):
        pass


def test_a_folder_that_cannot_be_locked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be locked"), RunLock(tmp_path / "nowhere"):
        pass
