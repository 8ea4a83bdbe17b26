"""Lengths by step: GPT-NeoX's schedules worked out by hand, its block translated, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from castalia.config.curriculum import row_tokens, sequence_length
from castalia.config.gptneox_curriculum import CURRICULUM_RULES
from castalia.config.gptneox_given import Given
from castalia.config.schema import DataConfig
from castalia.config.yaml12 import Origin
from castalia.errors import UserError


def lengths(steps: int, **values) -> list[int]:
    data = DataConfig(seq_length=64, **values)
    return [sequence_length(data, step) for step in range(steps)]


def test_schedules() -> None:
    assert lengths(3) == [64, 64, 64]
    rising = {"curriculum_start": 8, "curriculum_steps": 7}
    # floor(n / 7 * 56 + 8), down to a multiple of 8, n from 1 on
    assert lengths(9, curriculum="linear", **rising) == [16, 24, 32, 40, 48, 56, 64, 64, 64]
    # floor(sqrt(n / 4) * 48 + 16): 40, 49, 57, 64
    root = {"curriculum_start": 16, "curriculum_steps": 4, "curriculum_multiple": 4}
    assert lengths(5, curriculum="root", **root) == [40, 48, 56, 64, 64]
    table = {"curriculum_lengths": [8, 20, 64], "curriculum_until": [2, 3]}
    assert lengths(5, curriculum="discrete", **table) == [8, 8, 20, 64, 64]
    # An end that is no multiple is reached once the rise is past the next one; beyond seq_length nothing is cut.
    assert lengths(9, curriculum="linear", curriculum_end=60, curriculum_start=8, curriculum_steps=4)[3:6] == [
        56,
        60,
        60,
    ]
    assert lengths(4, curriculum="linear", curriculum_end=128, curriculum_start=8, curriculum_steps=4) == [
        32,
        64,
        64,
        64,
    ]


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 50), st.integers(1, 20), st.integers(1, 4))
def test_lengths_rise_within_bounds(start: int, more: int, steps: int, multiple: int, root: int) -> None:
    start = max(start, multiple)
    data = DataConfig(
        seq_length=start + more, curriculum="root", curriculum_start=start, curriculum_steps=steps,
        curriculum_multiple=multiple, curriculum_root=root,
    )  # fmt: skip
    found = [sequence_length(data, step) for step in range(3 * steps + 400)]
    assert row_tokens(data, len(found)) == sum(found) and row_tokens(data, 3) == sum(found[:3])
    assert found == sorted(found) and found[0] > 0 and start - multiple < found[0] and found[-1] <= data.seq_length


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"curriculum": "linear"}, "curriculum_steps"),
        ({"curriculum": "root", "curriculum_steps": 4, "curriculum_start": 4}, "must lie between"),
        ({"curriculum": "root", "curriculum_steps": 4, "curriculum_start": 999}, "must lie between"),
        ({"curriculum": "discrete"}, "curriculum_lengths"),
        ({"curriculum": "discrete", "curriculum_lengths": [8, 4], "curriculum_until": [1]}, "ascending"),
        ({"curriculum": "discrete", "curriculum_lengths": [4, 8, 9], "curriculum_until": [3, 3]}, "ascending steps"),
    ],
)
def test_what_makes_no_curriculum(values: dict, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        DataConfig(seq_length=64, **values)


def translated(block: dict) -> dict:
    where = {"curriculum_learning": Origin("file.yml")}
    theirs = Given({"curriculum_learning": block}, where)
    return {r.ours: value for r in CURRICULUM_RULES if (value := r.value(theirs)) is not None}


LINEAR = {
    "enabled": True, "curriculum_type": "seqlen", "min_difficulty": 8, "max_difficulty": 64,
    "schedule_type": "fixed_linear", "schedule_config": {"total_curriculum_step": 7, "difficulty_step": 8},
}  # fmt: skip


def test_their_block() -> None:
    assert translated({"enabled": False, "min_difficulty": 3}) == {} == translated({})
    values = {"data.curriculum": "linear", "data.curriculum_start": 8, "data.curriculum_end": 64}
    values |= {"data.curriculum_steps": 7, "data.curriculum_multiple": 8}
    assert translated(LINEAR) == values
    config = LINEAR["schedule_config"] | {"root_degree": 3}
    root = translated(LINEAR | {"schedule_type": "fixed_root", "schedule_config": config})
    assert root == values | {"data.curriculum": "root", "data.curriculum_root": 3}
    table = {"difficulty": [8, 16, 64], "max_step": [5, 9]}
    assert translated(LINEAR | {"schedule_type": "fixed_discrete", "schedule_config": table}) == {
        "data.curriculum": "discrete", "data.curriculum_lengths": [8, 16, 64], "data.curriculum_until": [5, 9],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"difficulty": 3}, "unknown entry 'difficulty'"),
        ({"curriculum_type": "loss"}, "seqlen"),
        ({"schedule_type": "custom"}, "must have a schedule_type"),
        ({"schedule_config": 3}, "must have a schedule_type"),
        ({"schedule_type": ["fixed_linear"]}, "must have a schedule_type"),
        ({3: 4}, "unknown entry '3'"),
        ({"schedule_config": {"total_curriculum_step": 7}}, "whole numbers"),
        ({"schedule_config": {"total_curriculum_step": 7, "difficulty_step": 8, "x": 1}}, "unknown entry 'x'"),
        ({"min_difficulty": 65}, "must lie between"),
        ({"min_difficulty": 4}, "must lie between"),
        ({"schedule_type": "fixed_discrete", "schedule_config": {"difficulty": [1], "max_step": [1]}}, "one shorter"),
    ],
)
def test_their_block_refused(more: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        translated(LINEAR | more)
