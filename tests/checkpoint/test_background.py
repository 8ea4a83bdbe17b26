"""A copy that stays as it was while the tensors go on, and one job at a time over it."""

from __future__ import annotations

import threading

import pytest
import torch

from castalia.checkpoint import Background, Piece


def test_the_copy_is_of_the_moment_and_its_buffers_are_reused() -> None:
    background: Background[float] = Background()
    flat = torch.ones(12)
    go = threading.Event()

    def total(held: dict) -> float:
        assert go.wait(20)
        return float(held["a"].sum() + held["b"].local.sum())

    tensors = {"a": flat[:4].view(2, 2), "b": Piece(flat[4:8], (8,), (4,))}
    background.start(tensors, total)
    assert background.busy and background.poll() is None
    with pytest.raises(RuntimeError, match="one job at a time"):
        background.start(tensors, total)
    flat.fill_(7.0)
    go.set()
    assert background.wait() == 8.0, "what was copied, not what became of it"
    assert background.wait() is None and background.poll() is None, "each result once"
    first = background.copied(tensors)
    flat.fill_(3.0)
    second = background.copied(tensors)
    assert first["a"].data_ptr() == second["a"].data_ptr() and first["a"].tolist() == [[3.0, 3.0]] * 2
    piece = second["b"]
    assert isinstance(piece, Piece) and (piece.shape, piece.offset) == ((8,), (4,))
    assert background.copied({"c": torch.ones(2, dtype=torch.bfloat16)})["c"].dtype == torch.bfloat16
    background.close()


def test_what_a_job_raises_is_raised_where_it_is_asked_for() -> None:
    background: Background[None] = Background()

    def fails(_: object) -> None:
        raise ValueError("in the thread")

    background.start({"a": torch.ones(1)}, fails)
    with pytest.raises(ValueError, match="in the thread"):
        background.wait()
    assert background.wait() is None
    background.close()
