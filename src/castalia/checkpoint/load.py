"""Find the newest whole checkpoint, and read it into tensors that exist already.

Loading is in place: the tensors given (a module's parameters, an optimizer's moments, views
into a flat buffer, DTensors of any layout) are overwritten, and nothing else is allocated than
one tensor at a time. So a checkpoint can be read in another layout than it was written in.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from castalia.checkpoint.layout import LATEST, REPLACED, STATE, problems_of, step_name, step_of
from castalia.checkpoint.stream import CautiousReader
from castalia.checkpoint.tensors import PieceLoadPlanner, flatten
from castalia.errors import UserError

_NAMED_AT_MOST = 3


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint.

    Attributes:
        path, step: where it is and which.
        skipped: newer ones that were passed over, each with the reason.
    """

    path: Path
    step: int
    skipped: tuple[str, ...] = ()

    @cached_property
    def state(self) -> dict[str, Any]:
        """What is not a tensor."""
        return read_state(self.path)


def find_checkpoint(directory: Path, step: int | None = None, verify: bool = True) -> Checkpoint | None:
    """The checkpoint to go on from: the newest whole one.

    `latest` names it too, but for a kill between the renaming of a checkpoint and the writing of
    `latest`; so it only serves to notice a checkpoint that has gone.

    Args:
        directory: of all checkpoints of a run.
        step: take that of this step and no other.
        verify: read every byte and compare it with the manifest (about a second for 1.4 GB);
            otherwise only sizes are compared.

    Returns:
        None if there is no checkpoint at all.

    Raises:
        UserError: that of `step` is missing or damaged, or there are checkpoints but none is whole
            (starting anew would then silently forget them).
    """
    directory = Path(directory)
    candidates = _candidates(directory)
    if step is not None:
        if step not in candidates:
            there = ", ".join(map(str, sorted(candidates))) or "none"
            raise UserError(f"{directory}: there is no checkpoint of step {step}: choose one of those there ({there})")
        problems = problems_of(candidates[step], verify)
        if problems:
            raise UserError(f"{_few(problems)}: choose the checkpoint of another step")
        return Checkpoint(candidates[step], step)
    skipped: list[str] = []
    order = sorted(candidates, reverse=True)
    named = _latest(directory)
    if named is not None and named not in candidates:
        skipped.append(f"{directory / step_name(named)}: is missing, though {directory / LATEST} names it")
    for candidate in order:
        path = candidates[candidate]
        problems = problems_of(path, verify)
        if not problems:
            return Checkpoint(path, candidate, tuple(skipped))
        skipped.append(_few(problems))
    if not skipped:
        return None
    raise UserError(
        f"{directory}: no checkpoint is whole ({_few(skipped)}): restore one, or remove the folder to start anew"
    )


def load_checkpoint(
    path: Path,
    tensors: Mapping[str, Any],
    *,
    only: str = "",
    leave: Container[str] = (),
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Read a checkpoint's tensors in place. It is not verified again: that is find_checkpoint's work.

    Args:
        path: the checkpoint's directory.
        tensors: to be overwritten, by canonical name, or nested dicts of them. Another floating
            dtype is converted.
        only: of the checkpoint's tensors, just those whose name begins so are wanted (`model.`:
            not the optimizer's).
        leave: names of tensors of the checkpoint that are not wanted either.
        process_group: the ranks that load together; None is the default group, if there is one.

    Raises:
        UserError: names or shapes are not those of the checkpoint (nothing has been overwritten then), or it
            cannot be read.
    """
    flat = flatten(tensors)
    shapes = tensor_shapes(path)
    missing = [name for name in flat if name not in shapes]
    extra = [name for name in shapes if name.startswith(only) and name not in flat and name not in leave]
    other = [
        f"{name} {list(shapes[name])} there, {list(tensor.shape)} here"
        for name, tensor in flat.items()
        if name in shapes and tuple(tensor.shape) != shapes[name]
    ]
    for text, names in (
        ("does not hold", missing),
        ("holds what the model does not have:", extra),
        ("has other shapes:", other),
    ):
        if names:
            raise UserError(f"{path}: {text} {_few(names, ', ')}: use the configuration that it was trained with")
    alone = not (dist.is_available() and dist.is_initialized())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is")  # one process: just what is meant
            reader, planner = CautiousReader(path), PieceLoadPlanner()
            load(dict(flat), storage_reader=reader, planner=planner, process_group=process_group, no_dist=alone)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if not isinstance(cause, Exception):
            raise cause from None
        raise UserError(
            f"{path}: cannot be read ({_first_line(cause)}): choose the checkpoint of another step"
        ) from cause


def load_weights(path: Path, weights: Mapping[str, Any], *, only: str = "model.") -> None:
    """Read the weights to use: running means of them where the checkpoint keeps such, as validation takes them.

    Args:
        path: the checkpoint's directory.
        weights: to be overwritten, by canonical name (`model.<name>`).
        only: see load_checkpoint.

    Raises:
        UserError: see load_checkpoint.
    """
    load_checkpoint(path, weights, only=only)
    means = {f"optimizer.{name.removeprefix('model.')}.average": weight for name, weight in weights.items()}
    kept = tensor_shapes(path).keys() & means.keys()
    if kept and read_state(path)["updates"]:  # before the first update they are of nothing yet
        load_checkpoint(path, {name: means[name] for name in kept}, only="\0")  # no name begins so: these alone


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Global shape of each tensor in a checkpoint.

    Raises:
        UserError: the index cannot be read.
    """
    try:
        entries = CautiousReader(path).read_metadata().state_dict_metadata
    except (
        OSError,
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        AttributeError,
        TypeError,
        LookupError,
    ) as error:
        raise UserError(
            f"{Path(path) / '.metadata'}: cannot be read ({_first_line(error)}): choose the checkpoint of another step"
        ) from error
    return {name: tuple(entry.size) for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def read_state(path: Path) -> dict[str, Any]:
    """What a checkpoint keeps besides tensors.

    Raises:
        UserError: the file is missing or damaged.
    """
    file = Path(path) / STATE
    try:
        state = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: cannot be read ({_first_line(error)}): choose the checkpoint of another step"
        ) from error
    if not isinstance(state, dict):
        raise UserError(f"{file}: is damaged: choose the checkpoint of another step")
    return state


def _candidates(directory: Path) -> dict[int, Path]:
    """Whatever has a checkpoint's name, by step. One set aside counts where its successor did not arrive."""
    if not directory.is_dir():
        return {}
    found: dict[int, Path] = {}
    for path in sorted(directory.iterdir()):  # .replaced-* sorts before step-*, which then wins
        step = step_of(path.name.removeprefix(REPLACED))
        if step is not None and path.is_dir():
            found[step] = path
    return found


def _latest(directory: Path) -> int | None:
    try:
        return step_of((directory / LATEST).read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError):
        return None


def _few(items: Iterable[str], separator: str = "; ") -> str:
    listed = list(items)
    more = len(listed) - _NAMED_AT_MOST
    return separator.join(listed[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
