"""PREFIX.journal.partial: how far a preparation has come, so that a killed one goes on there.

    {"version": 1, "plan": {...}}                      what the output depends on
    {"blocks": 17, "outputs": [[documents, tokens, bytes], ...]}   written once that much is on disk
    {"blocks": 31, ...

Lines are only ever added. The last whole one counts; what a torn one would have said is done again.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSION = 1


@dataclass(frozen=True, slots=True)
class Reached:
    """How far it came: blocks done, and of each output its documents, tokens and bytes of text."""

    blocks: int
    outputs: list[tuple[int, int, int]]


class Journal:
    """The journal of one preparation.

    Args:
        prefix: of the data set.
        plan: what the output depends on; JSON.
    """

    def __init__(self, prefix: str, plan: dict[str, Any]) -> None:
        self.path = Path(f"{prefix}.journal.partial")
        self.plan: dict[str, Any] = json.loads(json.dumps(plan))

    def exists(self) -> bool:
        return self.path.exists()

    def read(self) -> tuple[dict[str, Any] | None, Reached | None]:
        """The plan that is written there and how far it came; None where that cannot be read."""
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return None, None
        found: list[dict[str, Any]] = []
        for line in lines[:-1]:  # behind the last newline nothing stands, or a torn line
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        if not found or found[0].get("version") != VERSION:
            return None, None
        if len(found) == 1:
            return found[0]["plan"], None
        last = found[-1]
        return found[0]["plan"], Reached(last["blocks"], [tuple(output) for output in last["outputs"]])

    def difference(self, other: dict[str, Any]) -> str | None:
        """What differs between this plan and another, in words; None: nothing."""
        for key in sorted(set(self.plan) | set(other)):
            if self.plan.get(key) != other.get(key):
                return key
        return None

    def begin(self) -> None:
        """Write the plan, and forget what stood there."""
        self._write(json.dumps({"version": VERSION, "plan": self.plan}), "wb")

    def cut(self) -> None:
        """Remove a torn line, so that the next one stands alone."""
        content = self.path.read_bytes()
        os.truncate(self.path, content.rfind(b"\n") + 1)

    def add(self, reached: Reached) -> None:
        """Note how far it came; everything up to there must be on disk."""
        self._write(json.dumps({"blocks": reached.blocks, "outputs": reached.outputs}), "ab")

    def remove(self) -> None:
        """It is finished."""
        self.path.unlink(missing_ok=True)

    def _write(self, line: str, mode: str) -> None:
        with open(self.path, mode) as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
