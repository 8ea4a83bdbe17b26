"""The learning rate as a pure function of the number of updates done.

Native arithmetic starts above zero, anneals to `min_lr` exactly at the end of the decay, and
stays there. Translated GPT-NeoX files keep GPT-NeoX's own formulas (`arithmetic`), so that
their curves come out the same, oddities included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from castalia.config import ScheduleConfig


class Point(NamedTuple):
    """Where an update lies: updates after the warm-up, updates of the decay, updates of the warm-up."""

    after: float
    span: float
    warm: float

    @property
    def progress(self) -> float:
        """Share of the decay that is over, 0 to 1."""
        return min(1.0, self.after / self.span)


Shape = Callable[[Point, ScheduleConfig], float]


# progress 0..1 of the last part of a wsd schedule -> share that is left; sqrt is that of Haegele et al. 2024.
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda p: 1.0 - p,
    "cosine": lambda p: 0.5 * (1.0 + math.cos(math.pi * p)),
    "sqrt": lambda p: 1.0 - math.sqrt(p),
    "exponential": lambda p: (0.01**p - 0.01) / 0.99,  # to a hundredth, and the rest taken off evenly
}


def _wsd(at: Point, cfg: ScheduleConfig) -> float:
    """Warm-up, stable, decay (Hu et al. 2024): one until the last `decay_share`, then down to zero."""
    return DECAYS[cfg.decay_shape](max(0.0, 1.0 - (1.0 - at.progress) / cfg.decay_share))


def _restarts(at: Point, cfg: ScheduleConfig) -> float:
    """Cosine with warm restarts (SGDR, Loshchilov & Hutter 2017): periods grow by `restart_factor`."""
    period, begun = float(cfg.restart_steps or at.span), 0.0
    if cfg.restart_factor > 1:  # the number of whole periods that are over, from the sum of a geometric series
        ratio = cfg.restart_factor
        count = math.floor(math.log(at.after / period * (ratio - 1) + 1, ratio) + 1e-9)
        begun, period = period * (ratio**count - 1) / (ratio - 1), period * ratio**count
    return DECAYS["cosine"](math.fmod(at.after - begun, period) / period)


def _inverse_sqrt(at: Point, cfg: ScheduleConfig) -> float:
    """Vaswani et al. 2017: with the root of the number of updates, from the end of the warm-up on."""
    warm = max(at.warm, 1.0)
    return math.sqrt(warm / (warm + at.after))


# Where an update lies -> share of (lr - min_lr) that is left.
SCHEDULES: dict[str, Shape] = {
    "cosine": lambda at, _: DECAYS["cosine"](at.progress),
    "one_cycle": lambda at, _: DECAYS["cosine"](at.progress),
    "linear": lambda at, _: 1.0 - at.progress,
    "constant": lambda at, _: 1.0,
    "exponential": lambda at, _: math.exp(-math.log(2.0) * at.progress),
    "wsd": _wsd,
    "cosine_restarts": _restarts,
    "inverse_sqrt": _inverse_sqrt,
    # Smith 2017: up by equal factors, to see where the loss falls fastest and where it breaks.
    "range_test": lambda at, cfg: at.progress,
}

# progress 0..1 of the warm-up -> share of the way to the peak.
RISES: dict[str, Callable[[float, float], float]] = {
    "linear": lambda p, warm: p,
    "cosine": lambda p, warm: 0.5 * (1.0 - math.cos(math.pi * p)),
    "log": lambda p, warm: math.log(p * (warm + 1) + 1) / math.log(warm + 2),
}


def learning_rate(done: int, lr: float, cfg: ScheduleConfig, steps: int) -> float:
    """The learning rate of the update after `done` updates.

    Args:
        done: updates applied so far (0 for the first).
        lr: the peak.
        cfg: shape, warm-up and end.
        steps: the run's length, where `cfg.decay_steps` is not given.
    """
    horizon = max(cfg.decay_steps or steps, 1)
    warm = float(cfg.warmup_steps) if cfg.warmup_steps is not None else cfg.warmup * horizon
    if cfg.arithmetic == "native":
        return _native(done, lr, cfg, horizon, warm)
    if cfg.arithmetic == "deepspeed":
        return _deepspeed(done, lr, cfg, horizon, warm)
    return (_gptneox_main if cfg.arithmetic == "gptneox_main" else _gptneox_v2)(done, lr, cfg, horizon, warm)


def _native(done: int, lr: float, cfg: ScheduleConfig, horizon: int, warm: float) -> float:
    if done < warm:
        shape = "cosine" if cfg.type == "one_cycle" else cfg.warmup_shape
        return cfg.warmup_from + (lr - cfg.warmup_from) * RISES[shape]((done + 1) / (warm + 1), warm)
    left = SCHEDULES[cfg.type](Point(done - warm, max(horizon - warm, 1.0), warm), cfg)
    if cfg.type == "range_test":
        return float(cfg.min_lr * (lr / cfg.min_lr) ** left)
    floor = 0.0 if cfg.type in ("constant", "exponential", "inverse_sqrt") else cfg.min_lr
    return max(cfg.min_lr, floor + (lr - floor) * left)


def _deepspeed(done: int, lr: float, cfg: ScheduleConfig, horizon: int, warm: float) -> float:
    """DeepSpeed's schedulers; of its warm-ups the first two updates share a rate, since steps count from minus one.

    constant WarmupLR, linear WarmupDecayLR, cosine WarmupCosineLR, one_cycle OneCycle, range_test LRRangeTest.
    """
    low, floor = cfg.warmup_from, cfg.min_lr
    if cfg.type == "range_test":  # goes on beyond lr
        return floor + (lr - floor) * done / horizon
    if cfg.type == "one_cycle":
        if done < warm:
            return low + (lr - low) * done / warm
        return floor + (lr - floor) * max(0.0, (horizon - done) / max(1.0, horizon - warm))
    at, warm = max(done - 1, 0), max(warm, 2.0)
    if cfg.type == "cosine" and done == 0:
        return 0.0
    if at < warm:
        return low + (lr - low) * (math.log(at + 1) / math.log(warm) if cfg.warmup_shape == "log" else at / warm)
    if cfg.type == "cosine":
        return floor + (lr - floor) * DECAYS["cosine"](min(1.0, (at - warm + 1) / max(1.0, horizon - warm)))
    share = 1.0 if cfg.type == "constant" else max(0.0, (horizon - at) / max(1.0, horizon - warm))
    return low + (lr - low) * share


def _gptneox_main(done: int, lr: float, cfg: ScheduleConfig, horizon: int, warm: float) -> float:
    """GPT-NeoX main (2026): progress is not clamped, so a cosine rises again beyond its horizon."""
    if warm > 0 and done <= warm:
        return lr * max(1, done) / warm
    u, end = done - warm, max(horizon - warm, 1.0)
    value = {
        "linear": lambda: lr * (end - u) / end,
        "cosine": lambda: cfg.min_lr + 0.5 * (lr - cfg.min_lr) * (1.0 + math.cos(math.pi * u / end)),
        "exponential": lambda: lr * math.exp(-0.693 * u / end),
        "constant": lambda: lr,
    }[cfg.type]()
    return max(value, cfg.min_lr)


def _gptneox_v2(done: int, lr: float, cfg: ScheduleConfig, horizon: int, warm: float) -> float:
    """GPT-NeoX v2.0: the first update has learning rate 0, and the decay stops `warm` steps early."""
    reached = min(done, horizon - warm)
    if warm > 0 and done <= warm:
        return lr * reached / warm
    u = reached - warm
    value = {
        "linear": lambda: lr * (horizon - u) / horizon,
        "cosine": lambda: 0.5 * lr * (1.0 + math.cos(math.pi * u / horizon)),
        "exponential": lambda: lr * math.exp(-0.693 * u / horizon),
        "constant": lambda: lr,
    }[cfg.type]()
    return max(value, cfg.min_lr)
