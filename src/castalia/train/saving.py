"""A run's state -> checkpoints on disk and, if asked for, at a URL, while training goes on.

    save() ─┬─ checkpoint.asynchronous: copy ─> next step      thread: write, finish, upload ─┐
            └─ at the end, on a signal, or synchronously: written before it returns           │
    poll() after each step <── what came of it: an event in metrics.jsonl, a warning ─────────┘

One save is under way at most: the next waits for it. With several processes each has such a thread,
and the threads speak through a group of their own, never through the one that trains.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

import castalia
from castalia.checkpoint import Background, CheckpointNotSaved, Mirror, MirrorFailed, save_checkpoint, step_name
from castalia.data.plan import journal_to_json
from castalia.train.forward import FORWARD, encoded_logits
from castalia.train.resume import STATE_VERSION

if TYPE_CHECKING:
    from castalia.train.run import Run

TOKENIZER = "tokenizer.json"
_NOTICEABLE = 1.0


@dataclass(frozen=True)
class _Outcome:
    """What came of a save: how long the writing took, and what went wrong."""

    step: int
    seconds: float = 0.0
    refused: CheckpointNotSaved | None = None
    not_uploaded: MirrorFailed | None = None


class Saving:
    """The checkpoints of a run, written and mirrored. Use as a context manager: leaving it waits for what is written.

    Args:
        run: assembled so far that its mesh stands.
    """

    def __init__(self, run: Run) -> None:
        cfg = run.config.checkpoint
        self._run, self._cfg = run, cfg
        self._background: Background[_Outcome] = Background()
        self._group = run.mesh.host_group()
        self._stall = 0.0
        self.mirror = Mirror(cfg.path, cfg.chunk_size) if cfg.path is not None and run.first else None

    def save(self, required: bool = True) -> None:
        """Save this step.

        Args:
            required: it must be on disk when this returns.

        Raises:
            CheckpointNotSaved: it could not be written and `required`; else that is only said, and training goes on.
        """
        began, run = time.perf_counter(), self._run
        waits = self._background.busy
        self._report(self._background.wait())
        waited = time.perf_counter() - began
        if waits and waited > _NOTICEABLE and not required:
            run.console.say(
                f"the checkpoint before was still being written: waited {waited:.1f} s for it; save less often, or to "
                "a faster disk"
            )
        step, state, files = run.step, state_of(run), self._files()

        def write(tensors: Mapping[str, Any]) -> _Outcome:
            return self._write(step, tensors, state, files)

        if required or not self._cfg.asynchronous:
            outcome = write(run.store.tensors())
            self._stall = time.perf_counter() - began
            self._report(outcome, required)
            return
        self._background.start(run.store.tensors(), write)
        self._stall = time.perf_counter() - began

    def settle(self) -> None:
        """Wait for what is being written, and say what came of it."""
        self._report(self._background.wait())

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written now."""
        return self._background.busy

    def poll(self) -> None:
        """Say what came of the last save, if that is known by now and was not said."""
        self._report(self._background.poll())

    def __enter__(self) -> Saving:
        if self._cfg.asynchronous and (self._cfg.interval is not None or self._cfg.scale == "log"):
            self._background.copied(self._run.store.tensors())  # makes the buffers, before anybody waits for them
        if self.mirror is not None and self._run.resumed:
            failed = self._upload()  # what an earlier sitting could not
            if failed is not None:
                self._not_uploaded(self._run.step, failed)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._report(self._background.wait())
        finally:
            self._background.close()

    def _write(
        self, step: int, tensors: Mapping[str, Any], state: dict[str, Any], files: Mapping[str, bytes]
    ) -> _Outcome:
        """In the thread, or in the step: from tensors to a whole checkpoint, here and at the URL."""
        began, cfg = time.perf_counter(), self._cfg
        try:
            save_checkpoint(
                self._run.checkpoints,
                step,
                tensors,
                state,
                files=files,
                keep_last=cfg.keep_last,
                keep_every=cfg.keep_every,
                process_group=self._group,
            )
        except CheckpointNotSaved as error:
            return _Outcome(step, refused=error)
        return _Outcome(step, time.perf_counter() - began, not_uploaded=self._upload())

    def _upload(self) -> MirrorFailed | None:
        if self.mirror is None:
            return None
        try:
            self.mirror.update(self._run.checkpoints, self._cfg.keep_last, self._cfg.keep_every)
        except MirrorFailed as error:
            return error
        return None

    def _report(self, outcome: _Outcome | None, required: bool = False) -> None:
        """One event for what came of a save, and a warning where something did not."""
        if outcome is None:
            return
        run, step = self._run, outcome.step
        if outcome.refused is not None:
            run.metrics.write("event", step, event="checkpoint failed", text=str(outcome.refused))
            if required:
                raise outcome.refused
            run.console.say(f"WARNING: {outcome.refused}; training goes on")
            return
        run.metrics.write(
            "event",
            step,
            event="checkpoint",
            text=step_name(step),
            checkpoint_stall_seconds=self._stall,
            checkpoint_write_seconds=outcome.seconds,
        )
        if outcome.not_uploaded is not None:
            self._not_uploaded(step, outcome.not_uploaded)

    def _not_uploaded(self, step: int, error: MirrorFailed) -> None:
        run = self._run
        run.metrics.write("event", step, event="upload failed", text=str(error))
        run.console.say(f"WARNING: {error}; it is here, training goes on, and the next save tries again")

    def _files(self) -> dict[str, bytes]:
        """What else makes a checkpoint usable by itself."""
        run = self._run
        content = run.tokenizer.file_bytes() if run.tokenizer is not None else None
        files = {} if content is None else {TOKENIZER: content}
        if self._cfg.validate_forward:
            files[FORWARD] = encoded_logits(run)
        return files


def state_of(run: Run) -> dict[str, Any]:
    """What a checkpoint keeps besides tensors (docs/contracts.md, section 4)."""
    return {
        "version": STATE_VERSION,
        "step": run.step,
        "updates": run.updates,
        "tokens": run.tokens,
        "seconds": run.seconds(),
        "config": run.config.model_dump(),
        "journal": journal_to_json(run.journal),
        "data": run.data.fingerprints,
        "train_data": run.data.train_fingerprints,
        "epochs": run.data.epochs,
        "tokenizer": run.tokenizer.identity() if run.tokenizer else None,
        "import": run.imported,
        "noise": run.noise.state(),
        "guard": run.guard.state(),
        "loss_scale": None if run.scaler is None else run.scaler.state(),
        "versions": {
            "castalia": castalia.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "git": run.facts["git"],
        "command": run.facts["command"],
    }
