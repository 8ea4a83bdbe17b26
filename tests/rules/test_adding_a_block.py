"""The example of docs/adding_a_block.md does what the page says: it trains, generates and passes its own test."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from castalia.cli import main
from castalia.data.prepare import prepare
from castalia.data.tokenizer import load_tokenizer
from castalia.errors import UserError
from castalia.model.registry import BLOCKS, look_up

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adding_a_block.md"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The page's files, and a little data, in the current folder."""
    blocks = re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert [name for name, _ in blocks] == ["my_parts.py", "my_run.yml", "test_my_parts.py"]
    for name, text in blocks:
        (tmp_path / name).write_text(text)
    text = tmp_path / "text"
    text.mkdir()
    for i in range(40):
        (text / f"{i}.txt").write_text(f"the cat number {i} sat on the mat of the dog number {i * i} and slept " * 5)
    (tmp_path / "data").mkdir()
    prepare([text], tmp_path / "data" / "tokens", load_tokenizer("byte"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [n for n in sys.modules if n.startswith("castalia_user_")]:
        del sys.modules[name]


def losses(out: str) -> list[float]:
    return [float(x) for x in re.findall(r"loss (\d+\.\d+)", out)]


def test_the_page_trains_and_generates(folder, capsys):
    assert (
        main(["train", "my_run.yml", "logging.interval=1", "performance.peak_flops=1e11", "performance.threads=1"]) == 0
    )
    out = capsys.readouterr()
    found = losses(out.out + out.err)
    assert len(found) >= 30 and found[-1] < 0.7 * found[0]
    assert main(["generate", "runs/my-run", "--prompt", "the cat", "--max-tokens", "5"]) == 0


def test_the_pages_own_test_passes(folder):
    namespace: dict[str, object] = {}
    exec(compile((folder / "test_my_parts.py").read_text(), "test_my_parts.py", "exec"), namespace)
    namespace["test_my_block"]()


def test_a_block_that_looks_ahead_fails_the_pages_test(folder):
    parts = (folder / "my_parts.py").read_text()
    (folder / "my_parts.py").write_text(parts.replace("normed = self.norm(x)", "normed = self.norm(x.flip(1))"))
    with pytest.raises(AssertionError):
        test_the_pages_own_test_passes(folder)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.py:Block", "there is no file 'nowhere.py'"),
        ("my_parts.py:Nothing", "has no 'Nothing'"),
        ("nowhere:Block", "cannot be imported"),
        ("transfromer", "is not known; known: transformer, module:attribute, file.py:attribute"),
    ],
)
def test_a_wrong_name_says_so(folder, name, words):
    with pytest.raises(UserError, match=re.escape(words)):
        look_up(BLOCKS, name, "model.block")


def test_a_file_is_run_once(folder):
    one, two = (
        look_up(BLOCKS, name, "model.block") for name in ("my_parts.py:ScaledBlock", "./my_parts.py:ScaledBlock")
    )
    assert one is two
