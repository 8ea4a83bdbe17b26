"""The generated pages are what the code says, and cover every key."""

import json
from pathlib import Path

import pytest

from castalia.config.fields import fields
from castalia.config.gptneox_keys import KNOWN, REPORTED
from castalia.tools.docs import config_page, keys_page, main, pages

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize("name", pages())
def test_the_committed_page_is_fresh(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == pages()[name], "run `make docs`"


def test_every_key_of_ours_has_a_row() -> None:
    page = config_page()
    for key, info in fields():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{key}` |")]
        assert info.description in row.replace("\\|", "|")


def test_every_key_of_gptneox_has_a_row_with_its_fate() -> None:
    rows = {line.split("`")[1]: line for line in keys_page().splitlines() if line.startswith("| `")}
    assert rows.keys() == KNOWN - {"compat"}
    assert all(
        sum(fate in row for fate in ("translated:", "reported:", "**refused until**")) == 1 for row in rows.values()
    )
    assert "`model.hidden_size`" in rows["hidden_size"]
    assert REPORTED["deepspeed"] in rows["deepspeed"]
    assert "(v2.0 `0.1`)" in rows["hidden_dropout"]


def test_pages_are_written_and_checked(tmp_path, capsys) -> None:
    assert main([str(tmp_path), "--check"]) == 4
    assert not list(tmp_path.iterdir())
    assert main([str(tmp_path)]) == 0
    assert {file.name for file in tmp_path.iterdir()} == pages().keys()
    assert main([str(tmp_path), "--check"]) == 0
    json.loads((tmp_path / "castalia.schema.json").read_text())
    (tmp_path / "config.md").write_text("old")
    assert main([str(tmp_path), "--check"]) == 4
    assert "config.md: is stale" in capsys.readouterr().out
