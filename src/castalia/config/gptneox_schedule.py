"""GPT-NeoX's keys of the learning rate, or DeepSpeed's `scheduler` -> the schedule section, and the peak.

    lr_decay_style, warmup, min_lr, ...             ──> schedule.*, in GPT-NeoX's arithmetic
    scheduler: {type, params}, or one of OneBitAdam ──> schedule.*, in DeepSpeed's, and the former have no effect

DeepSpeed takes the scheduler of its configuration before the one that GPT-NeoX hands it. For OneBitAdam GPT-NeoX
writes WarmupDecayLR there, whatever a file says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from castalia.config.gptneox_given import Given, Rule, near
from castalia.config.gptneox_optimizer import optimizer_lr, optimizer_type

_REQUIRED = object()
_WARMUP = {"warmup_num_steps": 1000, "warmup_type": "log"}
_RATES = {"warmup_min_lr": 0.0, "warmup_max_lr": 0.001}
_TOTAL = {"total_num_steps": _REQUIRED}
_STAIRS = {"cycle_first_stair_count": None, "cycle_second_stair_count": None}  # which DeepSpeed does not use
KINDS: dict[str, dict[str, Any]] = {
    "WarmupLR": {**_RATES, **_WARMUP},
    "WarmupDecayLR": {**_RATES, **_WARMUP, **_TOTAL},
    "WarmupCosineLR": {"warmup_min_ratio": 0.0, "cos_min_ratio": 0.0001, **_WARMUP, **_TOTAL},
    "OneCycle": {
        "cycle_min_lr": _REQUIRED,
        "cycle_max_lr": _REQUIRED,
        "cycle_first_step_size": 2000,
        "cycle_second_step_size": None,
        "decay_step_size": 0,
        "decay_lr_rate": 0.0,
        "cycle_momentum": True,
        **dict.fromkeys(("cycle_min_mom", "cycle_max_mom", "decay_mom_rate")),
        **_STAIRS,
    },
    "LRRangeTest": {
        "lr_range_test_min_lr": 1e-3,
        "lr_range_test_step_size": 2000,
        "lr_range_test_step_rate": 1.0,
        "lr_range_test_staircase": False,
    },
}
"""DeepSpeed's schedulers, their parameters and defaults."""


def one_bit(given: Given) -> bool:
    """Whether GPT-NeoX writes the scheduler itself."""
    return optimizer_type(given) == "onebit_adam"


def by_deepspeed(given: Given) -> bool:
    """Whether a scheduler of DeepSpeed's sets the rate."""
    return one_bit(given) or bool(given["scheduler"])


def _params(given: Given) -> tuple[str, dict[str, Any]]:
    """Type and parameters of a scheduler, checked, with defaults."""
    block = given["scheduler"]
    kind, params = block.get("type"), block.get("params") or {}
    if kind not in KINDS or not isinstance(params, dict) or set(block) - {"type", "params"}:
        given.fail("scheduler", f"needs a 'type' (one of {', '.join(KINDS)}) and 'params' (a mapping)")
    known = KINDS[kind]
    for key, value in params.items():
        if key not in known and key != "last_batch_iteration":
            given.fail("scheduler", f"has the unknown parameter '{key}' for {kind}{near(key, known)}")
        words = {"warmup_type": str, "cycle_momentum": bool, "lr_range_test_staircase": bool}
        if value is not None and not isinstance(value, words.get(key, int | float)):
            given.fail("scheduler", f"has {key} {str(value)[:40]!r}: give one number, true or false, log or linear")
    found = {key: default if params.get(key) is None else params[key] for key, default in known.items()}
    missing = [key for key, value in found.items() if value is _REQUIRED]
    if missing:
        given.fail("scheduler", f"of type {kind} needs {missing[0]} in its params")
    if found.get("warmup_type", "log") not in ("log", "linear"):
        given.fail("scheduler", f"has warmup_type {found['warmup_type']}: give log or linear")
    if kind == "WarmupLR" and given.compat == "main" and params.get("warmup_max_lr") is None:
        found["warmup_max_lr"] = optimizer_lr(given)
    return kind, found


def _warmup(given: Given, p: dict[str, Any], total: int | None) -> dict[str, Any]:
    """WarmupLR, and with a total WarmupDecayLR."""
    return {
        "optimizer.lr": p["warmup_max_lr"],
        "schedule.type": "constant" if total is None else "linear",
        "schedule.decay_steps": total,
        "schedule.warmup_from": p["warmup_min_lr"],
    }


def _cosine(given: Given, p: dict[str, Any], total: int | None) -> dict[str, Any]:
    peak = optimizer_lr(given)
    return {
        "schedule.type": "cosine",
        "schedule.decay_steps": total,
        "schedule.warmup_from": peak * p["warmup_min_ratio"],
        "schedule.min_lr": peak * p["cos_min_ratio"],
    }


