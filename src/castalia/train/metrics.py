"""The run's record: metrics.jsonl for programs, one line a record for people.

The file always reads as one uninterrupted run: a resumed one first drops what lies after the
step it goes on from (docs/contracts.md, section 3.1).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

VERSION = 1


class MetricsFile:
    """metrics.jsonl, open for appending.

    Args:
        path: the file; made if it is not there.
        keep_through: drop records of later steps first; None keeps all.
    """

    def __init__(self, path: Path, keep_through: int | None = None) -> None:
        if keep_through is not None and path.exists():
            kept = [r for r in read_metrics(path) if r.get("step", 0) <= keep_through]
            fresh = path.with_name(f".{path.name}.new")
            with fresh.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(r) + "\n" for r in kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, **values: Any) -> dict[str, Any]:
        """Append one record; values that are None are left out. Returns the record."""
        record = {"v": VERSION, "kind": kind, "step": step}
        record |= {key: value for key, value in values.items() if value is not None}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        return record

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole records of a metrics.jsonl; a last line that is still being written is passed over."""
    records = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n") and line.strip():
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError:  # the torn line of a killed process, appended to later
                    continue
    return records


class Console:
    """Progress for people, on standard error so that `--json` output stays clean."""

    def __init__(self, steps: int, stream: TextIO | None = None, quiet: bool = False) -> None:
        self.steps, self.stream, self.quiet = steps, stream or sys.stderr, quiet

    def say(self, text: str) -> None:
        """One line."""
        if not self.quiet:
            print(text, file=self.stream, flush=True)

    def train(self, record: dict[str, Any], eta: float) -> None:
        """One line of training progress; `eta` in seconds."""
        mfu = f"  MFU {100 * record['mfu']:.0f}%" if "mfu" in record else ""
        self.say(
            f"step {record['step']:>{len(str(self.steps))}}/{self.steps}  loss {record['loss']:.4f}  "
            f"lr {record['lr']:.2e}  |g| {record['grad_norm']:.3f}  "
            f"{human(record['tokens_per_second'])} tokens/s{mfu}  ETA {clock(eta)}"
        )

    def evaluation(self, record: dict[str, Any]) -> None:
        """One line of an evaluation's result."""
        bits = f"  bits/byte {record['bits_per_byte']:.4f}" if "bits_per_byte" in record else ""
        name = "validation" if record["kind"] == "valid" else "test"
        self.say(f"step {record['step']:>{len(str(self.steps))}}/{self.steps}  {name} loss {record['loss']:.4f}{bits}")


def human(number: float) -> str:
    """1234567 -> 1.23M, three significant digits."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
