"""Several processes save in the background, and go on under another layout with the logits that were kept."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest

from castalia.checkpoint import find_checkpoint, verify_checkpoint
from castalia.config import Config
from castalia.parallel.testing import WorkerFailed, run_in_processes
from castalia.train.forward import check_logits
from castalia.train.loop import Stopped
from castalia.train.metrics import read_metrics
from castalia.train.run import Run


def sitting(world, values, die_at=None):
    """Train until the end or training.exit_interval; the step reached, and what comparing the logits found."""
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1")  # joined already, but asked for

    def die(run):
        if run.step == die_at and run.world.rank == run.world.size - 1:
            os._exit(9)

    with Run(Config.model_validate(values), quiet=True) as run:
        found = find_checkpoint(Path(values["output"]) / "checkpoints")
        said = "" if found is None else check_logits(run, found.path)
        with suppress(Stopped):
            run.train([die])
        return run.step, said


@pytest.fixture
def values(tiny_values):
    return tiny_values | {
        "checkpoint": {"interval": 1, "validate_forward": True},
        "training": {"steps": 3, "batch_size": 8, "micro_batch_size": 2, "exit_interval": 1},
    }


def test_layouts_hand_a_run_on(values):
    """Saved in the background by one process, by ranks that share weights, a pipeline, matrices and sequences."""
    sittings = ((1, {}), (4, {"zero": 3, "context": 2}), (4, {"tensor": 2, "sequence": True, "pipeline": 2}))
    for number, (processes, layout) in enumerate(sittings, 1):
        results = run_in_processes(processes, sitting, values | {"parallel": layout}, joined=processes > 1)
        for step, said in results:
            assert step == number and (number == 1 or "computes the logits that step" in said), (layout, said)
    checkpoints = sorted((Path(values["output"]) / "checkpoints").glob("step-*"))
    assert [int(p.name[5:]) for p in checkpoints] == [1, 2, 3]
    assert all(verify_checkpoint(path) == [] for path in checkpoints)
    records = read_metrics(Path(values["output"]) / "metrics.jsonl")
    assert [r["step"] for r in records if r.get("event") == "checkpoint"] == [1, 2, 3]


def test_a_rank_that_dies_leaves_a_whole_checkpoint(values):
    """Whether the save under way can be finished or not."""
    values["training"]["exit_interval"] = 3
    with pytest.raises(WorkerFailed, match="rank 1"):
        run_in_processes(2, sitting, values | {"parallel": {"zero": 1}}, 2)
    found = find_checkpoint(Path(values["output"]) / "checkpoints")
    assert found is None or found.skipped == ()
    (step, _), _ = run_in_processes(2, sitting, values | {"parallel": {"zero": 1}})
    assert step == 3
