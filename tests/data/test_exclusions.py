"""Lists of excluded documents: what is written is read again, and every mistake is named with its line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from castalia.data.exclusions import check_exclusions, load_exclusions, save_exclusions
from castalia.errors import UserError


@settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(["a", "data/b c", "/d/e-1"]),
        st.lists(st.one_of(st.integers(0, 20), st.integers(0, 2**40)), max_size=30),
    )
)
def test_round_trip(tmp_path: Path, numbers: dict[str, list[int]]) -> None:
    save_exclusions(tmp_path / "list.txt", {p: np.array(n, np.int64) for p, n in numbers.items()}, "why\nand who")
    found = load_exclusions(tmp_path / "list.txt")
    assert {p: n.tolist() for p, n in found.items()} == {p: sorted(set(n)) for p, n in numbers.items()}
    assert list(tmp_path.iterdir()) == [tmp_path / "list.txt"]


def test_a_list_written_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("castalia-exclusions 1\n\n# why\nprefix a\n 7\n3-5\n4\nprefix b\n0\nprefix a\n9 - 10\n")
    assert {p: n.tolist() for p, n in load_exclusions(path).items()} == {"a": [3, 4, 5, 7, 9, 10], "b": [0]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "begins with ''"),
        ("castalia-exclusions 2\n", "begins with 'castalia-exclusions 2'"),
        ("castalia-exclusions 1\n4\n", "line 2: put a line 'prefix PATH'"),
        ("castalia-exclusions 1\nprefix a\n5-3\n", "line 3: '5-3' is no document number"),
        ("castalia-exclusions 1\nprefix a\n-3\n", "line 3: '-3' is no"),
        ("castalia-exclusions 1\nprefix a\nseven\n", "line 3: 'seven' is no"),
        ("castalia-exclusions 1\nprefix a\n1-\n", "line 3: '1-' is no"),
        ("castalia-exclusions 1\nprefix a\n²\n", "line 3: '²' is no"),
        ("castalia-exclusions 1\nprefix\n", "line 2: 'prefix' is no"),
        ("castalia-exclusions 1\nprefix a\n0-999999999999\n", "line 3: more than"),
        ("castalia-exclusions 1\nprefix a\n" + "9" * 5000, "line 3: '999"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "list.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"list\.txt") as caught:
        load_exclusions(tmp_path / "list.txt")
    assert words in str(caught.value)


def test_what_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "list.txt", tmp_path / "none.txt", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            load_exclusions(path)


def test_a_list_is_held_against_the_run() -> None:
    numbers = np.array([1, 4])
    check_exclusions({"a": numbers}, {"a": 5, "b": 1}, "list.txt")
    with pytest.raises(UserError, match="document 4 of a, which has 4"):
        check_exclusions({"a": numbers}, {"a": 4}, "list.txt")
    with pytest.raises(UserError, match="which this run does not read"):
        check_exclusions({"c": numbers}, {"a": 4}, "list.txt")
