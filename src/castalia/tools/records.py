"""A run directory -> the columns and texts that a report shows.

    metrics.jsonl     -> records by kind, ascending     config.yaml      -> text, settings, parameters
    environment.json  -> facts                          comparison.json  -> bits per byte of others
    samples.json      -> generated text                 incidents/       -> what the guard left out
    results*.json, dynamics/dynamics.json               -> downstream tasks, measured afterwards

Reading is forgiving where a run is still going, was killed or lost a file's end: what cannot be read is
left out, and `remarks` says so, so that one damaged file does not hide the other runs of a comparison.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from castalia.config import Config
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
    tasks: list[Record] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    config_text: str | None = None
    config: Config | None = None
    parameters: int | None = None
    flops_per_token: int | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    comparison: dict[str, Any] | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    incidents: list[dict[str, Any]] = field(default_factory=list)

    @property
    def step(self) -> int:
        """How far it has come."""
        return max((int(r["step"]) for r in (*self.train, *self.valid, *self.test)), default=0)

    @property
    def state(self) -> str:
        """Whether it has ended, in words."""
        states = {"end": "finished", "signal": "stopped by a signal, can be resumed"}
        return states.get(str(self.events[-1].get("event")) if self.events else "", "no end recorded yet")

    def column(self, kind: str, x: str, y: str) -> tuple[list[float], list[float]]:
        """Two columns of the records of one kind that have `y`, x ascending.

        Args:
            kind: `train`, `valid` or `tasks`.
            x: `step`, `tokens` (seen so far), `seconds` or `flops` (of the model, so far).
            y: a key of the records.
        """
        records = [r for r in getattr(self, kind) if is_number(r.get(y))]
        values = [float(r[y]) for r in records]
        key, factor = self._measure(x)
        if x == "step":
            return [float(r["step"]) for r in records], values
        if kind == "train" and all(is_number(r.get(key)) for r in records):
            places = [factor * r[key] for r in records]
        else:
            # `tokens` of a validation record counts what it was measured on: its place on the axis is
            # read off the training records.
            places = self.at_steps([float(r["step"]) for r in records], x)
        pairs = [(a, b) for a, b in zip(places, values, strict=True) if math.isfinite(a)]
        pairs.sort(key=itemgetter(0))
        return [a for a, _ in pairs], [b for _, b in pairs]

    def _measure(self, x: str) -> tuple[str, float]:
        """The key of a training record that an axis is read off, and a factor."""
        return ("tokens", float(self.flops_per_token or math.nan)) if x == "flops" else (x, 1.0)

    def at_steps(self, wanted: Sequence[float], key: str) -> list[float]:
        """`tokens`, `seconds` or `flops` of training when each step was done, between records by proportion.

        Not a number where no record tells.
        """
        key, factor = self._measure(key)
        known = [(float(r["step"]), factor * r[key]) for r in self.train if is_number(r.get(key))]
        if not known:
            return [math.nan] * len(wanted)
        steps, values = [0.0, *(s for s, _ in known)], [0.0, *(v for _, v in known)]
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
                if is_number(record.get(key)) and math.isfinite(record[key]):
                    return float(record[key])
        return None

    def keys(self, kind: str) -> list[str]:
        """The keys of the records of one kind that have numbers, in the order of their first appearance."""
        return list(dict.fromkeys(k for r in getattr(self, kind) for k, v in r.items() if is_number(v)))


def is_number(value: Any) -> bool:
    """Whether a value of a record can be drawn or averaged."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_run(path: Path) -> Run:
    """Read a run directory (docs/contracts.md, section 3).

    Raises:
        UserError: there is no run, it has nothing to show yet, or it is of a newer version.
    """
    metrics = path / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(f"{path} is not a run directory: it has no metrics.jsonl; give one that `train` wrote")
    records = [r for r in read_metrics(metrics) if is_number(r.get("step")) and math.isfinite(r["step"])]
    newer = next((r["v"] for r in records if r.get("v", 1) != 1), None)
    if newer is not None:
        raise UserError(f"{metrics} is of version {newer}, and this Castalia reads version 1: use a newer one")
    if not any(r.get("kind") in ("train", "valid", "test") for r in records):
        raise UserError(f"{metrics} has no training or evaluation record yet: wait for the first logged step")
    kinds: dict[str, list[Record]] = {}
    for record in records:
        kinds.setdefault(str(record.get("kind")), []).append(record)
    run = Run(path, path.resolve().name, [], [], [], kinds.get("event", []))
    beside = _beside(kinds)
    run.train = _ascending(_flat(r) | beside.get(r["step"], {}) for r in kinds.get("train", []))
    run.valid, run.test, run.tasks = (_ascending(kinds.get(kind, [])) for kind in ("valid", "test", "tasks"))
    # Lines with an end, less those that are records; what has no end yet is still being written.
    unreadable = metrics.read_bytes().count(b"\n") - len(records)
    if unreadable:
        run.remarks.append(f"{unreadable} unreadable line(s) of metrics.jsonl left out")
    _read_config(run)
    run.environment = _read_json(run, path / "environment.json", dict) or {}
    run.comparison = _read_json(run, path / "comparison.json", dict)
    run.samples = [s for r in kinds.get("samples", []) + kinds.get("sample", []) for s in _samples_of(r)]
    run.samples += _read_json(run, path / "samples.json", list) or []
    for file in sorted(path.glob("incidents/*.json")):
        incident = _read_json(run, file, dict)
        run.incidents += [incident | {"file": str(file.relative_to(path))}] if incident else []
    _read_results(run)
    return run


