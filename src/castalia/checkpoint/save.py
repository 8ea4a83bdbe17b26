"""The state of a run -> a checkpoint directory that is either whole or not there.

    .writing-step-N/  tensors (hashed as they are written), state.json, manifest.json, all fsynced
          | os.replace
          v
    step-N/           then `latest` is replaced, then older ones are pruned

A kill at any moment leaves the checkpoint before it, and at most rubbish with a dot in front of
its name that the next save clears away. With a process group every rank calls this with its part
of the tensors (DTensors); rank 0 does what concerns the directory.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

from castalia.checkpoint.layout import (
    DELETING,
    LATEST,
    MANIFEST,
    REPLACED,
    STATE,
    WRITING,
    FileRecord,
    manifest_text,
    problems_of,
    step_name,
    step_of,
    surplus,
    sync_directory,
    write_durably,
)
from castalia.checkpoint.stream import HashingWriter
from castalia.checkpoint.tensors import PieceSavePlanner, flatten
from castalia.errors import UserError

T = TypeVar("T")

_REMEDIES = {
    errno.ENOSPC: "free some space there, or choose a folder on another disk",
    errno.EDQUOT: "free some of your quota there, or choose a folder on another disk",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or choose a folder on another disk",
    errno.EACCES: "make the folder writable",
    errno.EROFS: "choose a folder on a disk that can be written to",
}


class CheckpointNotSaved(UserError):
    """A checkpoint could not be written. Those written before it are untouched."""


def save_checkpoint(
    directory: Path,
    step: int,
    tensors: Mapping[str, Any],
    state: Mapping[str, Any],
    *,
    files: Mapping[str, bytes] | None = None,
    keep_last: int | None = None,
    keep_every: int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Path:
    """Write the checkpoint of a step; when this returns it is whole and on disk.

    Args:
        directory: of all checkpoints of the run; made if need be.
        step: optimizer steps done. A checkpoint of this step that is there already is replaced.
        tensors: by canonical name, or nested dicts of them (names joined by dots). Views are fine.
        state: what is not a tensor; must be JSON.
        files: further files by name, for example the tokenizer's; the first rank's count.
        keep_last: delete all but the newest so many whole ones, never the one just written.
        keep_every: nor those whose step is a multiple of it.
        process_group: the ranks that save together; None is the default group, if there is one.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointNotSaved: the operating system refused (disk full, no permission, ...).
    """
    if keep_last is not None and keep_last < 1:
        raise ValueError(f"keep_last must be at least 1, not {keep_last}")
    flat = flatten(tensors)
    ranks = _Ranks(process_group)
    directory = Path(directory)
    writing = directory / f"{WRITING}{step_name(step)}"
    small = {STATE: json.dumps(state, indent=1).encode()} | dict(files or {})
    with _reported(directory, step), _claimed(directory, writing, ranks):
        written = _write_tensors(writing, flat, ranks)
        ranks.first(lambda: _finish(directory, writing, step, small, written, (keep_last, keep_every)))
    return directory / step_name(step)


def _write_tensors(writing: Path, flat: dict[str, Tensor], ranks: _Ranks) -> dict[str, FileRecord]:
    """Have torch.distributed.checkpoint write the tensors; all ranks' files, on rank 0."""
    writer = HashingWriter(writing)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")  # one process: just what is meant
        planner = PieceSavePlanner()
        save(dict(flat), storage_writer=writer, planner=planner, process_group=ranks.group, no_dist=ranks.alone)
    return {name: record for part in ranks.gather(writer.records) for name, record in part.items()}


def _finish(
    directory: Path,
    writing: Path,
    step: int,
    small: Mapping[str, bytes],
    files: dict[str, FileRecord],
    keep: tuple[int | None, int | None],
) -> None:
    """From complete tensor files to a checkpoint under its own name."""
    for name, content in small.items():
        files[name] = write_durably(writing / name, content)
    sync_directory(writing)
    write_durably(writing / MANIFEST, manifest_text(files).encode())
    sync_directory(writing)
    final = put_in_place(directory, writing)
    # The checkpoint is safe. What cannot be deleted now will be tried again by the next save.
    with suppress(OSError):
        _clear_leftovers(directory)
        _prune(directory, final, *keep)


