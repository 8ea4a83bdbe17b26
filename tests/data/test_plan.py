"""The plan of steps: arithmetic, amendments, and their way through JSON."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.data.plan import (
    RunPlan,
    Skip,
    StepSpec,
    evaluation_samples,
    evaluation_spec,
    journal_from_json,
    journal_to_json,
)
from castalia.errors import UserError

SKIPS = st.lists(st.builds(Skip, st.integers(0, 30), st.integers(1, 5), st.text(max_size=5)), max_size=4)


def test_at() -> None:
    plan = RunPlan(batch_size=4, seq_length=8, steps=10)
    assert plan.at(3) == StepSpec(step=3, first_sample=12, num_samples=4, seq_length=8)
    assert plan.at(3).tokens == 32
    assert plan.num_samples == 40
    assert RunPlan(4, 8, 0).num_samples == 0
    for step in (-1, 10):
        with pytest.raises(IndexError):
            plan.at(step)


def test_skip() -> None:
    plan = RunPlan(4, 8, 10, (Skip(from_step=2, num_steps=3),))
    assert [plan.at(step).first_sample for step in range(4)] == [0, 4, 20, 24]
    assert plan.num_samples == 52


@settings(deadline=None, derandomize=True)
@given(journal=SKIPS)
def test_skips_leave_gaps_and_never_repeat(journal: list[Skip]) -> None:
    plan = RunPlan(2, 8, 40, tuple(journal))
    firsts = [plan.at(step).first_sample for step in range(40)]
    assert all(b - a >= 2 for a, b in pairwise(firsts))
    assert firsts[39] == 2 * (39 + sum(entry.num_steps for entry in journal))
    assert journal_from_json(json.loads(json.dumps(journal_to_json(journal)))) == tuple(journal)


def test_journal_of_a_later_release_is_refused() -> None:
    for entry in ({"kind": "ramp"}, {}, {"kind": "skip", "from_step": 1, "num_steps": 1, "more": 2}):
        with pytest.raises(UserError, match="does not know"):
            journal_from_json([entry])
    with pytest.raises(UserError, match="impossible"):
        journal_from_json([{"kind": "skip", "from_step": 1, "num_steps": 0}])


def test_evaluation() -> None:
    same = [evaluation_spec(k, batches=3, batch_size=4, seq_length=8) for k in range(2)]
    assert [(s.first_sample, s.num_samples) for s in same] == [(0, 12), (0, 12)]
    on = [evaluation_spec(k, 3, 4, 8, continuing=True) for k in range(3)]
    assert [(s.first_sample, s.num_samples) for s in on] == [(0, 12), (12, 12), (24, 12)]
    assert [(p.first_sample, p.num_samples) for p in on[1].parts(5)] == [(12, 5), (17, 5), (22, 2)]
    assert evaluation_samples(30, 10, 2, 8) == 16
    assert evaluation_samples(30, 10, 2, 8, continuing=True) == 64
