"""What every file keeps to: a length to read, an opening that explains it, no path of one machine."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

MAX_LINES = 600
# Folders that are somebody's, not everybody's. Split, so that this file does not break its own rule.
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:home|root|work|Users|tmp|mnt|scratch)" + r"/\w[\w.-]*")
TEXT_FOLDERS = ("src", "tests", "configs", "docs", "benchmarks", ".ci")
TEXT_SUFFIXES = {".py", ".md", ".yml", ".yaml", ".toml", ".txt", ".json", ".jsonl", ".sh", ""}


def long_files(sources: dict[str, str], limit: int = MAX_LINES) -> list[str]:
    """Files with more lines than the limit."""
    counts = {path: len(text.splitlines()) for path, text in sources.items()}
    return [f"{path}: {count} lines" for path, count in counts.items() if count > limit]


def unexplained_files(sources: dict[str, str]) -> list[str]:
    """Files that do not open with a docstring."""
    return [path for path, text in sources.items() if not (ast.get_docstring(ast.parse(text)) or "").strip()]


def machine_paths(texts: dict[str, str]) -> list[str]:
    """Absolute paths that exist on one machine only."""
    return [
        f"{path}:{number}: {match[0]}"
        for path, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        for match in MACHINE_PATH.finditer(line)
    ]


def project_texts(root: Path) -> dict[str, str]:
    """The text files that a person wrote, those at the top included; recorded fixtures are data."""
    files = [f for f in root.iterdir() if f.is_file()]
    for folder in TEXT_FOLDERS:
        files += [f for f in (root / folder).rglob("*") if f.is_file()]
    return {
        f.relative_to(root).as_posix(): f.read_text(encoding="utf-8")
        for f in files
        if f.suffix in TEXT_SUFFIXES
        and not {"__pycache__", "fixtures"} & set(f.parts)
        and not any(part.startswith(".") and part.endswith("_cache") for part in f.parts)
    }


def test_files_are_short_enough_to_read(sources):
    assert long_files(sources) == []


def test_files_open_with_what_they_are(sources):
    assert unexplained_files(sources) == []


def test_no_file_knows_this_machine(root):
    texts = project_texts(root)
    assert "README.md" in texts and "src/castalia/errors.py" in texts
    assert machine_paths(texts) == []


def test_a_long_file_is_seen():
    assert long_files({"a.py": "x = 1\n" * (MAX_LINES + 1), "b.py": "x = 1\n" * MAX_LINES}) == [
        f"a.py: {MAX_LINES + 1} lines"
    ]


def test_an_unexplained_file_is_seen():
    sources = {"a.py": "", "b.py": "# a comment\nx = 1\n", "c.py": '""" """\n', "d.py": '"""What it is."""\n'}
    assert unexplained_files(sources) == ["a.py", "b.py", "c.py"]


@pytest.mark.parametrize("folder", ["home", "root", "work", "Users", "tmp", "scratch"])
def test_a_path_of_one_machine_is_seen(folder):
    path = "/" + folder + "/somebody"
    assert machine_paths({"a.py": f"x = 1\nDATA = '{path}/data'"}) == [f"a.py:2: {path}"]
    assert machine_paths({"a.md": f"see https://example.org{path} and docs{path} and ~{path}"}) == []
