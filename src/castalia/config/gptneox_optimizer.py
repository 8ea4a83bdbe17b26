"""GPT-NeoX's `optimizer` block, `weight_decay` and `use_bnb_optimizer` -> the optimizer section.

    {"type": "Adam", "params": {"lr": ..., "betas": ...}}  ──>  optimizer.type, lr, betas, eps, ...

Each type has its own parameters and defaults. What GPT-NeoX calls Adam has decoupled decay, so it is AdamW.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from castalia.config.gptneox_given import Given, Rule, near


@dataclass(frozen=True)
class Kind:
    """One of GPT-NeoX's types.

    Attributes:
        ours: optimizer.type.
        defaults: its parameters that mean something here.
        harmless: parameters that may be given with this value alone, since it describes what is done anyway.
        idle: parameters that change nothing, whatever they say.
        decays: the top-level weight_decay reaches it.
        own_decay: a weight_decay among its parameters reaches it.
    """

    ours: str
    defaults: dict[str, Any]
    harmless: dict[str, Any] = field(default_factory=dict)
    idle: tuple[str, ...] = ()
    decays: bool = True
    own_decay: bool = True


_ADAM = Kind(
    "adamw",
    {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8},
    {"bias_correction": True, "adam_w_mode": True, "adamw_mode": True, "amsgrad": False},
)
KINDS: dict[str, Kind] = {
    **dict.fromkeys(("adam", "adamw", "cpu_adam", "cpu_torch_adam"), _ADAM),
    "sgd": Kind(
        "sgd",
        {"lr": 1e-3, "momentum": 0.0, "nesterov": False},
        {"dampening": 0, "maximize": False},
    ),
    "lion": Kind("lion", {"lr": 1e-4, "betas": [0.9, 0.99]}),
    "madgrad_wd": Kind("madgrad_wd", {"lr": 1e-2, "momentum": 0.9, "eps": 1e-6}, {"decouple_decay": True}),
    "sm3": Kind("sm3", {"lr": 0.1, "momentum": 0.0, "beta": 0.0, "eps": 1e-30}, decays=False, own_decay=False),
    "onebitadam": Kind(
        "onebit_adam",
        {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "freeze_step": 400},
        {"amsgrad": False, "eps_inside_sqrt": False, "max_grad_norm": 0.0},
        ("cuda_aware", "comm_backend_name", "bias_correction"),  # how bytes travel; DeepSpeed never corrects
        decays=False,
    ),
}


def _block(given: Given) -> tuple[Kind, dict[str, Any]]:
    """The kind, and its parameters; checked."""
    block = given["optimizer"]
    if block is None:
        given.remark("optimizer: not given; Adam with its defaults is taken, where GPT-NeoX stops")
        return _ADAM, {}
    kind, params = block.get("type"), block.get("params") or {}
    if not isinstance(kind, str) or not isinstance(params, dict):
        given.fail("optimizer", "needs a 'type' (a word) and 'params' (a mapping)")
    unknown = [key for key in block if key not in ("type", "params")]
    if unknown:
        given.fail("optimizer", f"has '{unknown[0]}', but it holds only 'type' and 'params'")
    if kind.lower() not in KINDS:
        given.unsupported("optimizer", f"the optimizer '{kind}'", f"use one of {', '.join(KINDS)}")
    found = KINDS[kind.lower()]
    for key, value in params.items():
        if key in found.harmless and value != found.harmless[key]:
            given.fail("optimizer", f"has {key} {value}, which is not implemented yet: remove it")
        if key not in (*found.defaults, *found.harmless, *found.idle, "weight_decay"):
            given.fail("optimizer", f"has the unknown parameter '{key}' for {kind}{near(key, found.defaults)}")
    return found, params


def optimizer_type(given: Given) -> str:
    """Our name of the type; bitsandbytes' Adam replaces any Adam alone."""
    kind, _ = _block(given)
    if not given["use_bnb_optimizer"]:
        return kind.ours
    if kind is not _ADAM:
        given.fail("use_bnb_optimizer", f"goes with Adam alone, not with {kind.ours}: remove it")
    return "adamw_8bit"


def _parameter(key: str) -> Callable[[Given], Any]:
    def value(given: Given) -> Any:
        kind, params = _block(given)
        found = params.get(key)
        return kind.defaults.get(key) if found is None else found

    return value


optimizer_lr = _parameter("lr")
"""The rate that the optimizer is given."""


def betas(given: Given) -> Any:
    """Both rates; SM3's single one is our second."""
    beta = _parameter("beta")(given)
    return _parameter("betas")(given) if beta is None else [0.0, beta]


def weight_decay(given: Given) -> Any:
    """The top-level key; GPT-NeoX crashes on one among the optimizer's parameters, here it counts."""
    kind, params = _block(given)
    inner = params.get("weight_decay")
    if inner is not None and "weight_decay" in given and given["weight_decay"] != inner:
        given.fail("weight_decay", f"is {given['weight_decay']}, but optimizer.params says {inner}: keep one")
    if not kind.decays and (inner is None or not kind.own_decay):
        if inner or given["weight_decay"]:
            given.remark(f"weight_decay: does not reach GPT-NeoX's {kind.ours}, so it is 0 here")
        return 0.0
    return given["weight_decay"] if inner is None else inner


_READS = ("optimizer",)
OPTIMIZER_RULES: tuple[Rule, ...] = (
    Rule("optimizer.type", ("optimizer", "use_bnb_optimizer"), optimizer_type),
    Rule("optimizer.lr", _READS, optimizer_lr),
    Rule("optimizer.betas", _READS, betas),
    Rule("optimizer.eps", _READS, _parameter("eps")),
    Rule("optimizer.momentum", _READS, _parameter("momentum")),
    Rule("optimizer.nesterov", _READS, _parameter("nesterov")),
    Rule("optimizer.freeze_step", _READS, _parameter("freeze_step")),
    Rule("optimizer.weight_decay", ("weight_decay", "optimizer"), weight_decay),
)
