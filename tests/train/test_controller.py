"""A batch that grows by the gradient noise: when, by how much, and bit for bit the same over sittings and ranks."""

from __future__ import annotations

import json
import os

import pytest
import torch

from castalia.checkpoint import find_checkpoint, load_checkpoint
from castalia.config import Config
from castalia.config.load import from_yaml
from castalia.config.ramp import Level
from castalia.data.plan import Rebatch, Resize, RunPlan, Skip, journal_from_json, journal_to_json
from castalia.errors import UserError
from castalia.parallel.layout import Layout
from castalia.parallel.testing import run_in_processes
from castalia.train.controller import check_controller, control_batch
from castalia.train.guard import Guard
from castalia.train.loop import Stopped
from castalia.train.metrics import read_metrics
from castalia.train.run import train


class Still:
    """As much of a run as the controller looks at, its noise scale's lower end given."""

    class _Mesh:
        @staticmethod
        def from_first(value):
            return value

    def __init__(self, low, step=0, journal=(), **settings):
        training = {"steps": 100, "batch_size": 20, "micro_batch_size": 2}
        settings = {"start": 4} | settings
        self.config = Config.model_validate(
            {"training": training, "batch_controller": settings, "logging": {"noise_scale": True}}
        )
        self.low, self.step, self.steps, self.journal = low, step, 100, journal
        self.mesh, self.said = self._Mesh(), []
        self.noise = self.metrics = self.console = self.loader = self
        self.replan(journal)

    def in_sequences(self):
        return {"value": 1e9, "low": self.low, "high": None}

    def write(self, *_, **values):
        self.said.append(values["text"])

    def say(self, text):
        self.said.append(text)

    def replan(self, journal):
        self.journal, self.plan = journal, RunPlan(20, 512, 101, journal, levels=(Level(0, 0, 4),))


def decided(*given, **settings):
    run = Still(*given, **settings)
    before = len(run.journal)
    control_batch(run)
    return run.journal[before:]


def test_it_grows_once_the_larger_batch_is_surely_below_the_noise_scale():
    assert decided(8.0, 3) == (Resize(3, 8),)
    assert decided(7.9, 3) == decided(None, 3) == ()
    assert decided(16.0, 3, fraction=0.5) == (Resize(3, 8),) and decided(15.9, 3, fraction=0.5) == ()
    assert decided(12.0, 3, factor=3) == (Resize(3, 12),)


def test_it_ends_at_the_largest_batch_and_with_the_run():
    assert decided(1e9, 9, (Resize(3, 16),)) == (Resize(9, 20),)
    assert decided(1e9, 9, (Resize(3, 20),)) == () and decided(1e9, 100) == ()


def test_it_waits_for_tokens_between_changes():
    tokens = 5 * 4 * 512  # five steps of the first size
    assert decided(1e9, 4, min_tokens=tokens) == () and decided(1e9, 5, min_tokens=tokens) == (Resize(5, 8),)
    grown = (Resize(5, 8),)  # of the second size, half as many
    assert decided(1e9, 7, grown, min_tokens=tokens) == ()
    assert decided(1e9, 8, grown, min_tokens=tokens) == (Resize(8, 16),)


def test_it_does_not_move_what_a_rollback_has_counted():
    assert decided(1e9, 9, (Skip(8, 3),)) == () and decided(1e9, 11, (Skip(8, 3),)) == (Resize(11, 8),)
    assert decided(1e9, 9, (Resize(12, 8),)) == ()


def test_plans_with_decisions_read_each_sample_once():
    journal = (Resize(2, 4), Rebatch(5, ((0, 0, 2),)), Resize(7, 6))
    assert journal_from_json(json.loads(json.dumps(journal_to_json(journal)))) == journal
    plan = RunPlan(3, 8, 9, journal)
    assert [plan.at(step).num_samples for step in range(9)] == [2, 2, 4, 4, 4, 3, 3, 6, 6]
    read = [n for s in map(plan.at, range(9)) for n in range(s.first_sample, s.first_sample + s.num_samples)]
    assert read == list(range(plan.num_samples)) and plan.sizes == (3, 4, 6)


@pytest.fixture
def values(tiny_values):
    return tiny_values | {
        "training": {"steps": 20, "batch_size": 16, "micro_batch_size": 2},
        # So small a model learns too quickly to have much noise; what matters is that it grows in the midst.
        "batch_controller": {"start": 4, "fraction": 100.0, "min_tokens": 3 * 4 * 32},
        "logging": {"interval": 1, "noise_scale": True, "noise_scale_window": 8},
        "evaluation": {"interval": None, "at_end": False},
        "checkpoint": {"interval": None},
    }


def run_of(values, output, **training):
    given = values | {"output": str(output), "training": values["training"] | training}
    return train(Config.model_validate(given), quiet=True)


def outcome(run):
    """What must not depend on sittings: batches, losses, what was decided, the final weights and moments."""
    records = [r for r in read_metrics(run.directory / "metrics.jsonl") if r["kind"] == "train"]
    held = {name: torch.zeros_like(t) for name, t in run.store.tensors().items()}
    load_checkpoint(find_checkpoint(run.checkpoints).path, held)
    return [(r["batch_size"], r["tokens"], r["loss"], r.get("noise_scale_low")) for r in records], (
        run.journal,
        {name: tensor.tolist() for name, tensor in held.items()},
    )


