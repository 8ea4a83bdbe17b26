"""A loss or gradient that is no number: the run stops with a sentence, or leaves the update out."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from castalia.config import Config
from castalia.errors import UserError
from castalia.optim import learning_rate
from castalia.tools.report import write_report
from castalia.train import loop
from castalia.train.loop import Diverged, Stopped
from castalia.train.metrics import read_metrics
from castalia.train.run import Run


def with_training(values, **training):
    return Config.model_validate(values | {"training": values["training"] | training})


def poison(run, steps, what="loss"):
    """Make the loss, or one element of the gradient, NaN in these steps, counted from 1."""
    real = run.engine.forward_backward

    def forward_backward(micro_batches, tokens, step):
        stats = real(micro_batches, tokens, step)
        if step + 1 not in steps:
            return stats
        if what == "gradient":
            next(iter(run.store.gradients().values())).view(-1)[0] = math.inf
            return stats
        return replace(stats, loss=math.nan)

    run.engine.forward_backward = forward_backward


def train_poisoned(config, steps, what="loss"):
    with Run(config, quiet=True) as run:
        poison(run, steps, what)
        run.train()
    return run


def records(run):
    return {r["step"]: r for r in read_metrics(run.directory / "metrics.jsonl") if r["kind"] == "train"}


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_run_stops_before_the_update(what, tiny_values):
    with Run(with_training(tiny_values), quiet=True) as run:
        poison(run, {3}, what)
        with pytest.raises(Diverged, match=r"step 3: .*not finite.*training.nonfinite=skip"):
            run.train()
        assert run.step == run.updates == 2
        assert all(t.isfinite().all() for t in run.store.tensors().values())


@pytest.mark.parametrize("arena", [True, False])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_skipped_step_changes_nothing(what, arena, tiny_values):
    values = tiny_values | {"performance": {**tiny_values["performance"], "arena": arena}}
    before = {}
    with Run(with_training(values, nonfinite="skip"), quiet=True) as run:
        poison(run, {3, 4}, what)

        def look(run):
            before[run.step] = {n: t.clone() for n, t in run.store.tensors().items()}

        run.train([look])
    for step in (3, 4):
        assert all(torch.equal(before[2][n], t) for n, t in before[step].items())
    assert any(not torch.equal(before[2][n], t) for n, t in before[5].items())
    assert all(t.isfinite().all() for t in before[12].values())
    assert (run.step, run.updates) == (12, 10)


def test_the_schedule_waits_and_the_records_tell(tiny_values):
    run = train_poisoned(with_training(tiny_values, nonfinite="skip"), {3, 4})
    found = records(run)
    assert [found[s].get("skipped") for s in (1, 2, 3, 4, 5, 12)] == [None, None, 1, 2, 2, 2]
    assert "loss" not in found[3] and "loss" in found[5]
    cfg = run.config
    for step, done in ((3, 2), (4, 2), (5, 2), (6, 3), (12, 9)):
        assert found[step]["lr"] == learning_rate(done, cfg.optimizer.lr, cfg.schedule, run.steps), step
    assert found[12]["tokens"] == 12 * run.step_tokens  # the data moves on
    strict = (run.directory / "metrics.jsonl").read_text()
    assert "NaN" not in strict and "Infinity" not in strict
    json.loads(strict.splitlines()[0])


def test_the_report_counts_the_skipped(tiny_values, tmp_path):
    run = train_poisoned(with_training(tiny_values, nonfinite="skip"), {3, 4})
    write_report([run.directory], tmp_path / "report.html")
    assert "<dt>Skipped steps</dt><dd>2" in (tmp_path / "report.html").read_text()
    fine = train_poisoned(with_training(tiny_values | {"output": str(tmp_path / "fine")}), set())
    write_report([fine.directory], tmp_path / "report.html")
    assert "Skipped steps" not in (tmp_path / "report.html").read_text()


def test_resumed_after_a_skip_equals_uninterrupted(tiny_values, tmp_path):
    whole = train_poisoned(with_training(tiny_values, nonfinite="skip"), {3, 7})
    values = tiny_values | {"output": str(tmp_path / "other")}
    config = with_training(values, nonfinite="skip", exit_interval=5)
    for _ in range(2):
        with pytest.raises(Stopped):
            train_poisoned(config, {3, 7})
    resumed = train_poisoned(config, {3, 7})
    assert resumed.updates == whole.updates == 10
    expected = whole.store.tensors()
    assert all(torch.equal(expected[n], t) for n, t in resumed.store.tensors().items())


def test_too_many_in_a_row_stop_the_run(tiny_values, monkeypatch):
    assert loop.SKIPS_AT_MOST == 50  # as GPT-NeoX; fewer here, to be quick
    monkeypatch.setattr(loop, "SKIPS_AT_MOST", 4)
    with Run(with_training(tiny_values, nonfinite="skip"), quiet=True) as run:
        poison(run, {2, 3, 4, 6, 7, 8, 9})
        with pytest.raises(UserError, match="step 9: .* as in the 3 steps before"):
            run.train()
    # Three in a row are borne, and then the count begins anew.
    assert (run.step, run.updates) == (8, 2)


def test_another_choice_may_be_made_when_going_on(tiny_values):
    """Who stops at a NaN wants to go on with skip; nothing of what was computed differs."""
    with Run(with_training(tiny_values), quiet=True) as run:
        poison(run, {6})
        with pytest.raises(Diverged):
            run.train()
    run = train_poisoned(with_training(tiny_values, nonfinite="skip"), {6})
    assert run.resumed and run.updates == 11