def _ascending(records: Iterable[Record]) -> list[Record]:
    """By step; where a step is there twice (files that were joined by hand), the later one."""
    by_step = {r["step"]: r for r in records}
    return [by_step[step] for step in sorted(by_step)]


def _flat(record: Record) -> Record:
    """Numbers in a mapping of a record get names of their own, as `timers/forward`."""
    out: Record = {}
    for key, value in record.items():
        if isinstance(value, dict):
            out |= {f"{key}/{name}": number for name, number in value.items() if is_number(number)}
        else:
            out[key] = value
    return out


def _beside(kinds: dict[str, list[Record]]) -> dict[int, Record]:
    """What other kinds of record say of a training step: the norm of all parameters, groups' noise, timers."""
    out: dict[int, Record] = {}
    for record in kinds.get("norms", []):
        norms = record.get("parameter")
        parts = [v for v in norms.values() if is_number(v)] if isinstance(norms, dict) else []
        if parts:
            out.setdefault(record["step"], {})["parameter_norm"] = math.sqrt(math.fsum(v * v for v in parts))
    for record in kinds.get("noise", []):
        groups = record.get("groups")
        for group, ends in groups.items() if isinstance(groups, dict) else ():
            if isinstance(ends, dict) and is_number(ends.get("value")):
                out.setdefault(record["step"], {})[f"noise scale of {group}"] = ends["value"]
    for record in kinds.get("timers", []):
        phases = record.get("seconds")
        if isinstance(phases, dict):
            out.setdefault(record["step"], {}).update(_flat({"timers": phases}))
    return out


def _samples_of(record: Record) -> list[dict[str, Any]]:
    """Texts that were generated during training: one to a record, or a list of them."""
    found = record.get("samples")
    if isinstance(found, list):
        return [{"step": record["step"]} | sample for sample in found if isinstance(sample, dict)]
    return [record]


def _read_json(run: Run, path: Path, kind: type[Any]) -> Any:
    """A JSON file that holds an object (dict) or a list of objects; None where there is none, or a damaged one."""
    if not path.is_file():
        return None
    name = path.relative_to(run.path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        run.remarks.append(f"{name} cannot be read and is left out ({error})")
        return None
    if not isinstance(value, kind) or (kind is list and not all(isinstance(item, dict) for item in value)):
        run.remarks.append(f"{name} does not hold what Castalia writes there and is left out")
        return None
    return value


def _read_config(run: Run) -> None:
    """The configuration as text, as values, and the number of parameters that follows.

    A configuration that this version cannot read still shows as text, so that old runs can be reported.
    """
    path = run.path / "config.yaml"
    if not path.is_file():
        run.remarks.append("there is no config.yaml: settings, parameters and FLOPs are not known")
        return
    run.config_text = path.read_text(encoding="utf-8", errors="replace")
    from castalia.config import load
    from castalia.model.size import model_size

    try:
        run.config = load([path])
        run.name = run.config.name
        size = model_size(run.config)
    except UserError:
        if run.config is None:
            run.remarks.append("config.yaml cannot be read by this version: its settings are not compared")
        return
    run.parameters, run.flops_per_token = size.total_parameters, size.flops_per_token


def _read_results(run: Run) -> None:
    """Tasks that `castalia evaluate` measured afterwards, where its output lies in the run's folder.

    A harness's file holds `{"results": {task: {"metric,filter": value}}}`, without a step: it joins the last one.
    """
    found: list[Record] = []
    for file in sorted(run.path.glob("results*.json")):
        content = _read_json(run, file, dict) or {}
        results = content.get("results")
        values = {
            f"eval/{task}_{key.partition(',')[0]}": value
            for task, entry in (results.items() if isinstance(results, dict) else ())
            if isinstance(entry, dict)
            for key, value in entry.items()
            if is_number(value) and "," in key and "_stderr" not in key
        }
        found.append({"step": run.step} | values)
    dynamics = (_read_json(run, run.path / "dynamics" / "dynamics.json", dict) or {}).get("rows")
    for row in dynamics if isinstance(dynamics, list) else ():
        if isinstance(row, dict) and is_number(row.get("step")):
            values = {f"eval/{k}": v for k, v in row.items() if k not in ("step", "tokens")}
            found.append({"step": row["step"]} | values)
    by_step = {r["step"]: r for r in run.tasks}
    for record in found:
        by_step[record["step"]] = by_step.get(record["step"], {}) | record
    run.tasks = [by_step[step] for step in sorted(by_step)]
