"""Training in fp16: the loss scale moves by its rule, overflows leave out exactly their step, checkpoints carry it."""

from __future__ import annotations

import math

import pytest
import torch

from castalia.config import Config
from castalia.errors import UserError
from castalia.train.loop import Diverged, Stopped
from castalia.train.metrics import read_metrics
from castalia.train.run import Run
from castalia.train.saving import state_of


def half(values, **training):
    return Config.model_validate(values | {"training": values["training"] | {"precision": "fp16"} | training})


def overflow(run, steps):
    """Plant a loss scale that no fp16 gradient bears in these steps, counted from 1."""
    real = run.engine.forward_backward

    def forward_backward(micro_batches, tokens, step):
        kept = run.engine.loss_scale
        if step + 1 in steps:
            run.engine.loss_scale = 2.0**40
        stats = real(micro_batches, tokens, step)
        run.engine.loss_scale = kept
        return stats

    run.engine.forward_backward = forward_backward


def train(config, steps=(), look=None):
    with Run(config, quiet=True) as run:
        overflow(run, steps)
        run.train([look] if look else [])
    return run


def scales(run):
    return [r["loss_scale"] for r in read_metrics(run.directory / "metrics.jsonl") if r["kind"] == "train"]


def test_it_learns_as_fp32_does(tiny_values, tmp_path):
    run = train(half(tiny_values))
    wide = train(Config.model_validate(tiny_values | {"output": str(tmp_path / "wide")}))
    assert run.updates == 12 and scales(run) == [65536.0] * 12
    assert run.last["valid"]["loss"] == pytest.approx(wide.last["valid"]["loss"], rel=2e-3)
    assert run.last["train"]["grad_norm"] == pytest.approx(wide.last["train"]["grad_norm"], rel=2e-2)
    assert "loss_scale" not in wide.last["train"]
    assert all(t.dtype == torch.float32 for t in run.store.tensors().values())


@pytest.mark.parametrize("arena", [True, False])
def test_an_overflow_leaves_out_its_step_and_halves_the_scale(tiny_values, arena):
    before = {}

    def look(run):
        before[run.step] = {n: t.clone() for n, t in run.store.tensors().items()}

    values = tiny_values | {"performance": {**tiny_values["performance"], "arena": arena}}
    # A gradient that is no number ends other runs; here it is what the scale is for.
    run = train(half(values, loss_scale_hysteresis=1, loss_scale_window=4, nonfinite="stop"), {3}, look)
    assert run.updates == 11
    for step in range(2, 13):
        same = all(torch.equal(before[step - 1][n], t) for n, t in before[step].items())
        assert same == (step == 3), step
    assert scales(run) == [2.0**p for p in (16, 16, 15, 15, 15, 15, 16, 16, 16, 16, 17, 17)]
    assert all(t.isfinite().all() for t in before[12].values())


def test_a_scale_too_large_shrinks_until_it_fits(tiny_values):
    run = train(half(tiny_values, initial_scale_power=22))
    found = scales(run)
    assert 0 < 12 - run.updates < 12 and found[-1] < 2.0**22
    assert found[0] == 2.0**22  # the hysteresis bears one


def test_an_overflow_at_the_least_scale_ends_the_run(tiny_values):
    with Run(half(tiny_values, initial_scale_power=1, min_loss_scale=1, loss_scale_hysteresis=1), quiet=True) as run:
        overflow(run, {2, 4, 5})
        with pytest.raises(Diverged, match=r"step 4: .*as small as training.min_loss_scale 1.0") as error:
            run.train()
        assert isinstance(error.value, UserError) and (run.step, run.updates) == (3, 2)


def test_a_fixed_scale_skips_and_stays(tiny_values):
    run = train(half(tiny_values, loss_scale=1000.0), {2, 5})
    assert scales(run) == [1000.0] * 12 and run.updates == 10


def test_resumed_equals_unbroken_and_the_scale_goes_along(tiny_values, tmp_path):
    changes = {"loss_scale_window": 3, "initial_scale_power": 8}
    whole = train(half(tiny_values, **changes), {2, 3, 7})
    config = half(tiny_values | {"output": str(tmp_path / "other")}, exit_interval=5, **changes)
    for _ in range(2):
        with pytest.raises(Stopped):
            train(config, {2, 3, 7})
    resumed = train(config, {2, 3, 7})
    assert scales(resumed) == scales(whole) and len(set(scales(whole))) > 2
    assert state_of(resumed)["loss_scale"] == state_of(whole)["loss_scale"] is not None
    expected = whole.store.tensors()
    assert all(torch.equal(expected[n], t) for n, t in resumed.store.tensors().items())


def test_another_run_begins_with_the_scale_that_was_found(tiny_values, tmp_path):
    rule = {"loss_scale_window": 2, "initial_scale_power": 10}
    first = train(half(tiny_values, steps=6, **rule))
    begun = tiny_values | {"output": str(tmp_path / "other"), "start": {"path": str(first.directory)}}
    assert scales(train(half(begun, steps=7, **rule))) == [2.0**13]
    without = begun | {"output": str(tmp_path / "third"), "start": {"path": str(first.directory), "optimizer": False}}
    assert scales(train(half(without, steps=1, **rule))) == [2.0**10]


def test_a_checkpoint_of_another_precision_has_no_scale(tiny_values, tmp_path):
    first = train(Config.model_validate(tiny_values))
    assert state_of(first)["loss_scale"] is None
    begun = tiny_values | {"output": str(tmp_path / "other"), "start": {"path": str(first.directory)}}
    run = train(half(begun, steps=13))
    assert scales(run) == [65536.0] and math.isfinite(run.last["train"]["loss"])


def test_every_term_of_the_loss_is_scaled(tiny_values, tmp_path):
    """With experts, their losses and a z-loss the gradient is what it is in fp32: no term escapes the scale."""
    mixed = tiny_values | {
        "model": tiny_values["model"] | {"moe_num_experts": 2, "mtp_depth": 1},
        "loss": {"moe_balance": 1.0, "moe_z_loss": 1.0, "z_loss": 1e-2},
    }
    run = train(half(mixed, steps=1, initial_scale_power=8))
    wide = Config.model_validate(mixed | {"output": str(tmp_path / "w"), "training": {**mixed["training"], "steps": 1}})
    assert run.last["train"]["grad_norm"] == pytest.approx(train(wide).last["train"]["grad_norm"], rel=2e-2)
    assert run.last["train"]["moe_balance"] == pytest.approx(1.0, abs=0.1)
