"""Failures and the cost of a checkpoint -> how often to save, and what share of the time is then useful.

    |── work τ ──|δ|── work τ ──|δ|── wor✗ R |── work τ ──|δ|        ✗ a failure: what was done since δ is lost

Failures come independently of each other at a constant rate, once in M seconds. Working for τ between saves of δ,
with R to be running again (failures in saves and restarts counted too), takes for each τ of work

    M exp(R/M) (exp((τ + δ)/M) - 1)                             Daly 2006, "A higher order estimate of the
                                                                optimum checkpoint interval", equation 13
    τ = sqrt(2 δ M)                                             Young 1974, first order
    τ = sqrt(2 δ M) (1 + sqrt(δ/2M)/3 + (δ/2M)/9) - δ           Daly 2006, equation 37, for δ < 2M; else τ = M

A save in the background costs the steps' stall alone, but what is lost also reaches back over its writing: that
time belongs into R.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from castalia.errors import UserError

DAY = 86400.0
UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": DAY}


@dataclass(frozen=True)
class Interval:
    """How often to save.

    Attributes:
        mtbf: seconds between failures of the job.
        cost, restart: seconds that a save takes from the steps, and from a failure to the next step.
        young, daly: seconds of work between saves.
        share: of all time that is useful with `daly`, 0..1.
    """

    mtbf: float
    cost: float
    restart: float
    young: float
    daly: float
    share: float


def young(cost: float, mtbf: float) -> float:
    """Seconds of work between saves, to first order."""
    return math.sqrt(2 * cost * mtbf)


def daly(cost: float, mtbf: float) -> float:
    """The same to higher order; at least zero."""
    if cost >= 2 * mtbf:
        return mtbf
    x = cost / (2 * mtbf)
    return young(cost, mtbf) * (1 + math.sqrt(x) / 3 + x / 9) - cost


def useful_share(interval: float, cost: float, restart: float, mtbf: float) -> float:
    """Expected work done in a long time, over that time."""
    try:
        needed = mtbf * math.exp(restart / mtbf) * math.expm1((interval + cost) / mtbf)
    except OverflowError:  # nothing is ever finished
        return 0.0
    return interval / needed


def best_interval(mtbf: float, cost: float, restart: float) -> Interval:
    """See the top of this file; all in seconds."""
    best = daly(cost, mtbf)
    return Interval(mtbf, cost, restart, young(cost, mtbf), best, useful_share(best, cost, restart, mtbf))


def seconds(text: str, flag: str) -> float:
    """A duration such as 90, 90s, 2.5m, 12h, 3d.

    Raises:
        UserError: it is none, or not above zero.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([a-z]*)\s*", text)
    try:
        value = float(match[1]) * UNITS[match[2]] if match else 0.0
    except (ValueError, KeyError):
        value = 0.0
    if not value > 0:
        raise UserError(f"{flag} {text}: give a duration above zero, such as 90s, 2.5m, 12h or 3d")
    return value


def job_mtbf(mtbf: str | None, failures_per_day: float | None, device_mtbf: str | None, devices: int | None) -> float:
    """Seconds between failures of the job, from whichever was given.

    Raises:
        UserError: not exactly one was given, or a device's without the number of them.
    """
    if sum(value is not None for value in (mtbf, failures_per_day, device_mtbf)) != 1:
        raise UserError("give one of --mtbf, --failures-per-day (both of the job) and --device-mtbf (of one device)")
    if mtbf is not None:
        return seconds(mtbf, "--mtbf")
    if device_mtbf is not None:
        if devices is None:
            raise UserError("--device-mtbf: how many devices? Give --world N")
        return seconds(device_mtbf, "--device-mtbf") / devices
    assert failures_per_day is not None
    if not failures_per_day > 0:
        raise UserError(f"--failures-per-day {failures_per_day}: give a number above zero")
    return DAY / failures_per_day


def as_dict(found: Interval, step: float | None) -> dict[str, Any]:
    """For `--json`; seconds."""
    out = {
        "mtbf": found.mtbf,
        "checkpoint_cost": found.cost,
        "restart_cost": found.restart,
        "interval_young": found.young,
        "interval_daly": found.daly,
        "useful_share": found.share,
    }
    return out if step is None else out | {"step_time": step, "interval_steps": steps_between(found, step)}


def steps_between(found: Interval, step: float) -> int:
    """Steps of so many seconds between saves."""
    return max(round(found.daly / step), 1)


def lines(found: Interval, step: float | None) -> list[str]:
    """For the terminal."""
    out = [
        f"a failure every {duration(found.mtbf)} ({DAY / found.mtbf:.2g} a day), {duration(found.cost)} to save, "
        f"{duration(found.restart)} to be running again:",
        f"  save after {duration(found.daly)} of work (Daly 2006; {duration(found.young)} by Young 1974)",
        f"  useful share of the time: {found.share:.2%}; lost to saving {found.cost / (found.daly + found.cost):.2%}, "
        "the rest to failures",
    ]
    for factor in (0.5, 2.0):
        share = useful_share(factor * found.daly, found.cost, found.restart, found.mtbf)
        out.append(f"  with {duration(factor * found.daly)} instead: {share:.2%}")
    if step is not None:
        out.append(f"  at {step:g} s a step: checkpoint.interval={steps_between(found, step)}")
    return out


def duration(value: float) -> str:
    """Seconds in the unit that suits them."""
    for unit, size in (("days", DAY), ("h", 3600.0), ("min", 60.0)):
        if value >= 2 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} s"
