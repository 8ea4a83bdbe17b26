"""What may befall checkpoints: kills in the midst of saving, flipped bytes, full disks, object stores that refuse.

    kills    a small run, forked; SIGKILL while `.writing-*` is there; the checkpoint found == that of a run left alone
    damage   each file of a checkpoint: bytes flipped, cut off, removed -> named, and the one before is found
    refusals a limit on file sizes, a store that answers 403 or 500 -> a warning, training goes on

Processes are forked from one that has imported torch, so that a start takes a fraction of a second.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from castalia.checkpoint import Mirror, find_checkpoint, load_checkpoint, step_name, tensor_shapes, verify_checkpoint
from castalia.config import load
from castalia.errors import CheckFailed
from castalia.tools.object_store import refusing_store
from castalia.train.metrics import read_metrics
from castalia.train.run import Run, train

TINY = (
    "model.hidden_size=32",
    "data.seq_length=32",
    "training.batch_size=4",
    "training.micro_batch_size=4",
    "evaluation.interval=null",
    "evaluation.at_end=false",
    "checkpoint.interval=1",
)
_SAVING = 0.08  # seconds that a save of this model takes, about


def kill_saves(config: Path, folder: Path, kills: int, seed: int = 0) -> dict[str, int]:
    """Kill a run `kills` times while it saves, and let it end.

    Args:
        config: of a run that saves after every step and has more steps than kills.
        folder: for two runs, one of them left alone.
        kills: how many of them shall fall between the beginning and the end of a save.
        seed: of the moments.

    Returns:
        Counts: `kills` in saves, `others`, `checkpoints` compared bit for bit, `tensors` of each.

    Raises:
        CheckFailed: no whole checkpoint is found after a kill, it is older than the one before, or differs.
    """
    draw = random.Random(seed)
    _ended(_fork(lambda: _train(config, folder / "whole", "checkpoint.keep_last=null")))
    killed, reached = folder / "killed", 0
    counts = {"kills": 0, "others": 0, "checkpoints": 0, "tensors": 0}
    checkpoints = killed / "checkpoints"
    while counts["kills"] < kills:
        child = _fork(lambda: _train(config, killed, "checkpoint.keep_last=3"))
        began = set(checkpoints.glob(".writing-*"))  # what the dead have left
        saves = draw.randrange(1, 3)
        while saves and os.waitpid(child, os.WNOHANG)[0] == 0:
            now = set(checkpoints.glob(".writing-*"))
            saves -= bool(now - began)
            began = now
            time.sleep(0.0002)
        if saves:
            raise CheckFailed(f"{killed}: ended after {counts['kills']} kills; give it more steps")
        time.sleep(draw.uniform(0, _SAVING))
        counts["kills" if list(checkpoints.glob(".writing-*")) else "others"] += 1
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = find_checkpoint(checkpoints)
        step = 0 if found is None else found.step
        if step < reached or (found is not None and found.skipped):
            raise CheckFailed(f"{killed}: step {step} is found after a kill, {reached} before it: {found}")
        if step > reached:
            counts["tensors"] = _same(folder, step)
            counts["checkpoints"] += 1
        reached = step
    _ended(_fork(lambda: _train(config, killed, "checkpoint.keep_last=3")))
    _same(folder, max(int(path.name[5:]) for path in (folder / "whole" / "checkpoints").glob("step-*")))
    return counts


def damage(run: Path, scratch: Path, flips: int, seed: int = 0) -> dict[str, dict[str, int]]:
    """Damage each file of a run's newest checkpoint in many ways, one at a time.

    Args:
        run: with two whole checkpoints at least.
        scratch: a folder to make, for the copy that is damaged.
        flips: bytes to flip in each file, and lengths to cut it to.
        seed: of the places.

    Returns:
        By file: how many `flipped`, `cut` and `removed` were found and named.

    Raises:
        CheckFailed: one was not, or another checkpoint than the one before was found in its place.
    """
    draw = random.Random(seed)
    found = find_checkpoint(run / "checkpoints")
    if found is None:
        raise CheckFailed(f"{run}: has no checkpoint")
    shutil.copytree(run / "checkpoints", scratch)
    before = sorted(path.name for path in scratch.glob("step-*"))[-2]
    out: dict[str, dict[str, int]] = {}
    for file in sorted((scratch / found.path.name).iterdir()):
        content = file.read_bytes()
        counts = out[file.name] = {"flipped": 0, "cut": 0, "removed": 0}

        def look(what: str, file: Path = file, counts: dict[str, int] = counts) -> None:
            problems = verify_checkpoint(file.parent)
            # A manifest that is damaged accuses the file whose record it is.
            if not problems or (file.name != "manifest.json" and not problems[0].startswith(f"{file}:")):
                raise CheckFailed(f"{file}: {what}, and what is said is {problems}")
            fallen = find_checkpoint(scratch)
            if fallen is None or fallen.path.name != before or found.path.name not in fallen.skipped[0]:
                raise CheckFailed(f"{file}: {what}, and then {fallen} is found")
            counts[what] += 1

        for _ in range(flips):
            place, bit = draw.randrange(len(content)), 1 << draw.randrange(8)
            file.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            look("flipped")
            file.write_bytes(content[: draw.randrange(len(content))])
            look("cut")
        file.unlink()
        look("removed")
        file.write_bytes(content)
    if verify_checkpoint(scratch / found.path.name):
        raise CheckFailed(f"{scratch}: was not put right again")
    return out


def full_disk(config: Path, output: Path) -> list[str]:
    """A run whose files may not grow, then may again: what it says.

    Raises:
        CheckFailed: training did not go on, or the checkpoint before was lost.
    """
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    whole: list[int] = []

    def fill(run: Run) -> None:
        _settle(run)
        if run.step in (4, 8):
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000 if run.step == 4 else limit[0], limit[1]))
        found = find_checkpoint(run.checkpoints)
        whole.append(found.step if found else 0)

    try:
        train(load([config], [*TINY, "training.steps=12", f"output={output}"]), callbacks=[fill], quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    return _judged(output, "checkpoint failed", whole[:8] == [1, 2, 3, 4, 4, 4, 4, 4] and whole[-1] >= 11)


def refusing_uploads(config: Path, output: Path) -> list[str]:
    """A run whose object store refuses for some steps: what it says.

    Raises:
        CheckFailed: training did not go on, or the store lacks a checkpoint at the end.
    """
    with refusing_store("runs") as store:

        def refuse(run: Run) -> None:
            _settle(run)
            if run.step == 4:
                store.refuse("PUT")
            elif run.step == 6:
                store.refuse("GET")
            elif run.step == 8:
                store.refuse("PUT", times=1, status="500 Internal Server Error")

        settings = [*TINY, "training.steps=12", f"output={output}", "checkpoint.keep_last=null"]
        settings.append("checkpoint.path=s3://runs/small")
        train(load([config], settings), callbacks=[refuse], quiet=True)
        store.refuse()
        steps = Mirror("s3://runs/small").steps()
        shutil.rmtree(output / "checkpoints")
        with Run(load([config], settings), quiet=True) as again:  # it comes back from there
            back = again.step
    return _judged(output, "upload failed", steps == list(range(1, 13)) and back == 12)


def _judged(output: Path, event: str, good: bool) -> list[str]:
    records = read_metrics(output / "metrics.jsonl")
    texts = [r["text"] for r in records if r.get("event") == event]
    if not good or not texts:
        raise CheckFailed(f"{output}: {len(texts)} events '{event}', and what was left is not what it should be")
    return [text.replace(str(output), "RUN") for text in texts]


def _settle(run: Run) -> None:
    """Wait for the save under way."""
    while run.saving.busy:
        time.sleep(0.001)


def _train(config: Path, output: Path, *more: str) -> None:
    train(load([config], [*TINY, f"output={output}", *more]), quiet=True)


def _fork(action: Callable[[], Any]) -> int:
    """Run something in a child; its process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def _ended(child: int) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        raise CheckFailed(f"a run that nobody killed ended with exit code {code}")


def _same(folder: Path, step: int) -> int:
    """Compare a step's tensors of the killed run and of the one left alone; how many there are."""
    both: list[dict[str, Tensor]] = []
    for name in ("whole", "killed"):
        path = folder / name / "checkpoints" / step_name(step)
        tensors = {n: torch.empty(shape) for n, shape in tensor_shapes(path).items()}
        load_checkpoint(path, tensors)
        both.append(tensors)
    differing = [name for name, value in both[0].items() if not torch.equal(value, both[1][name])]
    if differing or both[0].keys() != both[1].keys():
        raise CheckFailed(f"step {step} differs from the run left alone in {differing[:3]}")
    return len(both[0])
