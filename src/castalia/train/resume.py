"""A run's own newest checkpoint, or the one asked for -> the run as it was, unless going on would make its curve jump.

    checkpoints/  the newest whole one ─┐
    checkpoint.path     a newer one? ───┴─> compared with the configuration ─> loaded ─> logits compared, if kept

Refused, unless the user accepts it: a changed numerics setting, other data, another order of
the data, another tokenizer. Performance and cosmetic settings may change, and so may the
run's length where the schedule does not follow it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from castalia.checkpoint import Mirror, MirrorFailed, find_checkpoint, load_checkpoint, tensor_shapes
from castalia.checkpoint.layout import step_of
from castalia.config.compare import accepted_lines, differences
from castalia.config.load import check_values
from castalia.config.ramp import planned
from castalia.data.plan import Rebatch, Resize, journal_from_json
from castalia.errors import UserError
from castalia.optim.one_bit import ERRORS
from castalia.train.forward import check_logits

if TYPE_CHECKING:
    from castalia.train.run import Run

STATE_VERSION = 1


def resume(run: Run) -> bool:
    """Load the newest whole checkpoint of the run's folder, or that of `run.chosen`; False if there is none.

    Raises:
        UserError: there is one, but it may not be gone on from.
    """
    _fetch(run)
    found = find_checkpoint(run.checkpoints, run.chosen)
    if found is None:
        return False
    for problem in found.skipped:
        run.console.say(f"WARNING: passed over {problem}")
    state = found.state
    check_version(state, found.path)
    if state.get("slim"):
        raise UserError(
            f"{found.path}: holds weights alone, so no run goes on from it: begin a new one from it, with start.path "
            "and start.optimizer=false"
        )
    _refuse_changes(run, state, found.path)
    if state["step"] > run.steps:
        raise UserError(
            f"{found.path}: is at step {state['step']}, beyond training.steps {run.steps}: raise training.steps, "
            "go back to a step that is kept with --step, or give another name or output"
        )
    tensors, leave, said = rank_states(run.store.tensors(), found.path)
    load_checkpoint(found.path, tensors, leave=leave)
    for line in said:
        run.console.say(line)
    if run.accepted:
        run.console.say(f"going on with changed settings, as accepted: {run.accepted}")
    for line in accepted_lines(differences(check_values(state["config"], str(found.path)), run.config)):
        run.console.say(line)
    run.journal, run.seconds_before = journal_from_json(state["journal"]), state["seconds"]
    take_state(run, state)
    rebatch(run, state, found.path)
    if run.config.checkpoint.validate_forward:
        run.console.say(check_logits(run, found.path))
    if run.chosen is not None and run.first:
        set_aside(run, found.step)
    return True


def rank_states(tensors: dict[str, Any], path: Path) -> tuple[dict[str, Any], set[str], list[str]]:
    """What to read of a checkpoint, and what to leave: errors that ranks keep of compression fit as many ranks alone.

    Returns:
        the tensors to read; names to leave; what to say, where errors begin at zero.
    """
    there = {n: s for n, s in tensor_shapes(path).items() if n.endswith(ERRORS)}
    here = {n: tuple(t.shape) for n, t in tensors.items() if n.endswith(ERRORS)}
    if there == here:
        return tensors, set(), []
    line = "the errors of compression that onebit_adam keeps begin at zero: those saved are of another number of ranks"
    return {n: t for n, t in tensors.items() if n not in here}, set(there), [line]


def _fetch(run: Run) -> None:
    """Bring the checkpoint to go on from here, where checkpoint.path has a newer one; the other processes wait."""
    if run.config.checkpoint.path is None:
        return
    problem = None
    if run.saving.mirror is not None:
        try:
            _fetch_from(run.saving.mirror, run)
        except UserError as error:
            problem = str(error)
    problem = run.mesh.from_first(problem)
    if problem is not None:
        raise UserError(problem)


def _fetch_from(mirror: Mirror, run: Run) -> None:
    directory = run.checkpoints
    here, damaged = None, None
    try:
        here = find_checkpoint(directory, run.chosen)
    except UserError as error:
        damaged = error
    newest = -1 if here is None else here.step
    try:
        there = [step for step in reversed(mirror.steps()) if step > newest and run.chosen in (None, step)]
    except MirrorFailed as error:
        if here is None:
            raise UserError(
                f"{error}: it may hold the run's checkpoints, and {directory} holds none that is whole: make it "
                "reachable, or leave checkpoint.path out to begin without it"
            ) from None
        run.console.say(f"WARNING: {error}; going on with what is here")
        return
    if run.chosen is not None and here is not None:
        return
    for step in there:
        try:
            path = mirror.fetch(step, directory)
        except MirrorFailed as error:
            run.console.say(f"WARNING: passed over {error}")
            continue
        run.console.say(f"{path.name} was downloaded from {mirror.url}")
        return
    if there and here is None:
        raise UserError(f"{mirror.url}: none of its checkpoints could be used: restore one, or empty that folder")
    if damaged is not None:
        raise damaged


def set_aside(run: Run, step: int) -> None:
    """Going back to a step: later checkpoints are of another future, and no later start may take them for this one's.

    They are moved, with the records so far, into `checkpoints/set-aside-from-STEP`.
    """
    later = [path for path in run.checkpoints.iterdir() if (step_of(path.name) or -1) > step]
    if run.saving.mirror is not None:
        run.saving.mirror.set_aside(step)
    if not later:
        return
    number = 1
    while (aside := run.checkpoints / f"set-aside-from-{step}-{number}").exists():
        number += 1
    aside.mkdir()
    if (run.directory / "metrics.jsonl").exists():
        shutil.copyfile(run.directory / "metrics.jsonl", aside / "metrics.jsonl")
    for path in later:
        os.replace(path, aside / path.name)
    run.console.say(f"going back to step {step}: {len(later)} later checkpoints and the records are kept in {aside}")


def go_on(run: Run, step: int, updates: int, tokens: int) -> None:
    """Set the counters of a run whose tensors were read, and whatever follows from tensors or counters."""
    run.step, run.updates, run.tokens = step, updates, tokens
    run.store.refresh()
    run.store.set_updates(updates)


def take_state(run: Run, state: dict[str, Any]) -> None:
    """Set what a checkpoint keeps besides tensors, journal and time."""
    go_on(run, state["step"], state["updates"], state["tokens"])
    run.imported = state.get("import")
    run.noise.restore(state.get("noise"))
    run.guard.restore(state.get("guard"))
    if run.scaler is not None:
        run.scaler.restore(state.get("loss_scale"))


def rebatch(run: Run, state: dict[str, Any], path: Path) -> None:
    """Where batches had other sizes so far: note it, so that the data goes on where it was."""
    before, largest = planned(check_values(state["config"], str(path))), run.config.training.batch_size
    sizes = [entry for entry in run.journal if isinstance(entry, Rebatch | Resize)]
    decided = sizes[-1].size if sizes and isinstance(sizes[-1], Resize) else 0
    # What a controller has decided stays only with one, and within its bounds.
    stays = not decided or (run.config.batch_controller.start is not None and decided <= largest)
    if run.step == 0 or (stays and before == planned(run.config)):
        return
    run.journal = (*run.journal, Rebatch(run.step, before))
    run.console.say(f"batches have other sizes from step {run.step} on; their samples follow on those that were read")


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
