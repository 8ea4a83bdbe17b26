"""A growing batch: its levels against a step-by-step reckoning, and what follows from them."""

import pytest

from castalia.config.curriculum import trained_tokens
from castalia.config.derive import derive
from castalia.config.load import from_yaml
from castalia.config.ramp import batch_size, levels, samples_before, steps_for
from castalia.data.plan import RunPlan, Skip
from castalia.errors import UserError


def config(start=4, end=32, by=4, samples=700, rest="steps: 100"):
    return from_yaml(
        f"training: {{batch_size: {end}, micro_batch_size: 2, batch_ramp_start: {start}, "
        f"batch_ramp_increment: {by}, batch_ramp_samples: {samples}, {rest}}}",
        "f.yml",
    )


@pytest.mark.parametrize(
    ("start", "end", "by", "samples"), [(4, 32, 4, 700), (8, 16, 8, 1), (2, 64, 2, 50), (2, 4, 2, 999)]
)
def test_levels_are_those_of_megatrons_rule(start, end, by, samples):
    found, consumed = levels(config(start, end, by, samples).training), 0
    for step in range(600):
        # Consumed samples, over the samples between two increments, rounded down.
        size = min(end, start + int(consumed / (samples / ((end - start) // by))) * by)
        assert batch_size(found, step) == size, step
        assert samples_before(found, step) == consumed
        consumed += size
        assert steps_for(found, consumed) == step + 1 and steps_for(found, consumed - 1) == step + 1


def test_steps_follow_from_tokens():
    full, _ = derive(config(rest="tokens: 1000000"), 100)
    steps = full.training.steps
    assert trained_tokens(full, steps) >= 1000000 > trained_tokens(full, steps - 1)


def test_a_plan_reads_each_sample_once_and_skips_what_a_step_would_have_read():
    plan = RunPlan(32, 8, 100, levels=levels(config().training))
    for step in range(99):
        at, after = plan.at(step), plan.at(step + 1)
        assert after.first_sample == at.first_sample + at.num_samples
    skipping = RunPlan(32, 8, 100, (Skip(10, 3),), levels=plan.levels)
    assert skipping.at(9) == plan.at(9)
    assert (
        skipping.at(10).first_sample == plan.at(13).first_sample
        and skipping.at(10).num_samples == plan.at(10).num_samples
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {batch_ramp_start: 4}", "give all of training.batch_ramp_start"),
        (
            "training: {batch_size: 9, batch_ramp_start: 4, batch_ramp_increment: 2, batch_ramp_samples: 9}",
            "does not reach",
        ),
        (
            "training: {batch_size: 8, batch_ramp_start: 4, batch_ramp_increment: 2, batch_ramp_samples: 9}",
            "micro_batch_size",
        ),
        (
            "training: {batch_size: 8, micro_batch_size: 2, batch_ramp_start: 4, batch_ramp_increment: 2, "
            "batch_ramp_samples: 9}\ndata: {curriculum: linear, curriculum_steps: 3}",
            "do not go together",
        ),
    ],
)
def test_ramps_that_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        from_yaml(text, "f.yml")
