"""Learning rates: native formulas at their corners, and GPT-NeoX's own."""

from __future__ import annotations

import math

import pytest

from castalia.config import ScheduleConfig
from castalia.optim import learning_rate


def rates(steps, lr=1.0, **kw):
    cfg = ScheduleConfig(**kw)
    return [learning_rate(n, lr, cfg, steps) for n in range(steps + 1)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant", "exponential"])
def test_native_rises_to_the_peak_and_never_starts_at_zero(kind):
    values = rates(100, type=kind, warmup_steps=10, min_lr=0.05)
    assert values[0] == pytest.approx(1 / 11)
    assert values[10] == pytest.approx(1.0)
    assert all(a < b for a, b in zip(values[:10], values[1:11], strict=True))
    assert all(a >= b for a, b in zip(values[10:], values[11:], strict=False))


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_native_ends_at_min_lr_and_stays(kind):
    cfg = ScheduleConfig(type=kind, warmup=0.1, min_lr=0.1)
    assert learning_rate(100, 1.0, cfg, 100) == pytest.approx(0.1)
    assert learning_rate(1000, 1.0, cfg, 100) == pytest.approx(0.1)


def test_cosine_halfway_and_wsd_plateau():
    assert rates(100, type="cosine", warmup=0.0)[50] == pytest.approx(0.5)
    wsd = rates(100, type="wsd", warmup=0.0, decay_share=0.2)
    assert wsd[80] == pytest.approx(1.0) and wsd[90] == pytest.approx(0.5)


def test_gptneox_main_follows_its_table():
    cfg = {"type": "cosine", "warmup": 0.1, "min_lr": 3e-4, "arithmetic": "gptneox_main"}
    values = rates(30, lr=3e-3, **cfg)
    assert values[0] == values[1] == pytest.approx(1e-3)  # the first two updates share a rate
    assert values[3] == pytest.approx(3e-3)
    u, end = 20 - 3, 27
    assert values[20] == pytest.approx(3e-4 + 0.5 * 2.7e-3 * (1 + math.cos(math.pi * u / end)))


def test_gptneox_v2_starts_at_zero_and_freezes_early():
    values = rates(100, type="linear", warmup=0.1, arithmetic="gptneox_v2.0")
    assert values[0] == 0.0
    assert values[90] == values[100] == pytest.approx((100 - 80) / 100)


@pytest.mark.parametrize(("shape", "half"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - 0.5**0.5)])
def test_shapes_of_wsd_halfway_through_the_decay(shape, half):
    values = rates(100, type="wsd", warmup=0.0, decay_share=0.2, decay_shape=shape)
    assert values[80] == pytest.approx(1.0) and values[90] == pytest.approx(half) and values[100] == pytest.approx(0.0)


def test_exponential_decay_of_wsd_ends_at_the_floor():
    values = rates(100, type="wsd", warmup=0.0, decay_share=0.2, decay_shape="exponential", min_lr=0.1)
    assert values[80] == pytest.approx(1.0) and values[100] == pytest.approx(0.1)
    assert values[90] == pytest.approx(0.1 + 0.9 * (0.1 - 0.01) / 0.99)


def test_inverse_sqrt_falls_from_the_end_of_the_warmup():
    values = rates(400, type="inverse_sqrt", warmup_steps=100)
    assert values[100] == pytest.approx(1.0) and values[400] == pytest.approx(0.5)


def test_restarts_grow():
    values = rates(70, type="cosine_restarts", warmup=0.0, restart_steps=10, restart_factor=2.0, min_lr=0.1)
    assert [values[n] for n in (0, 10, 30)] == pytest.approx([1.0, 1.0, 1.0])
    assert values[5] == values[20] == values[50] == pytest.approx(0.55)
    even = rates(30, type="cosine_restarts", warmup=0.0, restart_steps=10)
    assert [even[n] for n in (0, 5, 10, 25)] == pytest.approx([1.0, 0.5, 1.0, 0.5])


def test_one_cycle_rises_and_falls_as_cosines():
    values = rates(100, type="one_cycle", warmup_steps=29, warmup_from=0.04, min_lr=0.001)
    assert (
        values[14] == pytest.approx(0.52) and values[29] == pytest.approx(1.0) and values[100] == pytest.approx(0.001)
    )


def test_a_range_test_rises_by_equal_factors():
    values = rates(100, type="range_test", warmup=0.0, min_lr=1e-6, lr=1e-2)
    assert values[0] == pytest.approx(1e-6) and values[50] == pytest.approx(1e-4) and values[100] == pytest.approx(1e-2)


def test_deepspeeds_warmups():
    log = rates(100, type="constant", warmup_steps=10, warmup_from=0.1, warmup_shape="log", arithmetic="deepspeed")
    assert log[0] == log[1] == pytest.approx(0.1) and log[5] == pytest.approx(0.1 + 0.9 * math.log(5) / math.log(10))
    assert log[10] == log[11] == log[100] == pytest.approx(1.0)
    linear = rates(101, type="linear", warmup_steps=10, decay_steps=100, arithmetic="deepspeed")
    assert linear[6] == pytest.approx(0.5) and linear[56] == pytest.approx(0.5) and linear[101] == 0.0


def test_deepspeeds_cosine():
    """Ratios of the peak, by the iteration before the update's; the last is reached an iteration early."""
    settings = {"warmup_steps": 10, "warmup_from": 0.2, "decay_steps": 50, "min_lr": 0.1}
    values = rates(60, type="cosine", arithmetic="deepspeed", **settings)
    assert values[0] == 0.0 and values[1] == pytest.approx(0.2) and values[6] == pytest.approx(0.6)
    assert values[11] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 40)) / 2)
    assert values[50] == values[60] == pytest.approx(0.1)


def test_deepspeeds_one_cycle_and_range_test():
    cycle = {"warmup_steps": 10, "warmup_from": 0.2, "decay_steps": 30, "min_lr": 0.2}
    values = rates(40, type="one_cycle", arithmetic="deepspeed", **cycle)
    assert [values[n] for n in (0, 5, 10, 20, 30, 40)] == pytest.approx([0.2, 0.6, 1.0, 0.6, 0.2, 0.2])
    values = rates(40, lr=3e-3, type="range_test", arithmetic="deepspeed", min_lr=1e-3, decay_steps=20)
    assert [values[n] for n in (0, 10, 20, 40)] == pytest.approx([1e-3, 2e-3, 3e-3, 5e-3])


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"decay_shape": "sqrt"}, "decay_shape"),
        ({"type": "wsd", "restart_steps": 3}, "restart_steps"),
        ({"type": "range_test"}, "min_lr"),
        ({"type": "wsd", "arithmetic": "gptneox_main"}, "arithmetic"),
        ({"type": "wsd", "arithmetic": "deepspeed"}, "arithmetic"),
        ({"type": "linear", "arithmetic": "deepspeed", "min_lr": 0.1}, "min_lr"),
        ({"type": "linear", "arithmetic": "deepspeed", "warmup_shape": "cosine"}, "warmup_shape"),
        ({"type": "one_cycle", "warmup_shape": "log"}, "warmup_shape"),
    ],
)
def test_settings_without_use_are_refused(settings, key):
    with pytest.raises(ValueError, match=key):
        ScheduleConfig(**settings)
