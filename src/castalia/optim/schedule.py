"""The learning rate as a pure function of the number of updates done.

Native arithmetic starts above zero, anneals to `min_lr` exactly at the end of the decay, and
stays there. Translated GPT-NeoX files keep GPT-NeoX's own formulas (`arithmetic`), so that
their curves come out the same, oddities included.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from castalia.config import ScheduleConfig

Shape = Callable[[float, ScheduleConfig], float]


def _wsd(progress: float, cfg: ScheduleConfig) -> float:
    """Warm-up, stable, decay (Hu et al. 2024): one until the last `decay_share`, then linear to zero."""
    return min(1.0, (1.0 - progress) / cfg.decay_share)


# progress in 0..1 after the warm-up -> share of (lr - min_lr) that is left.
SCHEDULES: dict[str, Shape] = {
    "cosine": lambda p, _: 0.5 * (1.0 + math.cos(math.pi * p)),
    "linear": lambda p, _: 1.0 - p,
    "constant": lambda p, _: 1.0,
    "exponential": lambda p, _: math.exp(-math.log(2.0) * p),
    "wsd": _wsd,
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
    return (_gptneox_main if cfg.arithmetic == "gptneox_main" else _gptneox_v2)(done, lr, cfg, horizon, warm)


def _native(done: int, lr: float, cfg: ScheduleConfig, horizon: int, warm: float) -> float:
    if done < warm:
        return lr * (done + 1) / (warm + 1)
    progress = min(1.0, (done - warm) / max(horizon - warm, 1.0))
    floor = 0.0 if cfg.type in ("constant", "exponential") else cfg.min_lr
    return max(cfg.min_lr, floor + (lr - floor) * SCHEDULES[cfg.type](progress, cfg))


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
