"""A parameter's shape and the optimizer's settings -> bytes of state between two updates.

The same arithmetic as `castalia.optim`'s states, without torch, so that a plan stays instant; a test holds it
against what each optimizer really keeps. The counters of updates, one number each, are left out.
"""

from __future__ import annotations

from math import prod

from castalia.config import OptimizerConfig

_PER_ELEMENT = {"adamw": 2, "adam": 2, "lion": 1, "madgrad": 3, "madgrad_wd": 3, "schedule_free": 3}
_BLOCK, _SMALL = 256, 4096  # of adamw_8bit: elements that share a scale, and from how many on they are packed


def state_bytes(cfg: OptimizerConfig, name: str, shape: tuple[int, ...]) -> int:
    """Bytes that the optimizer keeps for a parameter, a running mean of the weights included.

    An optimizer of the user's own is taken to keep two fp32 moments.
    """
    return _moments(cfg, name, shape) + (4 * prod(shape) if cfg.average is not None else 0)


def _moments(cfg: OptimizerConfig, name: str, shape: tuple[int, ...]) -> int:
    n, kind, is_matrix = prod(shape), cfg.type, len(shape) > 1
    inner = is_matrix and name.startswith("layers.")
    if kind == "sgd":
        return 4 * n if cfg.momentum else 0
    if kind == "adamw_8bit" and is_matrix and "embedding" not in name and n >= _SMALL:
        return 2 * -(-n // _BLOCK) * (_BLOCK + 4)
    if kind == "muon" and inner:
        return 4 * n
    if kind == "soap" and inner:
        return 4 * (2 * n + 2 * prod(shape[:-2]) * (shape[-2] ** 2 + shape[-1] ** 2))
    if kind == "adafactor":
        return 4 * (n // shape[-1] + n // shape[-2]) if is_matrix else 4 * n
    if kind == "sm3":
        return 4 * sum(shape) + (4 * n if cfg.momentum else 0)
    return 4 * n * _PER_ELEMENT.get(kind, 2)
