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
