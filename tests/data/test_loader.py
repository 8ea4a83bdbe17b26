"""Micro-batches: the right samples on each rank, and reading ahead that fails and stops cleanly."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.data.loader import Batch, Loader, Shard
from castalia.data.plan import RunPlan, StepSpec, evaluation_spec
from castalia.data.sample import SourcePiece
from castalia.errors import UserError


class Numbers:
    """Sample i is [10 i, 10 i + 1, ...]; numbers from `broken` on cannot be read."""

    def __init__(self, seq_length: int = 4, broken: int = 10**9) -> None:
        self.seq_length, self.broken = seq_length, broken

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, i: int) -> np.ndarray:
        if i >= self.broken:
            raise OSError("disk on fire")
        return np.arange(10 * i, 10 * i + self.seq_length + 1)

    def labels(self, i: int) -> np.ndarray | None:
        return None

    def pieces(self, i: int) -> list[SourcePiece]:
        return [SourcePiece("numbers", i, 0, 3), SourcePiece("numbers", i + 1, 5, self.seq_length - 2)]

    def find(self, prefix: str, sequence: int) -> np.ndarray:
        return np.empty(0, np.int64)


def samples(batches: list[Batch]) -> list[list[int]]:
    return [[int(i) // 10 for i in batch.tokens[:, 0]] for batch in batches]


def test_batch() -> None:
    loader = Loader(Numbers(), RunPlan(2, 4, 9), Shard(), 2)
    (batch,) = loader.batch(loader.plan.at(3))
    assert batch.tokens.tolist() == [[60, 61, 62, 63], [70, 71, 72, 73]]
    assert batch.labels.tolist() == [[61, 62, 63, 64], [71, 72, 73, 74]]
    assert batch.positions.tolist() == [[0, 1, 2, 3]] * 2
    assert {batch.tokens.dtype, batch.labels.dtype, batch.positions.dtype} == {torch.int64}
    assert (batch.doc_ids, batch.extras, batch.num_tokens) == (None, {}, 8)


def test_assignment_is_that_of_gptneox() -> None:
    """Batch 8 on two ranks, micro-batches of 2: rank 1 has the second half of each global micro-batch."""
    spec = StepSpec(1, 8, 8, 4)
    ranks = [Loader(Numbers(), RunPlan(8, 4, 9), Shard(rank, 2), 2) for rank in range(2)]
    assert samples(ranks[0].batch(spec)) == [[8, 9], [12, 13]]
    assert samples(ranks[1].batch(spec)) == [[10, 11], [14, 15]]


@settings(deadline=None, derandomize=True, max_examples=40)
@given(world=st.integers(1, 4), micro=st.integers(1, 3), accumulation=st.integers(1, 3), step=st.integers(0, 9))
def test_layout_does_not_change_a_step(world: int, micro: int, accumulation: int, step: int) -> None:
    plan = RunPlan(world * micro * accumulation, 4, 10)
    spec = plan.at(step)
    seen = []
    for rank in range(world):
        batches = Loader(Numbers(), plan, Shard(rank, world), micro).batch(spec)
        assert len(batches) == accumulation
        seen += [i for micro_batch in samples(batches) for i in micro_batch]
    assert sorted(seen) == list(range(spec.first_sample, spec.first_sample + spec.num_samples))


def test_eod_and_shorter_sequences() -> None:
    loader = Loader(Numbers(8), RunPlan(1, 4, 9), Shard(), 1, eod=12, eod_mask_loss=True)
    (batch,) = loader.batch(loader.plan.at(1))
    assert batch.tokens.tolist() == [[10, 11, 12, 13]]
    assert batch.labels.tolist() == [[11, 12, -100, 14]]
    assert batch.num_tokens == 3


def test_impossible_settings() -> None:
    with pytest.raises(UserError, match="multiple of 4"):
        Loader(Numbers(), RunPlan(6, 4, 9), Shard(0, 2), 2)
    with pytest.raises(UserError, match=r"raise data\.seq_length"):
        Loader(Numbers(4), RunPlan(2, 8, 9), Shard(), 2)
    with pytest.raises(UserError, match="end-of-document"):
        Loader(Numbers(), RunPlan(2, 4, 9), Shard(), 2, eod_mask_loss=True)
    with pytest.raises(ValueError):
        Shard(2, 2)


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "castalia-loader"]


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_stream_equals_batch(prefetch: int) -> None:
    loader = Loader(Numbers(), RunPlan(4, 4, 9), Shard(), 2, prefetch=prefetch)
    streamed = [samples(batches) for batches in loader.stream(2, 9)]
    assert streamed == [samples(loader.batch(loader.plan.at(step))) for step in range(2, 9)]
    assert list(loader.stream(3, 3)) == []
    parts = evaluation_spec(1, 3, 4, 4, continuing=True).parts(4)
    assert [samples(b) for b in loader.stream_specs(parts)] == [
        [[12, 13], [14, 15]],
        [[16, 17], [18, 19]],
        [[20, 21], [22, 23]],
    ]
    assert loader_threads() == []


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_an_error_surfaces_where_it_belongs(prefetch: int) -> None:
    loader = Loader(Numbers(broken=8), RunPlan(4, 4, 9), Shard(), 2, prefetch=prefetch)
    stream = loader.stream(0, 9)
    assert samples(next(stream)) == [[0, 1], [2, 3]]
    assert samples(next(stream)) == [[4, 5], [6, 7]]
    with pytest.raises(OSError, match="disk on fire"):
        next(stream)
    assert loader_threads() == []


def test_a_step_beyond_the_plan_surfaces() -> None:
    with pytest.raises(IndexError):
        list(Loader(Numbers(), RunPlan(4, 4, 2), Shard(), 2).stream(0, 3))


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_closing_stops_the_thread(prefetch: int) -> None:
    stream = Loader(Numbers(), RunPlan(4, 4, 1000), Shard(), 2, prefetch=prefetch).stream(0, 1000)
    next(stream)
    assert len(loader_threads()) == min(prefetch, 1)
    stream.close()
    assert loader_threads() == []


def test_to_moves_every_tensor() -> None:
    batch = Batch(*(torch.zeros(1, 2, dtype=torch.int64) for _ in range(3)), extras={"reward": torch.ones(1), "x": 1})
    moved = batch.to("meta")
    assert {t.device.type for t in (moved.tokens, moved.labels, moved.positions, moved.extras["reward"])} == {"meta"}
    assert moved.extras["x"] == 1 and moved.doc_ids is None


def test_ids_beyond_the_vocabulary_are_named():
    class Samples:
        seq_length = 4

        def __len__(self):
            return 4

        def __getitem__(self, i):
            return np.array([1, 2, 3, 4, 99 if i == 2 else 5])

        def labels(self, i):
            return None

    loader = Loader(Samples(), RunPlan(4, 4, 1), Shard(), 2, vocab_size=50)
    with pytest.raises(UserError, match=r"sample 2 .*id 99, .*50"):
        loader.batch(loader.plan.at(0))
    assert len(Loader(Samples(), RunPlan(4, 4, 1), Shard(), 2, vocab_size=100).batch(loader.plan.at(0))) == 2


def test_documents_are_told_apart_by_where_they_lie() -> None:
    (batch,) = Loader(Numbers(), RunPlan(2, 4, 9), Shard(), 2, document_mask=True).batch(StepSpec(0, 0, 2, 4))
    assert batch.doc_ids is not None and batch.doc_ids.dtype == torch.int32
    assert batch.doc_ids.tolist() == [[0, 0, 0, 1]] * 2
    assert batch.positions.tolist() == [[0, 1, 2, 0]] * 2
    (short,) = Loader(Numbers(), RunPlan(1, 2, 9), Shard(), 1, document_mask=True).batch(StepSpec(0, 0, 1, 2))
    assert short.positions.tolist() == [[0, 1]]


def test_labels_of_the_data_set_are_shifted() -> None:
    class Labelled(Numbers):
        def labels(self, i: int) -> np.ndarray | None:
            return np.array([7, -100, 12, -1, 14]) if i == 1 else None

    (batch,) = Loader(Labelled(), RunPlan(2, 4, 9), Shard(), 2, vocab_size=50).batch(StepSpec(0, 0, 2, 4))
    assert batch.labels.tolist() == [[1, 2, 3, 4], [-100, 12, -100, 14]]
    with pytest.raises(UserError, match=r"id 14, but model\.vocab_size is 14"):
        Loader(Labelled(), RunPlan(1, 4, 9), Shard(), 1, vocab_size=14).batch(StepSpec(0, 1, 1, 4))
