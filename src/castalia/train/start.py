"""Another run's checkpoint, ours or GPT-NeoX's -> where a new run begins (`start:`).

    start.path ─what is there?─┬─ step-N/, a run, its checkpoints/    ─> our checkpoint
                               └─ *.pt, global_stepN/, a save folder  ─> GPT-NeoX's, translated

With start.optimizer the moments and the counters come along: step, position in the data and
learning rate go on as if the run had been one. Without it the weights alone are taken, and
the run begins at step 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from castalia.checkpoint import (
    Checkpoint,
    find_checkpoint,
    load_checkpoint,
    load_weights,
    read_state,
    tensor_shapes,
    verify_checkpoint,
)
from castalia.checkpoint.layout import MANIFEST, step_of
from castalia.config import StartConfig
from castalia.config.curriculum import trained_tokens
from castalia.data.plan import journal_from_json
from castalia.errors import UserError
from castalia.train.resume import changes, check_version, go_on, rank_states, rebatch

if TYPE_CHECKING:
    from castalia.train.run import Run

# Weights that a source need not have: they are what this run adds to it.
_PROMPT = "model.soft_prompt.weight"
_ADDED = frozenset({_PROMPT})
_WEIGHTS_ALONE = "set start.optimizer=false to take the weights alone"


@dataclass(frozen=True)
class Begun:
    """What a run began from.

    Attributes:
        text: for the records.
        remarks: what a reader of the console should know.
        prompt: whether a soft prompt was among what was read.
    """

    text: str
    remarks: tuple[str, ...] = ()
    prompt: bool = False


def check_start(cfg: StartConfig) -> None:
    """Refuse a `start.path` where there is nothing to begin from; cheap, and nothing is loaded."""
    if cfg.path is not None:
        kind_of(Path(cfg.path))


def begin(run: Run) -> Begun | None:
    """Load what `start` names into a run without a checkpoint of its own; None where it names nothing.

    Raises:
        UserError: nothing usable is there, or it does not fit the run.
    """
    cfg = run.config.start
    if cfg.path is None:
        return None
    path = Path(cfg.path)
    kind = kind_of(path)
    prompt = False
    if kind == "gptneox":
        step, text, remarks = _from_gptneox(run, path, cfg)
    else:
        found = _our_checkpoint(path, cfg)
        prompt = _PROMPT in tensor_shapes(found.path)
        step, text, remarks = _from_castalia(run, found, cfg)
    if cfg.optimizer and step >= run.steps > 0:
        raise UserError(
            f"start.path: {text} is at step {step}, which leaves nothing of training.steps {run.steps}: "
            "raise training.steps, or set start.optimizer=false to begin at step 0"
        )
    what = "weights, optimizer and position" if cfg.optimizer else "weights alone"
    return Begun(f"{what} of step {step} from {text}", remarks, prompt)


def kind_of(path: Path) -> str:
    """`castalia` or `gptneox`, by what is there.

    Raises:
        UserError: neither.
    """
    if path.is_file() and path.suffix == ".pt":
        return "gptneox"
    if path.is_dir():
        if (path / MANIFEST).is_file() or (path / "checkpoints").is_dir():
            return "castalia"
        names = [child.name for child in path.iterdir()]
        if any(step_of(name) is not None for name in names):
            return "castalia"
        theirs = ("global_step", "mp_rank_", "layer_")
        if any(name.startswith(theirs) for name in names):
            return "gptneox"
    raise UserError(
        f"start.path: {path} is neither a Castalia run or checkpoint nor a GPT-NeoX one: give a run's folder, "
        "a GPT-NeoX save folder, one global_stepN folder in it, or one .pt file"
    )


def _our_checkpoint(path: Path, cfg: StartConfig) -> Checkpoint:
    if (path / MANIFEST).is_file():
        if cfg.step is not None:
            raise UserError(
                f"start.step: {path} is one checkpoint: leave start.step out, or name the run in start.path"
            )
        problems = verify_checkpoint(path)
        if problems:
            raise UserError(f"start.path: {problems[0]}: choose another checkpoint")
        return Checkpoint(path, read_state(path)["step"])
    found = find_checkpoint(path / "checkpoints" if (path / "checkpoints").is_dir() else path, cfg.step)
    if found is None:
        raise UserError(f"start.path: {path} has no checkpoint yet: let that run save one, or name another")
    return found


def _from_castalia(run: Run, found: Checkpoint, cfg: StartConfig) -> tuple[int, str, tuple[str, ...]]:
    state = found.state
    check_version(state, found.path)
    there, mine = tensor_shapes(found.path), run.store.tensors()
    if not cfg.optimizer:
        wanted = {n: t for n, t in mine.items() if n.startswith("model.") and (n in there or n not in _ADDED)}
        load_weights(found.path, wanted)
        go_on(run, 0, 0, 0)
        return found.step, str(found.path), ()
    mine, leave, said = rank_states(mine, found.path)
    moments = [{n for n in names if n.startswith("optimizer.") and n not in leave} for names in (there, mine)]
    if moments[0] != moments[1]:
        odd = min(moments[0] ^ moments[1])
        raise UserError(
            f"{found.path}: its optimizer's state is not that of this run's optimizer ({odd} is in one alone): "
            + _WEIGHTS_ALONE
        )
    load_checkpoint(found.path, mine, leave=leave)
    go_on(run, found.step, state["updates"], state["tokens"])
    run.journal = journal_from_json(state["journal"])
    if run.scaler is not None:
        run.scaler.restore(state.get("loss_scale"))
    rebatch(run, state, found.path)
    lines = [line for line in changes(run, state, found.path) if not line.startswith("start.")]
    other = [f"other settings than there: {'; '.join(lines)}"] if lines else []
    return found.step, str(found.path), (*said, *other)


def _from_gptneox(run: Run, path: Path, cfg: StartConfig) -> tuple[int, str, tuple[str, ...]]:
    from castalia.convert.gptneox import load_gptneox_checkpoint

    several = path.is_dir() and any(child.name.startswith("global_step") for child in path.iterdir())
    if cfg.step is not None and not several:
        raise UserError(f"start.step: {path} is one checkpoint: leave start.step out, or name its save folder")
    theirs = load_gptneox_checkpoint(path, run.config.model, cfg.step)
    mine = run.store.tensors()
    sources = {f"model.{name}": value for name, value in theirs.weights.items()}
    updates = 0
    if cfg.optimizer:
        if theirs.optimizer is None:
            raise UserError(
                f"{path}: step {theirs.iteration} holds no state of Adam that can be read (it is spread over ZeRO's "
                f"files, of another optimizer, or of a run that had not begun): {_WEIGHTS_ALONE}"
            )
        for name, state in theirs.optimizer.items():
            sources |= {f"optimizer.{name}.{key}": value for key, value in state.items() if key != "step"}
        # Skipped steps are no updates, so this may be less than the iteration.
        updates = int(max(state["step"] for state in theirs.optimizer.values()))
    wanted = {n: t for n, t in mine.items() if cfg.optimizer or n.startswith("model.")}
    _copy(sources, wanted, path)
    if cfg.optimizer:
        go_on(
            run,
            theirs.iteration,
            updates,
            trained_tokens(run.config, theirs.iteration),
        )
    else:
        go_on(run, 0, 0, 0)
    return theirs.iteration, f"GPT-NeoX's {path}", ()


@torch.no_grad()
def _copy(sources: dict[str, Tensor], wanted: dict[str, Tensor], path: Path) -> None:
    """Overwrite tensors in place, all of them or, where something does not fit, none."""
    names = {n for n in wanted if n in sources or n not in _ADDED}
    for text, odd in (("does not hold", names - sources.keys()), ("also holds", sources.keys() - names)):
        if odd:
            first = min(odd)
            if first.startswith("optimizer."):
                raise UserError(f"{path}: {text} {first}, so its optimizer is not this run's: {_WEIGHTS_ALONE}")
            raise UserError(f"{path}: {text} {first}: use the configuration that it was trained with")
    for name in sorted(names):
        there, here = list(sources[name].shape), list(wanted[name].shape)
        if there != here:
            rows = name.endswith(("embedding.weight", "head.weight")) and there[1:] == here[1:]
            mend = f"set model.vocab_size={there[0]}" if rows else "use the configuration that it was trained with"
            raise UserError(f"{path}: {name} is {there} there and {here} here: {mend}")
    for name in names:
        wanted[name].copy_(sources[name])
