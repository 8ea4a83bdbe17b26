"""Some steps of a run -> torch's trace of them, and what was allocated when.

    prepare ─> start ─> step N ... ─> finish ─┬─> trace.json       ranges: step N, forward, backward, ...
                                              └─> memory           a snapshot of the device's allocator, or
                                                                   a time line of the bytes held, as JSON

Some accelerators' allocators keep their own history, which pytorch.org/memory_viz draws. A CPU's has
none, so there the time line is taken from the profiler's records of allocations.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, supported_activities

from castalia.config.files import write_text
from castalia.errors import UserError

_ENTRIES = 100_000
"""Allocations that a device's history keeps at most, as GPT-NeoX asks for."""


class Recorder:
    """Records one window of steps.

    Args:
        device: of the steps.
        trace: torch's trace is wanted.
        memory: what was allocated is wanted.
    """

    def __init__(self, device: torch.device, trace: bool, memory: bool) -> None:
        self._history = allocator_history(device) if memory else None
        self._profiler: Any = None
        if trace or (memory and self._history is None):
            kinds = [ProfilerActivity.CPU, *(a for a in supported_activities() if a != ProfilerActivity.CPU)]
            self._profiler = profile(activities=kinds, record_shapes=True, profile_memory=memory)
        self._range: Any = None

    def prepare(self) -> None:
        """What takes time before the start; a step between the two is of use to warm up."""
        if self._profiler is not None:
            self._profiler.prepare_trace()

    def start(self) -> None:
        """Begin to record."""
        if self._history is not None:
            self._history._record_memory_history(max_entries=_ENTRIES)
        if self._profiler is not None:
            self._profiler.start_trace()

    def step(self, number: int) -> None:
        """A step begins, and the one before is over."""
        self._end_step()
        self._range = record_function(f"step {number}")
        self._range.__enter__()

    def finish(self, trace: Path | None, memory: Path | None) -> list[Path]:
        """End, and write what is wanted.

        Args:
            trace, memory: where; of `memory` the suffix follows from what keeps the record.

        Returns:
            The files.

        Raises:
            UserError: they cannot be written.
        """
        self._end_step()
        if self._profiler is not None:
            self._profiler.stop_trace()
        place = trace or memory
        assert place is not None, "else nothing is recorded"
        fresh = place.with_name(f".{place.name}.new")
        written: list[Path] = []
        try:
            fresh.parent.mkdir(parents=True, exist_ok=True)
            if memory is not None and self._history is not None:
                file = with_suffix(memory, "pickle")
                self._history._dump_snapshot(str(fresh))
                os.replace(fresh, file)
                written.append(file)
            if self._profiler is not None:
                self._profiler.export_chrome_trace(str(fresh))
            if memory is not None and self._history is None:
                file = with_suffix(memory, "json")
                write_text(file, json.dumps(time_line(json.loads(fresh.read_text(encoding="utf-8")))) + "\n")
                written.append(file)
            if trace is not None:
                os.replace(fresh, trace)
                written.append(trace)
        except OSError as error:
            raise UserError(f"{place} cannot be written: {error.strerror or error}") from None
        finally:
            if self._history is not None:
                self._history._record_memory_history(enabled=None)
            fresh.unlink(missing_ok=True)
        return written

    def _end_step(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None


def allocator_history(device: torch.device) -> Any:
    """What keeps a history of allocations on this device; None: its allocator keeps none."""
    if device.type == "cpu":
        return None
    memory = getattr(torch.get_device_module(device), "memory", None)
    return memory if hasattr(memory, "_record_memory_history") and hasattr(memory, "_dump_snapshot") else None


def with_suffix(path: Path, suffix: str) -> Path:
    """The file with this suffix, if it has another."""
    return path if path.name.endswith(f".{suffix}") else path.with_name(f"{path.name}.{suffix}")


def time_line(trace: dict[str, Any]) -> dict[str, Any]:
    """The bytes held over time out of a trace with records of allocations.

    Returns:
        `points`: `[microseconds, bytes]`, as torch's allocator counts what it gave since the start; `ranges`: steps
        and phases as `[name, start, end]`; `peak_bytes`.
    """
    events = trace["traceEvents"]
    records = sorted(((e["ts"], e["args"]) for e in events if e.get("name") == "[memory]"), key=lambda pair: pair[0])
    ranges = [e for e in events if e.get("cat") == "user_annotation" and e.get("ph") == "X"]
    start = min([e["ts"] for e in ranges] + [ts for ts, _ in records], default=0.0)
    held, points = 0, []
    for ts, args in records:
        held += args["Bytes"]
        points.append([round(ts - start, 3), held])
    return {
        "version": 1,
        "what": "bytes allocated and not freed since the recording began, by torch's allocator",
        "peak_bytes": max((held for _, held in points), default=0),
        "ranges": [[e["name"], round(e["ts"] - start, 3), round(e["ts"] + e["dur"] - start, 3)] for e in ranges],
        "points": points,
    }
