"""Damaged indices by the hundred; `python -m castalia.tools.certify index_mutations` does ten thousand."""

from __future__ import annotations

from pathlib import Path

import pytest

from castalia.data.store import TokenStore
from castalia.errors import CheckFailed
from castalia.tools.mutations import mutate_indices


def test_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    result = mutate_indices(tmp_path, 160, seed=1)
    assert result["refused"] > 140 and result["refused_lazily"] > 100


def test_a_reader_that_trusts_its_index_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TokenStore, "_check_entry", lambda self, i: None)
    with pytest.raises(CheckFailed, match="damaged index"):
        mutate_indices(tmp_path, 160, seed=1)
