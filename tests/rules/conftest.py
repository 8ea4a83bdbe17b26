"""What the rules look at: the source tree as text."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's folder."""
    return ROOT


@pytest.fixture(scope="session")
def sources() -> dict[str, str]:
    """Every file of the package, as {"castalia/data/store.py": its text}."""
    base = ROOT / "src"
    files = sorted((base / "castalia").rglob("*.py"))
    return {f.relative_to(base).as_posix(): f.read_text(encoding="utf-8") for f in files}
