"""Spikes: a poisoned batch leaves no trace; what was in it is written down; budgets hold."""

from __future__ import annotations

import json

import pytest
import torch

from castalia.checkpoint import find_checkpoint, load_checkpoint
from castalia.config import Config
from castalia.config.schema_guard import GuardConfig
from castalia.data.loader import Loader
from castalia.data.plan import RunPlan, Skip
from castalia.train.guard import Guard, Spiked, left_out
from castalia.train.loop import Stopped
from castalia.train.metrics import read_metrics
from castalia.train.run import Run, train

POISONED = 29  # counted from 0


@pytest.fixture
def values(tiny_values):
    return tiny_values | {
        "training": {"steps": 34, "batch_size": 4, "micro_batch_size": 4},
        "guard": {"spikes": "skip", "window": 16, "threshold": 5.0, "lookback": 1, "budget": 6},
        "evaluation": {"interval": None, "at_end": False},
    }


@pytest.fixture
def poison(monkeypatch):
    """`poison(first, count)`: those samples have labels that nobody could guess."""

    def spoil(first, count):
        build = Loader._micro_batch

        def spoilt(self, numbers, spec):
            batch = build(self, numbers, spec)
            for row, number in enumerate(numbers):
                if first <= number < first + count:
                    draw = torch.Generator().manual_seed(int(number))
                    batch.labels[row] = torch.randint(0, 200, batch.labels[row].shape, generator=draw)
            return batch

        monkeypatch.setattr(Loader, "_micro_batch", spoilt)

    return spoil


def never_saw(values, output, skip):
    """The final checkpoint of a run whose journal leaves the batches out from the start."""
    off = values["guard"] | {"spikes": "none"}
    config = Config.model_validate(values | {"output": str(output), "guard": off})
    with Run(config, quiet=True) as run:
        run.replan((skip,))
        run.train()
    return tensors(run)


def tensors(run):
    path = find_checkpoint(run.checkpoints).path
    held = {name: torch.zeros_like(t) for name, t in run.store.tensors().items()}
    load_checkpoint(path, held)
    return held


@pytest.mark.parametrize(("spikes", "first", "count"), [("skip", POISONED, 1), ("rollback", POISONED - 1, 2)])
def test_final_weights_are_those_of_a_run_that_never_saw_the_batch(values, poison, tmp_path, spikes, first, count):
    values["guard"]["spikes"] = spikes
    # Samples for those that are left out are laid out beforehand, so both runs must ask for as many.
    clean = values | {"data": values["data"] | {"order": "permutation"}}
    poison(POISONED * 4, 4)
    guarded = train(Config.model_validate(clean), quiet=True)
    assert [(e.from_step, e.num_steps) for e in guarded.journal] == [(first, count)]
    expected = never_saw(clean, tmp_path / "clean", Skip(first, count))
    for name, tensor in tensors(guarded).items():
        assert torch.equal(tensor, expected[name]), name
    steps = [r["step"] for r in read_metrics(guarded.directory / "metrics.jsonl") if r["kind"] == "train"]
    assert steps == list(range(1, 35))
    (incident,) = (guarded.directory / "incidents").iterdir()
    content = json.loads(incident.read_text())
    assert content["step"] == POISONED + 1 and "deviations above" in content["why"]
    assert [b["step"] for b in content["left_out"]] == list(range(first + 1, POISONED + 2))
    numbers = [s["sample"] for s in content["left_out"][-1]["samples"]]
    assert numbers == list(range(POISONED * 4, POISONED * 4 + 4))
    assert all(s["documents"] for s in content["left_out"][-1]["samples"])


def test_a_poisoned_run_without_a_guard_differs(values, poison, tmp_path):
    """The test above can fail."""
    values["guard"]["spikes"] = "none"
    clean = values | {"data": values["data"] | {"order": "permutation"}}
    expected = never_saw(clean, tmp_path / "clean", Skip(POISONED, 1))
    poison(POISONED * 4, 4)
    found = tensors(train(Config.model_validate(clean), quiet=True))
    assert any(not torch.equal(found[name], expected[name]) for name in found)


def test_a_guarded_run_resumes_with_what_it_left_out(values, poison, tmp_path):
    poison(POISONED * 4, 4)
    whole = train(Config.model_validate(values), quiet=True)
    halves = values | {"output": str(tmp_path / "halves")}
    stop = halves | {"training": values["training"] | {"exit_interval": 31}}
    with pytest.raises(Stopped):
        train(Config.model_validate(stop), quiet=True)
    resumed = train(Config.model_validate(halves), quiet=True)
    assert resumed.journal == whole.journal and len(whole.journal) == 1
    expected = tensors(whole)
    assert all(torch.equal(t, expected[n]) for n, t in tensors(resumed).items())


def test_two_spikes_within_the_lookback_leave_every_suspect_out_and_nothing_twice():
    """The second rollback goes back beyond the first's place in the journal."""
    first = RunPlan(4, 32, 40, left_out((), 16, 3, "a"))
    suspect = [first.at(step).first_sample for step in (14, 15, 16)]
    second = RunPlan(4, 32, 40, left_out(first.journal, 14, 3, "b"))
    taken = [second.at(step).first_sample for step in range(40)]
    assert taken[:14] == [4 * step for step in range(14)]
    assert not set(taken) & {*suspect, *(4 * step for step in (16, 17, 18))} and taken[14] == suspect[-1] + 4
    assert len(set(taken)) == 40 and sum(entry.num_steps for entry in second.journal) == 6


def test_poison_in_two_near_places_is_all_gone_after_two_rollbacks(values, poison, tmp_path):
    values["guard"] |= {"spikes": "rollback", "budget": 12, "lookback": 2}
    values["data"] = values["data"] | {"order": "permutation"}
    poison(POISONED * 4, 8)
    guarded = train(Config.model_validate(values), quiet=True)
    (skip,) = [e for e in guarded.journal if isinstance(e, Skip)]
    assert skip.from_step == POISONED - 4
    expected = never_saw(values, tmp_path / "clean", skip)
    assert all(torch.equal(t, expected[n]) for n, t in tensors(guarded).items())


def test_more_spikes_than_the_budget_stop_the_run(values, poison):
    values["guard"]["budget"] = 2
    poison(POISONED * 4, 4 * 30)
    with pytest.raises(Spiked, match=r"2 steps were left out before of the 2 that guard\.budget allows"):
        train(Config.model_validate(values), quiet=True)


def test_the_judge_knows_jumps_from_noise():
    guard = Guard(GuardConfig(spikes="skip", window=20, threshold=6.0))
    draw = torch.Generator().manual_seed(0)
    for _ in range(200):
        noise = torch.randn(2, generator=draw)
        assert guard.judge(3.0 + 0.1 * float(noise[0]), 1.0 * float(torch.exp(0.1 * noise[1]))) is None
    assert "loss" in guard.judge(4.5, 1.0) and "gradient norm" in guard.judge(3.0, 50.0)
    assert "not finite" in guard.judge(float("nan"), 1.0)
    assert guard.judge(3.0, 1.0) is None  # a spike is no part of what later steps are judged by
    other = Guard(GuardConfig(spikes="skip", window=20))
    other.restore(guard.state())
    assert other.state() == guard.state()
