"""The run's record: what is measured -> one record -> every sink that wants it.

    loop, evaluation, events ──> Metrics.write ──> record ─┬─> MetricsFile   metrics.jsonl, for programs
                                                           ├─> Console       a line for people
                                                           └─> sinks.py      TensorBoard, Weights & Biases

The file always reads as one uninterrupted run: a resumed one first drops what lies after the
step it goes on from (docs/contracts.md, section 3.1).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from castalia.config import Config
from castalia.errors import UserError
from castalia.model.size import ModelSize
from castalia.train.loop import Stopped

VERSION = 1
Record = dict[str, Any]


class MetricsSink(Protocol):
    """Whatever takes records."""

    def write(self, record: Record) -> None:
        """Take one record."""
        ...

    def close(self, failed: bool = False) -> None:
        """Finish; `failed` says that the run ends with an error."""
        ...


class Metrics:
    """Makes records and hands each to every sink. Use as a context manager.

    Args:
        file: metrics.jsonl, without which there is no run.
        others: sinks that a run can do without: one that fails is left out from then on.
        warn: told when that happens.
    """

    def __init__(
        self, file: MetricsFile | Unwritten, others: Sequence[MetricsSink], warn: Callable[[str], None]
    ) -> None:
        self._file, self._others, self._warn = file, list(others), warn

    def write(self, kind: str, step: int, **values: Any) -> Record:
        """Write one record; what is None or not a finite number is left out. Returns the record."""
        record = {"v": VERSION, "kind": kind, "step": step} | _finite(values)
        self._file.write(record)
        for sink in list(self._others):
            try:
                sink.write(record)
            except Exception as error:  # whatever a logging service comes up with: training is worth more
                self._others.remove(sink)
                self._warn(f"WARNING: {type(sink).__name__} fails and is left out from now on: {error}")
        return record

    def rewind(self, step: int) -> None:
        """Drop the records of later steps from the file: the run has gone back. Other sinks keep what they have."""
        self._file.rewind(step)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        failed = kind is not None and not issubclass(kind, Stopped)
        for sink in (self._file, *self._others):
            sink.close(failed=failed)


class Unwritten:
    """In place of metrics.jsonl where another process writes it."""

    kept: Sequence[Record] = ()

    def write(self, record: Record) -> None:
        """Nothing."""

    def rewind(self, step: int) -> None:
        """Nothing."""

    def close(self, failed: bool = False) -> None:
        """Nothing."""


class MetricsFile:
    """metrics.jsonl, open for appending.

    Args:
        path: the file; made if it is not there.
        keep_through: drop records of later steps first; None keeps all.

    Attributes:
        kept: the records that were there and stay.
    """

    def __init__(self, path: Path, keep_through: int | None = None) -> None:
        self._path = path
        self._open(keep_through)

    def _open(self, keep_through: int | None) -> None:
        path = self._path
        self.kept = read_metrics(path) if path.exists() else []
        if keep_through is not None and path.exists():
            self.kept = [r for r in self.kept if r.get("step", 0) <= keep_through]
            fresh = path.with_name(f".{path.name}.new")
            with fresh.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(r) + "\n" for r in self.kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append one record.

        Raises:
            UserError: the system refuses (disk full, ...), or the file was removed.
        """
        try:
            self._path.stat()  # what is written to a removed file is lost, and the system does not say so
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except FileNotFoundError:
            raise UserError(
                f"{self._path}: was removed while the run trained: start again, and leave its folder alone"
            ) from None
        except OSError as error:
            raise UserError(
                f"{self._path}: cannot be written ({error.strerror}): mend that, and the same command goes on "
                "from the newest checkpoint"
            ) from None

    def rewind(self, step: int) -> None:
        """Drop the records of later steps."""
        self._file.close()
        self._open(step)

    def close(self, failed: bool = False) -> None:
        """Close the file."""
        try:
            self._file.close()
        except OSError:  # what could not be written was reported when it was
            if not failed:
                raise


def throughput(
    config: Config, size: ModelSize, tokens: int, samples: int, steps: int, seconds: float, peak: float, processes: int
) -> dict[str, float]:
    """How fast some steps went, for their record.

    Args:
        config: complete.
        size: of the model.
        tokens, samples, steps: that took so many seconds, over all processes.
        peak: FLOP/s that a process could reach.
        processes: of the run.

    Returns:
        `tokens_per_second`, `samples_per_second`; `step_seconds`; `flops_per_second` of a process; `mfu`, and `hfu`,
        which also counts what is computed again: both 0..1.
    """
    flops = tokens / seconds * size.flops_per_token / processes
    return {
        "tokens_per_second": tokens / seconds,
        "samples_per_second": samples / seconds,
        "step_seconds": seconds / steps,
        "flops_per_second": flops,
        "mfu": flops / peak,
        "hfu": flops / peak * (1 + recomputed(config, size)),
    }


def recomputed(config: Config, size: ModelSize) -> float:
    """FLOPs that performance.recompute adds, as a share of those that `castalia plan` counts.

    A layer that is computed again costs its forward pass, a third of its FLOPs, once more; `selective` computes no
    matrix product again.
    """
    model, cfg = config.model, config.performance
    if cfg.recompute != "full":
        return 0.0
    heads = 6 * (1 + model.mtp_depth) * (model.vocab_size or 0) * model.hidden_size
    layers = len(range(0, model.num_layers, cfg.recompute_every)) / (model.num_layers + model.mtp_depth)
    return (size.flops_per_token - heads) / 3 * layers / size.flops_per_token


def read_metrics(path: Path) -> list[Record]:
    """All whole records of a metrics.jsonl; what is none, or is still being written, is passed over."""
    records = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.endswith("\n") and line.strip():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # the torn line of a killed process, appended to later
                    continue
                if isinstance(record, dict):
                    records.append(record)
    return records


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Without what JSON has no word for."""
    out = {k: _finite(v) if isinstance(v, dict) else v for k, v in values.items() if v is not None}
    return {k: v for k, v in out.items() if not (isinstance(v, float) and not math.isfinite(v))}
