"""GPT-NeoX's keys of checkpoints: where copies go, how large a piece is, and logits to compare."""

from __future__ import annotations

from typing import Any

import pytest

from castalia.config import notes
from castalia.errors import UserError


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"path": None, "chunk_size": 100 << 20, "validate_forward": False}),
        ({"s3_path": "s3://b/dir/"}, {"path": "s3://b/dir"}),
        ({"s3_path": "s3://b/dir", "save": "out/run1/", "extra_save_iters": [2]}, {"path": "s3://b/dir/run1"}),
        ({"s3_path": "b", "s3_chunk_size": 8 << 20}, {"path": "s3://b", "chunk_size": 8 << 20}),
        ({"checkpoint_validation_with_forward_pass": True}, {"validate_forward": True}),
    ],
)
def test_what_they_become(translated, given: dict[str, Any], expected: dict[str, Any]) -> None:
    checkpoint = translated(**given).checkpoint
    assert {key: getattr(checkpoint, key) for key in expected} == expected


def test_a_piece_is_of_no_use_without_a_place(translated) -> None:
    config = translated(s3_chunk_size=8 << 20)
    assert config.checkpoint.chunk_size == 100 << 20 and any("used only with s3_path" in n for n in notes(config))
    with pytest.raises(UserError, match="chunk_size"):
        translated(s3_path="s3://b", s3_chunk_size=1000)


def test_a_step_of_the_run_s_own_folder_is_a_flag(translated) -> None:
    with pytest.raises(UserError, match="go back once, with `castalia train --step 7`"):
        translated(save="out", load="out", iteration=7, extra_save_iters=[2])
