"""Two configurations -> what differs, and what each difference means to a run that goes on.

Compare *derived* configurations. A difference is of one of these kinds:

    numerics      the function computed changes: a resumed run refuses it
    length        only where the run ends
    place         only where files lie; what is in them is compared by fingerprint
    journal       holds from the step on at which the run goes on, and is noted in its journal
    performance   only rounding or speed
    cosmetic      neither

The kind is the field's class, but for a few fields whose effect depends on others:

* training.steps. In a derived configuration the schedule runs over schedule.decay_steps, so
  more steps with the same decay_steps leave the curve so far as it was: `length`. Where
  decay_steps was not given it follows steps, differs too, and is `numerics`: so training is
  prolonged by giving schedule.decay_steps its old value. (GPT-NeoX's data order depends on
  the number of epochs, hence on steps. A caller that holds the data must compare epochs.)
* training.micro_batch_size matters where the loss is a mean of micro-batch means over tokens
  of which some are masked, and where experts are balanced over a micro-batch.
* model.vocab_multiple, training.tokens say how a value is derived; that value counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

from castalia.config.fields import class_of, fields, flat
from castalia.config.schema import Config

Kind = Literal["numerics", "length", "place", "journal", "performance", "cosmetic"]


@dataclass(frozen=True)
class Difference:
    """One key whose value differs."""

    key: str
    old: Any
    new: Any
    kind: Kind


def differences(old: Config, new: Config) -> list[Difference]:
    """What differs between two derived configurations, in the order of the schema."""
    before, after = flat(old), flat(new)
    classes: dict[str, Any] = {key: class_of(info) for key, info in fields()}
    out = []
    for key, value in after.items():
        if before[key] != value:
            kind = _KINDS[key](old, new) if key in _KINDS else classes[key]
            out.append(Difference(key, before[key], value, kind))
    return out


# What a user is told of each kind.
MEANINGS: dict[Kind, str] = {
    "numerics": "changes what is computed; a resumed run refuses it",
    "length": "changes only where the run ends",
    "place": "changes only where files lie; what is in them is compared",
    "journal": "changes what is computed from the step on at which the run goes on, as its journal notes",
    "performance": "changes only rounding or speed",
    "cosmetic": "changes neither what is computed nor its speed",
}


def accepted_lines(differences: Sequence[Difference]) -> list[str]:
    """What a resumed run says of the changed settings that it accepts: a line for each kind."""
    lines = []
    for kind in MEANINGS:
        changed = [f"{d.key}: {d.old} -> {d.new}" for d in differences if d.kind == kind != "numerics"]
        if changed:
            lines.append(f"changed since the checkpoint, {kind} ({MEANINGS[kind]}): {'; '.join(changed)}")
    return lines


def _steps(old: Config, new: Config) -> Kind:
    underived = old.schedule.decay_steps is None or new.schedule.decay_steps is None
    return "numerics" if underived else "length"


def _tokens(old: Config, new: Config) -> Kind:
    return "cosmetic" if old.training.steps == new.training.steps is not None else _steps(old, new)


def _micro_batch(old: Config, new: Config) -> Kind:
    uneven = new.loss.normalisation == "micro_batch_mean" and new.data.mask_loss_at_eod
    by_loss = new.loss.moe_balance > 0 and new.loss.moe_balance_scope == "micro_batch"
    balanced = new.model.moe_num_experts > 0 and (by_loss or new.model.moe_router == "sinkhorn")
    return "numerics" if uneven or balanced else "performance"


def _noise_window(old: Config, new: Config) -> Kind:
    return "cosmetic" if new.batch_controller.start is None else "numerics"


def _vocab_multiple(old: Config, new: Config) -> Kind:
    return "cosmetic" if old.model.vocab_size == new.model.vocab_size is not None else "numerics"


def _place(old: Config, new: Config) -> Kind:
    return "place" if (old.data.path is None) == (new.data.path is None) else "numerics"


def _places(name: str) -> Callable[[Config, Config], Kind]:
    """Lists of data sets have moved if their names, in order, are the same; weights belong to places."""

    def kind(old: Config, new: Config) -> Kind:
        names = [[PurePath(p).name for p in getattr(c.data, name) or ()] for c in (old, new)]
        return "place" if names[0] == names[1] else "numerics"

    return kind


_KINDS: dict[str, Callable[[Config, Config], Kind]] = {
    "training.steps": _steps,
    "training.tokens": _tokens,
    "training.micro_batch_size": _micro_batch,
    "logging.noise_scale_window": _noise_window,
    "model.vocab_multiple": _vocab_multiple,
    "data.path": _place,
    "data.train_paths": _places("train_paths"),
    "data.valid_paths": _places("valid_paths"),
    "data.test_paths": _places("test_paths"),
    "data.label_path": _place,
    "data.train_label_paths": _places("train_label_paths"),
    "data.valid_label_paths": _places("valid_label_paths"),
    "data.test_label_paths": _places("test_label_paths"),
    "data.exclude": lambda old, new: "journal",
    "tokenizer.path": lambda old, new: "place",
}

# What `explain` says of these keys instead of what their class says.
RESUME_RULES = {
    "training.steps": "numerics, but a resumed run may change it while schedule.decay_steps stays as it was",
    "training.micro_batch_size": "performance, but numerics where loss.normalisation is micro_batch_mean "
    "and data.mask_loss_at_eod is true, or where experts are balanced over a micro-batch",
    "logging.noise_scale_window": "cosmetic, but numerics with batch_controller.start, which decides by it",
    "model.vocab_multiple": "numerics through model.vocab_size only",
    "data.path": "where the data lies; a resumed run compares what is in it",
    "data.exclude": "numerics, but a resumed run may change it: the list holds from there on, as the journal notes",
    "tokenizer.path": "where the tokenizer lies; a resumed run compares what is in it",
}