def test_a_resumed_run_decides_as_an_unbroken_one(values, tmp_path):
    whole = run_of(values, tmp_path / "whole")
    grown = [entry.from_step for entry in whole.journal if isinstance(entry, Resize)]
    assert [entry.size for entry in whole.journal] == [8, 16] and 3 <= grown[0] < grown[1] < 20
    for stop in (grown[0], grown[1] - 1):  # right after a decision, and right before one
        with pytest.raises(Stopped):
            run_of(values, tmp_path / f"halves-{stop}", exit_interval=stop)
        assert outcome(run_of(values, tmp_path / f"halves-{stop}")) == outcome(whole)
    taken = [whole.loader.plan.at(step) for step in range(20)]
    assert all(b.first_sample == a.first_sample + a.num_samples for a, b in zip(taken, taken[1:], strict=False))
    events = [r for r in read_metrics(whole.directory / "metrics.jsonl") if r.get("event") == "batch"]
    assert [e["step"] for e in events] == grown and "4 -> 8 sequences" in events[0]["text"]


def test_settings_without_a_controller_rule_again(values, tmp_path):
    with pytest.raises(Stopped):
        run_of(values, tmp_path / "run", exit_interval=17)
    off = values | {"batch_controller": {}, "output": str(tmp_path / "run")}
    off["training"] = values["training"] | {"batch_size": 4}  # the very size that the controller began with
    run = train(Config.model_validate(off), accept=True, quiet=True)
    assert isinstance(run.journal[-1], Rebatch) and run.loader.plan.at(17).num_samples == 4


def spread(world, values, output):
    """What was decided, in plain data parallelism and with ZeRO, by a run that goes on as one that was not stopped."""
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1")  # joined already, but asked for
    journals = []
    for zero in (0, 2):
        settings, folder = values | {"parallel": {"zero": zero}}, output / str(zero)
        whole = run_of(settings, folder / "whole")
        journals.append(whole.journal)
        if not zero:
            continue
        with pytest.raises(Stopped):
            run_of(settings, folder / "halves", exit_interval=whole.journal[0].from_step)
        halves = run_of(settings, folder / "halves")
        assert halves.journal == whole.journal
        weights = [{n: p.tolist() for n, p in run.store.trained.items()} for run in (whole, halves)]
        assert weights[0] == weights[1]
    return journals


def test_all_ranks_decide_the_same_and_go_on_the_same(values, tmp_path):
    values["training"] |= {"batch_size": 32}
    values["batch_controller"] |= {"start": 8}
    first, second = run_in_processes(2, spread, values, tmp_path, timeout=120)
    assert first == second and all(journal[0].size == 16 for journal in first)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_controller: {factor: 3}", "needs batch_controller.start"),
        ("batch_controller: {start: 4}", "set logging.noise_scale=true"),
        ("batch_controller: {start: 32}\nlogging: {noise_scale: true}", "below training.batch_size"),
        ("batch_controller: {start: 4}\nlogging: {noise_scale: true}", "multiple of training.micro_batch_size"),
        ("batch_controller: {start: 4}\ntraining: {tokens: 9}\nlogging: {noise_scale: true}", "training.tokens do not"),
    ],
)
def test_controllers_that_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        from_yaml(text, "f.yml")


def test_a_first_batch_that_a_layout_cannot_share_is_refused():
    run = Still(None)
    with pytest.raises(UserError, match="multiple of 8"):
        check_controller(run.config, Layout(replicate=4))
    check_controller(run.config, Layout(replicate=2))


def test_a_rollback_across_a_decision_leaves_out_the_suspects_alone(values, tmp_path, monkeypatch):
    """The batch grows among the suspects: what was decided stays, and they are counted by it."""
    values |= {
        "guard": {"spikes": "rollback", "lookback": 2},
        "checkpoint": {"interval": 5, "keep_last": None},
        "data": values["data"] | {"order": "permutation"},
        "training": values["training"] | {"steps": 18},
    }
    whole = run_of(values, tmp_path / "whole")
    grown, calls = whole.journal[0].from_step, []
    spike = grown + 1

    def judge(self, loss, grad_norm):
        calls.append(loss)
        return "it was told so" if len(calls) == spike + 1 else None

    monkeypatch.setattr(Guard, "judge", judge)
    run = run_of(values, tmp_path / "guarded")
    assert run.journal[:2] == (Resize(grown, 8), Skip(spike - 2, 3, "it was told so"))
    read = [set(range(s.first_sample, s.first_sample + s.num_samples)) for s in map(run.loader.plan.at, range(18))]
    together = set().union(*read)
    assert sum(map(len, read)) == len(together)
    suspects = [whole.loader.plan.at(step) for step in range(spike - 2, spike + 1)]
    left_out = {s.first_sample + i for s in suspects for i in range(s.num_samples)}
    assert left_out == set(range(max(together) + 1)) - together
