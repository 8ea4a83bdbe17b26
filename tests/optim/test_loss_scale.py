"""The loss scale against its recurrence, written out."""

from __future__ import annotations

import random

import pytest
import torch

from castalia.config import Config
from castalia.optim.loss_scale import LossScaler


def scaler(**training):
    return LossScaler(
        Config.model_validate({"training": {"steps": 1, "precision": "fp16", **training}}).training,
    )


def test_it_follows_the_recurrence():
    mine = scaler(initial_scale_power=4, loss_scale_window=3, loss_scale_hysteresis=2, min_loss_scale=2)
    draw = random.Random(0)
    # DeepSpeed's variables under ZeRO: the number of the step and of the last one that overflowed.
    scale, hysteresis, last = 16.0, 2, -1
    for step in range(300):
        overflow = draw.random() < 0.25
        fine = True
        if overflow:
            if hysteresis == 1:
                fine = scale > 2
                scale = max(scale / 2, 2.0)
            else:
                hysteresis -= 1
            last = step
        elif (step - last) % 3 == 0:
            hysteresis, scale = 2, 2 * scale
        assert mine.update(not overflow) is fine, step
        assert (mine.scale, mine.left) == (scale, hysteresis), step
    assert mine.scale != 16.0


def test_each_rule_by_itself():
    mine = scaler(initial_scale_power=2, loss_scale_window=2, loss_scale_hysteresis=3)
    seen = []
    for finite in (False, False, False, True, True, False, False, False, False, False):
        seen.append((mine.update(finite), mine.scale, mine.left))
    assert seen == [
        (True, 4.0, 2),
        (True, 4.0, 1),
        (True, 2.0, 1),  # and one stays left: the next overflow halves at once
        (True, 2.0, 1),
        (True, 4.0, 3),
        (True, 4.0, 2),
        (True, 4.0, 1),
        (True, 2.0, 1),
        (True, 1.0, 1),
        (False, 1.0, 1),
    ]


def test_a_fixed_scale_stays():
    mine = scaler(loss_scale=128.0)
    assert all(mine.update(finite) for finite in (True, False, False) * 20) and mine.scale == 128.0
    mine.restore({"scale": 4.0, "hysteresis": 1, "good_steps": 7})
    assert mine.scale == 128.0


def test_unscaling_is_exact_and_in_place():
    mine, gradients = scaler(), [torch.randn(5), torch.randn(2, 3)]
    scaled = [g * 65536 for g in gradients]
    mine.unscale(iter(scaled))
    assert all(torch.equal(a, b) for a, b in zip(scaled, gradients, strict=True))
    mine.unscale([])


def test_its_state_goes_on_where_it_was():
    one, other = scaler(loss_scale_window=5), scaler(loss_scale_window=5)
    for finite in (True, False, True, True, False, True):
        one.update(finite)
    other.restore(one.state())
    for finite in (True, True, True, True, False, False):
        assert one.update(finite) == other.update(finite) and one.state() == other.state()
    fresh = scaler()
    fresh.restore(None)
    assert fresh.state() == scaler().state()


@pytest.mark.parametrize(
    ("training", "text"),
    [
        ({"precision": "bf16", "loss_scale": 8.0}, "training.loss_scale is of use with training.precision fp16 alone"),
        ({"loss_scale_window": 10, "precision": "fp32"}, "training.loss_scale_window is of use with"),
        ({"loss_scale": 8.0, "loss_scale_window": 10}, "training.loss_scale_window moves a dynamic scale"),
        ({"initial_scale_power": 2, "min_loss_scale": 8}, "training.min_loss_scale 8.0 is above"),
    ],
)
def test_settings_without_effect_are_refused(training, text):
    with pytest.raises(ValueError, match=text):
        scaler(**training)