def _one_cycle(given: Given, p: dict[str, Any], total: int | None) -> dict[str, Any]:
    if p["cycle_momentum"]:
        given.unsupported("scheduler", "a momentum that moves against the rate", "add cycle_momentum: false")
    if p["decay_step_size"] and p["decay_lr_rate"]:
        given.unsupported("scheduler", "a further decay after the cycle", "set decay_lr_rate to 0")
    first, second = p["cycle_first_step_size"], p["cycle_second_step_size"]
    return {
        "optimizer.lr": p["cycle_max_lr"],
        "schedule.type": "one_cycle",
        "schedule.warmup_steps": first,
        "schedule.decay_steps": first + (first if second is None else second),
        "schedule.warmup_from": p["cycle_min_lr"],
        "schedule.min_lr": p["cycle_min_lr"],
    }


def _range_test(given: Given, p: dict[str, Any], total: int | None) -> dict[str, Any]:
    """A line, which is at 1 + rate times the first one after so many steps, and goes on."""
    if p["lr_range_test_staircase"]:
        given.unsupported("scheduler", "a rate that rises in stairs", "set lr_range_test_staircase to false")
    least = p["lr_range_test_min_lr"]
    return {
        "optimizer.lr": least * (1 + p["lr_range_test_step_rate"]),
        "schedule.type": "range_test",
        "schedule.warmup_steps": 0,
        "schedule.decay_steps": p["lr_range_test_step_size"],
        "schedule.min_lr": least,
    }


_READERS = {
    **dict.fromkeys(("WarmupLR", "WarmupDecayLR"), _warmup),
    "WarmupCosineLR": _cosine,
    "OneCycle": _one_cycle,
    "LRRangeTest": _range_test,
}


def theirs(given: Given) -> dict[str, Any]:
    """Values of ours by their dotted key, of the `scheduler` of a file; empty where it does not count."""
    if not given["scheduler"]:
        return {}
    if one_bit(given):
        given.remark("scheduler: GPT-NeoX puts a WarmupDecayLR in its place for OneBitAdam, as is done here")
        return {}
    given.remark("scheduler: DeepSpeed takes it in place of GPT-NeoX's schedule (lr_decay_style, warmup, min_lr, ...)")
    kind, params = _params(given)
    found = _READERS[kind](given, params, params.get("total_num_steps"))
    if "warmup_num_steps" in params:
        found |= {
            "schedule.warmup_steps": params["warmup_num_steps"],
            "schedule.warmup_shape": params["warmup_type"],
        }
    return found


def decay_steps(given: Given) -> int | None:
    """The horizon of GPT-NeoX's schedule; lr_decay_iters counts before lr_decay_fraction, as in the code."""
    if "lr_decay_iters" in given:
        return given.positive("lr_decay_iters")
    if "lr_decay_fraction" in given and not one_bit(given):
        return max(1, int(given.required("train_iters") * given["lr_decay_fraction"]))
    return None


def _arithmetic(given: Given) -> str:
    return "deepspeed" if by_deepspeed(given) else f"gptneox_{given.compat}"


def _own(value: Callable[[Given], Any]) -> Callable[[Given], Any]:
    """Where GPT-NeoX's schedule counts."""
    return lambda given: None if by_deepspeed(given) else value(given)


def _of_one_bit(value: Callable[[Given], Any]) -> Callable[[Given], Any]:
    """Where the schedule is that of OneBitAdam."""
    return lambda given: value(given) if one_bit(given) else None


def _scheduled(key: str) -> Rule:
    return Rule(key, ("scheduler",), lambda given: theirs(given).get(key))


_STYLES = {name: name for name in ("constant", "linear", "cosine", "exponential")}
SCHEDULE_RULES: tuple[Rule, ...] = (
    Rule("schedule.type", ("lr_decay_style",), _own(lambda g: g.choose("lr_decay_style", _STYLES))),
    Rule("schedule.warmup", ("warmup",), _own(lambda g: g["warmup"])),
    Rule("schedule.min_lr", ("min_lr",), _own(lambda g: g["min_lr"])),
    Rule(
        "schedule.decay_steps",
        ("lr_decay_iters", "lr_decay_fraction"),
        lambda g: decay_steps(g) if one_bit(g) or not by_deepspeed(g) else None,
    ),
    Rule("schedule.type", ("optimizer",), _of_one_bit(lambda g: "linear")),
    Rule("schedule.warmup_shape", ("optimizer",), _of_one_bit(lambda g: "log")),
    Rule("schedule.warmup_steps", ("warmup",), _of_one_bit(lambda g: int(g.required("train_iters") * g["warmup"]))),
    *(
        _scheduled(key)
        for key in (
            "optimizer.lr",
            *(f"schedule.{field}" for field in ("type", "warmup_steps", "warmup_shape", "warmup_from", "decay_steps")),
            "schedule.min_lr",
        )
    ),
    Rule("schedule.arithmetic", (), _arithmetic),
)
