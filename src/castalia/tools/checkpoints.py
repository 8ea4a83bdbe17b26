"""A run's checkpoints, told and copied.

    RUN, RUN/checkpoints or RUN/checkpoints/step-N ──> a row for each checkpoint
                     one of them ──weights, settings, tokenizer──> OUT, a run without an optimizer

A slim copy is a run's folder like any other to whatever reads one (generate, evaluate, export,
start.path); only training does not go on in it.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from castalia.checkpoint import (
    find_checkpoint,
    load_weights,
    read_state,
    save_checkpoint,
    tensor_shapes,
    verify_checkpoint,
)
from castalia.checkpoint.layout import MANIFEST, problems_of, read_manifest, step_of
from castalia.config.load import check_values
from castalia.config.render import to_yaml
from castalia.errors import UserError

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Row:
    """One checkpoint: its step, bytes and tokens seen, when it was written (Unix time), and what is wrong with it."""

    name: str
    step: int
    bytes: int
    tokens: int | None
    written: float
    problem: str | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def checkpoints_of(name: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints that a path stands for, by step; whole or not.

    Raises:
        UserError: there are none.
    """
    path = Path(name)
    if (path / MANIFEST).is_file() or (path.is_dir() and step_of(path.name) is not None):
        return [path]
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = {step: child for child in folder.glob("step-*") if (step := step_of(child.name)) is not None}
    if not found:
        raise UserError(f"{path}: has no checkpoints: give a run's folder, or one checkpoint's")
    return [found[step] for step in sorted(found)]


def listed(name: str | os.PathLike[str]) -> list[Row]:
    """A row for each checkpoint; files are compared by size alone (`castalia verify checkpoint` reads them)."""
    rows = []
    for path in checkpoints_of(name):
        problems, files = problems_of(path, hashes=False), read_manifest(path)[1]
        tokens = read_state(path).get("tokens") if not problems else None
        size = sum(record.size for record in files.values())
        rows.append(
            Row(path.name, step_of(path.name) or 0, size, tokens, path.stat().st_mtime, next(iter(problems), None))
        )
    return rows


def slim(source: Path, output: Path, step: int | None = None) -> Path:
    """Copy a checkpoint's weights (their means, where it keeps such), settings and tokenizer into a new run's folder.

    Args:
        source: a run, or one checkpoint.
        output: the folder to make; must not exist.
        step: of the run's checkpoints; None: the newest whole one.

    Returns:
        The new checkpoint.

    Raises:
        UserError: nothing usable is there, or the output exists.
    """
    if output.exists():
        raise UserError(f"{output}: exists already: choose another folder, or remove it")
    path = _chosen(source, step)
    state = read_state(path)
    weights = {n: torch.empty(shape) for n, shape in tensor_shapes(path).items() if n.startswith("model.")}
    load_weights(path, weights)
    tokenizer = next((f for f in (path / TOKENIZER, path.parent.parent / TOKENIZER) if f.is_file()), None)
    files = {} if tokenizer is None else {TOKENIZER: tokenizer.read_bytes()}
    writing = output.with_name(f".writing-{output.name}")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    try:
        for name, content in files.items():
            (writing / name).write_bytes(content)
        (writing / "config.yaml").write_text(to_yaml(check_values(state["config"], str(path))), encoding="utf-8")
        kept = save_checkpoint(writing / "checkpoints", state["step"], weights, state | {"slim": True}, files=files)
        os.replace(writing, output)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return output / "checkpoints" / kept.name


def _chosen(source: Path, step: int | None) -> Path:
    if (source / MANIFEST).is_file():
        if step is not None:
            raise UserError(f"{source} is one checkpoint: leave --step out, or give the run's folder")
        problems = verify_checkpoint(source)
        if problems:
            raise UserError(f"{problems[0]}: choose another checkpoint")
        return source
    found = find_checkpoint(source / "checkpoints" if (source / "checkpoints").is_dir() else source, step)
    if found is None:
        raise UserError(f"{source}: has no checkpoints: give a run's folder, or one checkpoint's")
    return found.path
