"""A short form of the campaign against damaged corpora, and proof that it can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from castalia.data.sources import SourceOptions, documents_of, iter_blocks
from castalia.errors import CheckFailed
from castalia.tools.source_faults import TEXTS, read_damaged, read_mutations, valid_files


def test_undamaged_files_are_read(tmp_path: Path) -> None:
    for name, content in valid_files().items():
        (tmp_path / name).write_bytes(content)
        for block_size in (1, 100, 1 << 20):
            blocks = iter_blocks([tmp_path / name], block_size=block_size)
            assert [d.text for block in blocks for d in documents_of(block, SourceOptions())] == TEXTS, name


def test_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    found = read_mutations(tmp_path, 2000)
    assert sum(sum(counts.values()) for counts in found.values()) == 2000
    assert all(counts["refused"] > 20 for counts in found.values())
    assert found["a.jsonl"]["read"] > 20  # without a checksum much damage leaves good text


def test_silence_is_noticed(tmp_path: Path) -> None:
    import gzip

    with pytest.raises(CheckFailed, match="in silence"):
        read_damaged(tmp_path / "a.jsonl.gz", "a.jsonl.gz", gzip.compress(b'"other"\n'))
