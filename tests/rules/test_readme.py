"""What README.md tells a newcomer to type works, word for word and in that order.

    README.md ─blocks─> sh lines, python blocks ──run in one temporary folder──> exit code 0

The commands are run as given. Only two things differ from a newcomer's folder: the copies of
configs/ there train a smaller model for a few steps, and CASTALIA_DEMO_SECONDS shortens
`castalia demo`. Lines that begin with `make` are left out, since continuous integration runs
`make test` itself and a test must not set up a second environment. A line that begins with
anything else is an error, so that none is passed over unnoticed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

LEFT_OUT = ("make",)
RUN = ("castalia",)
SMALLER = [
    "data.seq_length=128",
    "model.num_layers=2",
    "model.hidden_size=64",
    "training.steps=4",
    "training.batch_size=4",
    "evaluation.interval=2",
    "evaluation.batches=1",
    "checkpoint.interval=2",
    "logging.interval=1",
]


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The lines of the sh blocks that are to be run.

    Raises:
        ValueError: a line is neither to be run nor known as one that is left out.
    """
    found = []
    for line in "\n".join(blocks(text, "sh")).splitlines():
        word = line.split("#")[0].split()[:1]
        if not word or word[0] in LEFT_OUT:
            continue
        if word[0] not in RUN:
            raise ValueError(f"README.md: '{line}' begins with none of {RUN + LEFT_OUT}: no test would run it")
        found.append(line)
    return found


def run_shell(lines: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the lines in one shell; the first failure ends it."""
    tools = folder / "bin"
    tools.mkdir()
    # The command of the very package that is tested, whether or not its folder is on PATH.
    (tools / "castalia").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m castalia "$@"\n')
    (tools / "castalia").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "CASTALIA_DEMO_SECONDS": "2",
    }
    script = "\n".join(["set -eu", *(f"echo '$ {line}' >&2\n{line}" for line in lines)])
    return subprocess.run(
        ["sh", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def smaller_configs(root: Path, folder: Path) -> None:
    """Copies of configs/*.yml that train in seconds."""
    from castalia.config import load
    from castalia.config.render import to_yaml

    (folder / "configs").mkdir()
    for source in sorted((root / "configs").glob("*.yml")):
        (folder / "configs" / source.name).write_text(to_yaml(load([source], SMALLER)), encoding="utf-8")


def test_the_commands_of_the_readme_run(root, tmp_path):
    # Some 20 seconds: the one test that goes the whole way from text to report as a newcomer does.
    text = (root / "README.md").read_text(encoding="utf-8")
    lines = commands(text)
    for verb in ("corpora", "tokenizer", "prepare", "train", "generate", "report", "plan"):
        assert any(line.startswith(f"castalia {verb} ") for line in lines), verb
    smaller_configs(root, tmp_path)
    done = run_shell(lines, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs" / "demo" / "report.html").stat().st_size > 0
    assert done.stdout.count("def ") >= 1  # the prompt, with what was generated
    for block in blocks(text, "python"):
        done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]


def test_the_links_of_the_pages_lead_somewhere(root):
    assert dead_links(root, ["README.md", "CONTRIBUTING.md", "docs/tour.md"]) == []


def dead_links(root: Path, pages: list[str]) -> list[str]:
    """Relative links and pictures whose file does not exist."""
    found = []
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", (root / page).read_text(encoding="utf-8")):
            if "://" not in target and not ((root / page).parent / target).exists():
                found.append(f"{page}: {target}")
    return found


def test_the_targets_of_make_that_are_named_exist(root):
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    for page in ("README.md", "CONTRIBUTING.md", ".ci/run"):
        named = set(re.findall(r"(?:^|`)make ([a-z]+)", (root / page).read_text(encoding="utf-8"), flags=re.MULTILINE))
        assert named and named <= targets, page


def test_the_right_lines_are_picked():
    first = "```sh\nmake demo\n# a remark\n\ncastalia a b  # why\n```\n"
    text = first + "text\n```python\nx\n```\n```sh\ncastalia c\n```\n"
    assert commands(text) == ["castalia a b  # why", "castalia c"]
    assert blocks(text, "python") == ["x\n"]


def test_a_line_that_nobody_runs_is_seen():
    with pytest.raises(ValueError, match="curl"):
        commands("```sh\ncurl example.org\n```\n")


def test_a_command_that_fails_is_seen(tmp_path):
    done = run_shell(
        ["castalia corpora list", "castalia corpora get nothing --output x", "castalia --version"], tmp_path
    )
    assert done.returncode == 2
    assert "nothing" in done.stderr and "--version" not in done.stderr


def test_a_dead_link_is_seen(tmp_path):
    (tmp_path / "a.md").write_text("[a](a.md) [b](https://example.org) ![c](c.png) [d](a.md#part) [e](e.md#part)")
    assert dead_links(tmp_path, ["a.md"]) == ["a.md: c.png", "a.md: e.md"]
