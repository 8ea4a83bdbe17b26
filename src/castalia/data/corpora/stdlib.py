"""A corpus that every machine has: the Python standard library's own source and help texts.

    stdlib/**/*.py, pydoc's help topics ──> [(name, text)] ──by hash of the name──> train.jsonl, valid.jsonl

For trying things without a network: some megabytes of real text with structure worth
learning. The split is by file and by the hash of its name, so a file stays on its side
whatever else is there, and validation files are unseen in training.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from castalia.errors import UserError

# Left out: other people's packages, and tests, whose data files are not text to learn from.
_EXCLUDED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
_TOPICS = "pydoc_data/topics.py"  # a Python file that holds the language reference as strings


def stdlib_corpus() -> list[tuple[str, str]]:
    """Source files of the running Python's standard library and its help topics, as (name, text).

    Sorted by name; files that are empty, not UTF-8 or equal to an earlier one are left out.

    Raises:
        UserError: this Python came without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: list[tuple[str, str]] = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - _EXCLUDED)
        for file in files:
            path = Path(folder, file)
            name = path.relative_to(root).as_posix()
            if path.suffix != ".py" or name == _TOPICS:
                continue
            try:
                found.append((name, path.read_bytes().decode("utf-8")))
            except (UnicodeDecodeError, OSError):
                continue
    with contextlib.suppress(ImportError):
        from pydoc_data.topics import topics

        found += [(f"topics/{name}", text) for name, text in topics.items()]
    if not found:
        raise UserError(f"this Python has no library sources in {root}: install them, or bring your own text")
    seen: set[str] = set()
    corpus = []
    for name, text in sorted(found):
        if text.strip() and text not in seen:
            seen.add(text)
            corpus.append((name, text))
    return corpus


def split_by_file(
    docs: Iterable[tuple[str, str]], valid_fraction: float = 0.05, seed: int = 0
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Divide (name, text) pairs into training and validation by a hash of seed and name."""
    train: list[tuple[str, str]] = []
    valid: list[tuple[str, str]] = []
    for name, text in docs:
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        position = int.from_bytes(digest[:8], "big") / 2**64
        (valid if position < valid_fraction else train).append((name, text))
    return train, valid


def write_corpus(
    folder: str | os.PathLike[str], valid_fraction: float = 0.05, seed: int = 0
) -> dict[str, dict[str, int]]:
    """Write train.jsonl and valid.jsonl, each whole or not at all.

    Returns:
        For `train` and `valid`: number of `documents` and UTF-8 `bytes` of text.
    """
    summary = {}
    parts = split_by_file(stdlib_corpus(), valid_fraction, seed)
    for part, docs in zip(("train", "valid"), parts, strict=True):
        write_documents(Path(folder) / f"{part}.jsonl", docs)
        summary[part] = {"documents": len(docs), "bytes": sum(len(text.encode()) for _, text in docs)}
    return summary


def write_documents(path: str | os.PathLike[str], docs: Iterable[tuple[str, str]]) -> None:
    """Write (name, text) pairs as a .jsonl file, whole or not at all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{target}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        for name, text in docs:
            file.write(json.dumps({"text": text, "name": name}, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, target)
