"""Batches that change their size in the midst of a run: no sample twice, none left out."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from castalia.config.ramp import Level
from castalia.data.plan import Rebatch, RunPlan, Skip, journal_from_json, journal_to_json


def read(plan: RunPlan) -> list[range]:
    specs = [plan.at(step) for step in range(plan.steps)]
    return [range(s.first_sample, s.first_sample + s.num_samples) for s in specs]


def test_samples_follow_on_those_that_were_read() -> None:
    journal = (Rebatch(2, ((0, 0, 4),)), Rebatch(4, ((0, 0, 1),)))
    steps = read(RunPlan(3, 8, 6, journal))
    assert steps == [range(0, 4), range(4, 8), range(8, 9), range(9, 10), range(10, 13), range(13, 16)]
    kept = journal_from_json(json.loads(json.dumps(journal_to_json(journal))))
    assert kept == journal and read(RunPlan(3, 8, 6, kept)) == steps


def test_skips_leave_out_what_their_steps_would_have_taken() -> None:
    journal = (Skip(1, 1), Rebatch(2, (Level(0, 0, 4),)), Skip(3, 2))
    assert read(RunPlan(2, 8, 5, journal)) == [
        range(0, 4), range(8, 12), range(12, 14), range(18, 20), range(20, 22)
    ]  # fmt: skip


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=4), st.integers(1, 6))
def test_no_sample_is_read_twice_or_left_out(stretches: list[tuple[int, int]], last: int) -> None:
    """Some of the stretches have a ramp of their own."""
    journal, step = [], 0
    for length, size in stretches:
        step += length
        journal.append(Rebatch(step, (Level(0, 0, size), Level(2, 2 * size, size + 1))))
    plan = RunPlan(last, 8, step + 3, tuple(journal))
    samples = [n for numbers in read(plan) for n in numbers]
    assert samples == list(range(plan.num_samples))
    assert len(read(plan)[-1]) == last
