"""A run directory -> the columns and texts that a report shows.

    metrics.jsonl     -> records by kind            config.yaml       -> text, parameters
    environment.json  -> facts                      comparison.json   -> bits per byte of others
                                                    samples.json      -> generated text

Reading is forgiving where a run is still going or was killed (a line that is half written,
files that do not exist yet), but counts what it passes over, so that the report can say so.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from castalia.errors import UserError
from castalia.train.metrics import read_metrics

Record = dict[str, Any]


@dataclass
class Run:
    """What is known of one run."""

    path: Path
    name: str
    train: list[Record]
    valid: list[Record]
    test: list[Record]
    events: list[Record]
    unreadable: int = 0
    config_text: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    comparison: dict[str, Any] | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)

    def column(self, kind: str, x: str, y: str) -> tuple[list[float], list[float]]:
        """Two columns of the records of one kind that have `y`.

        Args:
            kind: `train` or `valid`.
            x: `step`, `tokens` (seen so far) or `seconds`.
            y: a key of the records.
        """
        records = [r for r in (self.train if kind == "train" else self.valid) if _is_number(r.get(y))]
        if kind == "train":
            records = [r for r in records if _is_number(r.get(x))]
            return [float(r[x]) for r in records], [float(r[y]) for r in records]
        # `tokens` of a validation record counts what it was measured on: its place on the axis is
        # read off the training records.
        steps = [float(r["step"]) for r in records]
        return steps if x == "step" else self.at_steps(steps, x), [float(r[y]) for r in records]

    def at_steps(self, wanted: Sequence[float], key: str) -> list[float]:
        """`tokens` or `seconds` of training when each step was done, between records by proportion."""
        steps, values = [0.0], [0.0]
        for r in self.train:
            if _is_number(r.get(key)):
                steps.append(float(r["step"]))
                values.append(float(r[key]))
        out = []
        for step in wanted:
            i = min(bisect_left(steps, step), len(steps) - 1)
            if i == 0 or steps[i] <= step:
                out.append(values[i])
            else:
                share = (step - steps[i - 1]) / (steps[i] - steps[i - 1])
                out.append(values[i - 1] + share * (values[i] - values[i - 1]))
        return out

    def last(self, key: str, *kinds: str) -> float | None:
        """The newest finite value of `key` in the first of `kinds` that has one."""
        for kind in kinds:
            for record in reversed(getattr(self, kind)):
                if _is_number(record.get(key)) and math.isfinite(record[key]):
                    return float(record[key])
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_run(path: Path) -> Run:
    """Read a run directory (docs/contracts.md, section 3).

    Raises:
        UserError: there is no run, it has nothing to show yet, or one of its files is damaged.
    """
    metrics = path / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(f"{path} is not a run directory: it has no metrics.jsonl; give one that `train` wrote")
    records = [r for r in read_metrics(metrics) if _is_number(r.get("step"))]
    newer = next((r["v"] for r in records if r.get("v", 1) != 1), None)
    if newer is not None:
        raise UserError(f"{metrics} is of version {newer}, and this Castalia reads version 1: use a newer one")
    if not any(r.get("kind") in ("train", "valid", "test") for r in records):
        raise UserError(f"{metrics} has no training or evaluation record yet: wait for the first logged step")
    train, valid, test, events = (
        [r for r in records if r.get("kind") == kind] for kind in ("train", "valid", "test", "event")
    )
    run = Run(path, path.resolve().name, train, valid, test, events)
    _read_config(run)
    # Lines with an end, less those that are records; what has no end yet is still being written.
    run.unreadable = metrics.read_bytes().count(b"\n") - len(records)
    run.environment = _read_json(path / "environment.json", dict) or {}
    run.comparison = _read_json(path / "comparison.json", dict)
    run.samples = _read_json(path / "samples.json", list) or []
    return run


def _read_json(path: Path, kind: type[Any]) -> Any:
    """A JSON file that holds an object (dict) or a list of objects, None where it does not exist."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): remove or restore it") from None
    if not isinstance(value, kind) or (kind is list and not all(isinstance(item, dict) for item in value)):
        what = "a list of objects" if kind is list else "an object"
        raise UserError(f"{path} does not hold {what}, which Castalia wrote: remove or restore it")
    return value


def _read_config(run: Run) -> None:
    """The configuration as text, as values, and the number of parameters that follows.

    A configuration that this version cannot read still shows as text, so that old runs can be reported.
    """
    path = run.path / "config.yaml"
    if not path.is_file():
        return
    run.config_text = path.read_text(encoding="utf-8", errors="replace")
    from castalia.config import load
    from castalia.model.size import model_size

    try:
        config = load([path])
        run.config = config.model_dump()
        run.name = config.name
        run.parameters = model_size(config).total_parameters
    except UserError:
        return