def put_in_place(directory: Path, writing: Path) -> Path:
    """Give a whole checkpoint its own name, and let `latest` name it."""
    final = directory / writing.name.removeprefix(WRITING)
    _set_aside(directory, final)
    os.replace(writing, final)
    sync_directory(directory)
    write_durably(directory / LATEST, f"{final.name}\n".encode())
    sync_directory(directory)
    return final


def _set_aside(directory: Path, final: Path) -> None:
    """Free a name: a whole checkpoint is kept under another one until its successor is in place."""
    if final.exists():
        whole = not problems_of(final, hashes=False)
        aside = directory / f"{REPLACED if whole else DELETING}{final.name}"
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(final, aside)


def _prune(directory: Path, newest: Path, keep_last: int | None, keep_every: int | None) -> None:
    if keep_last is None:
        return
    there = {path: step for path in directory.iterdir() if (step := step_of(path.name)) is not None}
    # What is broken is nobody's spare copy: it is neither counted nor deleted.
    whole = [step for path, step in there.items() if not problems_of(path, hashes=False)]
    for step in surplus(whole, there[newest], keep_last, keep_every):
        doomed = directory / f"{DELETING}{step_name(step)}"
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(directory / step_name(step), doomed)
        sync_directory(directory)
        shutil.rmtree(doomed)


def _clear_leftovers(directory: Path) -> None:
    """Remove what writers that died have left; put back what they had set aside."""
    for path in directory.iterdir():
        if path.name.startswith(REPLACED):
            final = directory / path.name.removeprefix(REPLACED)
            if not final.exists():
                os.replace(path, final)
                continue
        elif not path.name.startswith((WRITING, DELETING)):
            continue
        with _lock(path) as free:
            if free:
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold a directory's flock if nobody else does; the kernel frees a dead process's: none is ever stale."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass  # a file system without locks: then the run's own lock has to do
        yield True
    finally:
        os.close(handle)


@contextmanager
def _claimed(directory: Path, writing: Path, ranks: _Ranks) -> Iterator[None]:
    """A fresh writing directory, locked, and gone again if the block fails."""

    def prepare() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(directory)
        if writing.exists():
            raise BlockingIOError(errno.EAGAIN, f"another process is writing {writing.name}")
        writing.mkdir()

    ranks.first(prepare)
    with _lock(writing) if ranks.rank == 0 else nullcontext():
        try:
            yield
        except BaseException:
            if ranks.rank == 0:
                shutil.rmtree(writing, ignore_errors=True)
            raise


@contextmanager
def _reported(directory: Path, step: int) -> Iterator[None]:
    """Turn the system's refusals into one sentence."""
    try:
        yield
    except (OSError, CheckpointException) as error:
        causes = [pair[0] for pair in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        refused = next((c for c in causes if isinstance(c, OSError)), None)
        if refused is None or any(not isinstance(c, Exception) for c in causes):
            raise next((c for c in causes if not isinstance(c, Exception)), causes[0]) from None
        remedy = _REMEDIES.get(refused.errno or 0, "make sure that the folder can be written to")
        raise CheckpointNotSaved(
            f"{directory}: the checkpoint of step {step} could not be written "
            f"({refused.strerror or refused}): {remedy}; earlier checkpoints are untouched"
        ) from refused


class _Ranks:
    """The processes that save together; one process when torch.distributed is not in use."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.alone = not (dist.is_available() and dist.is_initialized())
        self.rank = 0 if self.alone else dist.get_rank(group)

    def first(self, action: Callable[[], T]) -> T | None:
        """Run something on rank 0; every rank waits for it and raises what it raised."""
        if self.alone:
            return action()
        outcome: list[BaseException | None] = [None]
        value = None
        if self.rank == 0:
            try:
                value = action()
            except Exception as error:
                outcome[0] = error
        dist.broadcast_object_list(outcome, group=self.group, group_src=0)
        if outcome[0] is not None:
            raise outcome[0]
        return value

    def gather(self, value: T) -> list[T]:
        """Everybody's value, on every rank."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return values
