"""The interval between checkpoints against a simulation of failures."""

import json
import math

import numpy as np
import pytest

from castalia.cli import main
from castalia.errors import UserError
from castalia.tools.interval import best_interval, daly, job_mtbf, seconds, useful_share, young


def simulated_share(interval: float, cost: float, restart: float, mtbf: float, segments: int = 20_000) -> float:
    """Play it: work and save, fail at random, start again, until so many saves were made."""
    draw = np.random.default_rng(0)
    total, saved = 0.0, 0
    while saved < segments:
        to_failure = draw.exponential(mtbf)
        # Without memory: whole segments until the failure, and the time until then is gone in any case.
        whole = min(int(to_failure // (interval + cost)), segments - saved)
        saved += whole
        if saved == segments:
            total += whole * (interval + cost)
            break
        total += to_failure
        while (again := draw.exponential(mtbf)) < restart:
            total += again
        total += restart
    return saved * interval / total


@pytest.mark.parametrize(("mtbf", "cost", "restart"), [(3600, 60, 300), (40_000, 20, 700), (600, 120, 60)])
def test_share_is_that_of_a_simulation_and_the_interval_its_best(mtbf: float, cost: float, restart: float) -> None:
    found = best_interval(mtbf, cost, restart)
    assert found.share == pytest.approx(simulated_share(found.daly, cost, restart, mtbf), rel=0.015)
    fine = max(np.geomspace(found.daly / 4, 4 * found.daly, 2001), key=lambda t: useful_share(t, cost, restart, mtbf))
    assert found.daly == pytest.approx(fine, rel=0.02)  # of the model itself, the best
    for factor in (0.4, 2.5):
        assert simulated_share(factor * found.daly, cost, restart, mtbf) < found.share


def test_formulas() -> None:
    assert young(50, 10_000) == 1000
    assert daly(50, 10_000) == pytest.approx(1000 * (1 + 0.05 / 3 + 0.0025 / 9) - 50)
    assert daly(5, 2) == 2
    assert useful_share(1e9, 1, 1, 1) == 0
    assert useful_share(100, 0.0, 0.0, 1e12) == pytest.approx(1)
    assert math.isclose(young(1, 1e6) / daly(1, 1e6), 1, rel_tol=1e-3)


def test_rates_and_durations() -> None:
    assert [seconds(t, "--mtbf") for t in ("90", "90s", "1.5m", "2h", "3d")] == [90, 90, 90, 7200, 259_200]
    assert job_mtbf(None, 4.0, None, None) == 21_600
    assert job_mtbf(None, None, "1000h", 100) == 36_000
    for bad in ("", "5 parsecs", "0", "-3h", "1.2.3"):
        with pytest.raises(UserError, match="--mtbf"):
            seconds(bad, "--mtbf")
    with pytest.raises(UserError, match="--world"):
        job_mtbf(None, None, "1000h", None)
    with pytest.raises(UserError, match="one of"):
        job_mtbf("1h", 2.0, None, None)


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--mtbf", "12h", "--checkpoint-cost", "30s", "--restart-cost", "10m", "--step-time", "10"]
    assert main(["plan", *flags, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)["checkpoint_interval"]
    assert answer["interval_steps"] == round(answer["interval_daly"] / 10)
    assert main(["plan", *flags]) == 0
    assert f"checkpoint.interval={answer['interval_steps']}" in capsys.readouterr().out
