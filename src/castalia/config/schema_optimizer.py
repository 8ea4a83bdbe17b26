"""The sections `optimizer` and `schedule`: how gradients change weights, and at what rate."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import model_validator

from castalia.config.section import Section, setting


class ParameterGroup(Section):
    """Parameters with a rate or decay of their own."""

    match: str = setting(..., "regular expression, searched for in the parameter's name")
    lr: float = setting(1.0, "times the learning rate", ge=0)
    weight_decay: float | None = setting(None, "in place of the configured or of no decay; null: that", ge=0)

    @model_validator(mode="after")
    def _compiles(self) -> ParameterGroup:
        try:
            re.compile(self.match)
        except re.error as error:
            raise ValueError(f"optimizer.groups: '{self.match}' is no regular expression ({error})") from None
        return self


# Settings of the optimizer section that only some types have a use for.
_OF_TYPES = {
    "betas": {"adamw", "adam", "lion", "schedule_free", "adamw_8bit", "muon", "soap", "sm3", "onebit_adam"},
    "eps": {
        *("adamw", "adam", "madgrad", "madgrad_wd", "schedule_free", "adamw_8bit", "muon", "soap", "sm3"),
        "onebit_adam",
    },
    "momentum": {"sgd", "madgrad", "madgrad_wd", "sm3", "muon"},
    "nesterov": {"sgd", "muon"},
    "precondition_every": {"soap"},
    "freeze_step": {"onebit_adam"},
}
_TYPES = set().union(*_OF_TYPES.values(), {"adafactor"})


class OptimizerConfig(Section):
    """How gradients change weights."""

    type: str = setting("adamw", "adamw, or another of docs/optimizers.md, or module:attribute")
    lr: float = setting(1e-3, "peak learning rate", gt=0)
    betas: list[float] = setting([0.9, 0.95], "decay rates of the two moments", min_length=2, max_length=2)
    eps: float = setting(1e-8, "added to the root of the second moment", gt=0)
    weight_decay: float = setting(0.1, "decoupled decay of matrices; norms and biases have none", ge=0)
    momentum: float = setting(0.9, "sgd, madgrad, sm3, muon: decay rate of the momentum", ge=0, lt=1)
    nesterov: bool = setting(False, "sgd, muon: look one step of momentum ahead")
    precondition_every: int = setting(10, "soap: updates between two bases", unit="updates", ge=1)
    freeze_step: int = setting(
        400, "onebit_adam: after so many of Adam, updates keep its variance and exchange signs", unit="updates", ge=1
    )
    clip_grad: float = setting(1.0, "largest global gradient norm; 0: no clipping", ge=0)
    average: float | None = setting(
        None, "decay of a running mean of the weights, kept beside them and used to evaluate; null: none", gt=0, lt=1
    )
    groups: list[ParameterGroup] = setting([], "rates and decays of parameters by name; the last that matches counts")

    @model_validator(mode="after")
    def _rates(self) -> OptimizerConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas {self.betas} must be from 0 on and below 1")
        for key, types in _OF_TYPES.items():
            if not self.uses(key) and getattr(self, key) != type(self).model_fields[key].default:
                takers = ", ".join(sorted(types))
                raise ValueError(f"optimizer.{key}: '{self.type}' has no use for it (of use to {takers})")
        if self.nesterov and not self.momentum:
            raise ValueError("optimizer.nesterov looks a step of momentum ahead: give optimizer.momentum above 0")
        if self.type == "onebit_adam" and self.betas[0] ** 2 >= self.betas[1]:
            raise ValueError(
                f"optimizer.betas {self.betas}: onebit_adam needs betas[0] squared below betas[1], which bounds "
                "Adam's updates"
            )
        if self.average is not None and self.type == "schedule_free":
            raise ValueError("optimizer.average: schedule_free keeps its own average: remove the setting")
        return self

    def uses(self, key: str) -> bool:
        """Whether the type of optimizer has a use for a setting; one of the user's own may have for any."""
        return key not in _OF_TYPES or self.type in _OF_TYPES[key] or self.type not in _TYPES


class ScheduleConfig(Section):
    """The learning rate as a function of the step."""

    type: Literal[
        "cosine",
        "linear",
        "constant",
        "wsd",
        "exponential",
        "inverse_sqrt",
        "cosine_restarts",
        "one_cycle",
        "range_test",
    ] = setting("cosine", "shape after the warm-up (docs/optimizers.md)")
    warmup: float = setting(0.01, "length of the warm-up as a share of decay_steps", ge=0, le=1)
    warmup_steps: int | None = setting(None, "length of the warm-up in steps, instead of warmup", unit="steps", ge=0)
    decay_steps: int | None = setting(
        None, "steps at which min_lr is reached; null: training.steps", unit="steps", ge=1
    )
    warmup_shape: Literal["linear", "cosine", "log"] = setting("linear", "how the warm-up rises; one_cycle: a cosine")
    warmup_from: float = setting(0.0, "the learning rate from which the warm-up rises", ge=0)
    decay_share: float = setting(0.2, "wsd only: share of decay_steps spent on the final decay", gt=0, le=1)
    decay_shape: Literal["linear", "cosine", "sqrt", "exponential"] = setting("linear", "wsd only: the final decay")
    restart_steps: int | None = setting(
        None, "cosine_restarts only: length of the first period; null: the whole decay", unit="steps", ge=1
    )
    restart_factor: float = setting(1.0, "cosine_restarts only: each period is so much longer than the last", ge=1)
    min_lr: float = setting(0.0, "the learning rate at the end", ge=0)
    arithmetic: Literal["native", "gptneox_main", "gptneox_v2.0", "deepspeed"] = setting(
        "native", "whose formula: translated GPT-NeoX files keep theirs, so that their curves come out the same"
    )

    @model_validator(mode="after")
    def _of_use(self) -> ScheduleConfig:
        own = {"decay_share": "wsd", "decay_shape": "wsd", "restart_steps": "cosine_restarts"}
        for key, kind in (own | {"restart_factor": "cosine_restarts"}).items():
            if self.type != kind and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"schedule.{key} is of use to schedule.type {kind} alone, not to {self.type}")
        if self.type == "range_test" and self.min_lr <= 0:
            raise ValueError("schedule.min_lr must be above 0 with schedule.type range_test, which rises from there")
        if self.arithmetic != "native":
            more = ("one_cycle", "range_test") if self.arithmetic == "deepspeed" else ("exponential",)
            known = ("constant", "linear", "cosine", *more)
            if self.type not in known:
                raise ValueError(
                    f"schedule.type {self.type} is unknown to schedule.arithmetic {self.arithmetic}: use native"
                )
            if self.arithmetic != "deepspeed" and (self.warmup_from or self.warmup_shape != "linear"):
                raise ValueError(f"schedule.warmup_from and warmup_shape are not for arithmetic {self.arithmetic}")
            if self.arithmetic == "deepspeed" and self.warmup_shape == "cosine":
                raise ValueError("schedule.warmup_shape is linear or log with schedule.arithmetic deepspeed")
            if self.arithmetic == "deepspeed" and self.min_lr and self.type in ("constant", "linear"):
                raise ValueError(
                    f"schedule.min_lr has no place in schedule.type {self.type} of arithmetic deepspeed: leave it out"
                )
        if self.type == "one_cycle" and self.warmup_shape != "linear":
            raise ValueError("schedule.warmup_shape is not for one_cycle, whose warm-up is a cosine")
        return self
