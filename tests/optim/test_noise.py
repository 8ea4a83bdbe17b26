"""The noise scale against gradients whose noise is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from castalia.optim.noise import NoiseScale, fieller, student

DIMENSIONS, SIGNAL = 50, 1.0


def measured(true_scale: float, small: int, parts: int, steps: int, seed: int) -> NoiseScale:
    """Measurements of Gaussian gradients with |G|^2 = 1 and tr(S) = the scale."""
    rng = np.random.default_rng(seed)
    mean = np.full(DIMENSIONS, math.sqrt(SIGNAL / DIMENSIONS))
    deviation = math.sqrt(true_scale * SIGNAL / DIMENSIONS)
    noise = NoiseScale(steps)
    for _ in range(steps):
        means = mean + rng.normal(size=(parts, DIMENSIONS)) * deviation / math.sqrt(small)
        big = means.mean(0)
        noise.add(float((means**2).sum(1).mean()), small, float(big @ big), small * parts)
    return noise


@pytest.mark.parametrize(("small", "parts"), [(1, 2), (4, 8), (32, 2), (8, 32)])
@pytest.mark.parametrize("true_scale", [3.0, 40.0])
def test_the_truth_is_in_the_interval_as_often_as_it_says(true_scale, small, parts):
    trials, hits = 200, 0
    for seed in range(trials):
        found = measured(true_scale, small, parts, 60, seed).estimate()
        assert found is not None and found.measured == 60
        hits += (found.low is None or found.low <= true_scale) and (found.high is None or true_scale <= found.high)
    assert 0.90 * trials <= hits  # 95%, and three standard deviations of that count below


def test_the_estimate_closes_in():
    found = measured(20.0, 8, 4, 5000, 0).estimate()
    assert found is not None and found.scale == pytest.approx(20.0, rel=0.05)
    assert found.high is not None and found.low is not None and found.high - found.low < 2.0
    assert found.signal == pytest.approx(1.0, rel=0.05) and found.noise == pytest.approx(20.0, rel=0.05)


def test_a_signal_that_may_be_zero_has_no_upper_bound():
    found = measured(1e4, 1, 2, 10, 0).estimate()
    assert found is not None and found.high is None


def test_the_window_moves_and_survives_a_checkpoint():
    noise, other = measured(20.0, 8, 4, 50, 0), NoiseScale(50)
    other.restore(noise.state())
    assert other.estimate() == noise.estimate()
    noise.add(1.0, 8, 1.0, 32)
    assert noise.estimate() != other.estimate() and noise.estimate().measured == 50
    noise.add(float("nan"), 8, 1.0, 32)
    assert noise.estimate().measured == 50 and NoiseScale(3).estimate() is None


def test_quantiles_are_those_of_the_tables():
    for degrees, value in ((5, 2.571), (10, 2.228), (30, 2.042), (1000, 1.962)):
        assert student(degrees) == pytest.approx(value, rel=3e-3)


def test_fieller_without_error_is_the_ratio():
    assert fieller(6.0, 2.0, 0.0, 0.0, 0.0) == (3.0, 3.0)
