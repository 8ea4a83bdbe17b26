"""A run's own newest checkpoint -> the run as it was, unless going on would make its curve jump.

Refused, unless the user accepts it: a changed numerics setting, other data, another order of
the data, another tokenizer. Performance and cosmetic settings may change, and so may the
run's length where the schedule does not follow it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from castalia.checkpoint import find_checkpoint, load_checkpoint
from castalia.config.compare import accepted_lines, differences
from castalia.config.load import check_values
from castalia.data.plan import journal_from_json
from castalia.errors import UserError

if TYPE_CHECKING:
    from castalia.train.run import Run

STATE_VERSION = 1


def resume(run: Run) -> bool:
    """Load the newest whole checkpoint of the run's folder; False if there is none.

    Raises:
        UserError: there is one, but it may not be gone on from.
    """
    found = find_checkpoint(run.checkpoints)
    if found is None:
        return False
    for problem in found.skipped:
        run.console.say(f"WARNING: passed over {problem}")
    state = found.state
    check_version(state, found.path)
    _refuse_changes(run, state, found.path)
    if state["step"] > run.steps:
        raise UserError(
            f"{found.path}: is at step {state['step']}, beyond training.steps {run.steps}: "
            "raise training.steps, or give another name or output"
        )
    load_checkpoint(found.path, run.store.tensors())
    if run.accepted:
        run.console.say(f"going on with changed settings, as accepted: {run.accepted}")
    for line in accepted_lines(differences(check_values(state["config"], str(found.path)), run.config)):
        run.console.say(line)
    go_on(run, state["step"], state["updates"], state["tokens"])
    run.journal, run.seconds_before = journal_from_json(state["journal"]), state["seconds"]
    run.imported = state.get("import")
    return True


def go_on(run: Run, step: int, updates: int, tokens: int) -> None:
    """Set the counters of a run whose tensors were read, and whatever follows from tensors or counters."""
    run.step, run.updates, run.tokens = step, updates, tokens
    run.store.refresh()
    run.store.set_updates(updates)


def check_version(state: dict[str, Any], path: Path) -> None:
    """Refuse the state of another release's format."""
    if state["version"] != STATE_VERSION:
        raise UserError(f"{path}: written in state version {state['version']}; this release reads {STATE_VERSION}")


def changes(run: Run, state: dict[str, Any], path: Path) -> list[str]:
    """What differs between a checkpoint's state and the run, of all that changes what is computed."""
    old = check_values(state["config"], str(path))
    lines = [f"{d.key}: {d.old} -> {d.new}" for d in differences(old, run.config) if d.kind == "numerics"]
    # Only what is trained on decides; a validation set may come, go or change.
    if state["train_data"] != run.data.train_fingerprints:
        lines.append("the training data: its fingerprints differ")
    elif state["epochs"] != run.data.epochs:
        what = "epochs" if run.config.data.packing == "packed" else "samples"
        lines.append(
            f"the data order: laid out for {state['epochs']} {what}, now for {run.data.epochs}, which shuffles it anew"
        )
    if state["tokenizer"] != (run.tokenizer.identity() if run.tokenizer else None):
        lines.append("the tokenizer")
    return lines


def _refuse_changes(run: Run, state: dict[str, Any], path: Path) -> None:
    text = "; ".join(changes(run, state, path))
    if text and not run.accept:
        old = check_values(state["config"], str(path))
        longer = old.training.steps != run.config.training.steps and "schedule.decay_steps" in text
        hint = f"to train longer, also give schedule.decay_steps={old.schedule.decay_steps}; else " if longer else ""
        raise UserError(
            f"{path}: this run was started with other settings that change what is computed ({text}): "
            f"{hint}restore them, give another name, or go on knowingly with --accept"
        )
    run.accepted = text or None
