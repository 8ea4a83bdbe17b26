"""What a step holds depends on the plan and the order alone, not on ranks or micro-batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.data.loader import Loader, Shard
from castalia.data.order import GPTNeoXOrder
from castalia.data.order_permutation import PermutationOrder
from castalia.data.plan import RunPlan
from castalia.data.store import StoreWriter, TokenStore
from castalia.errors import UserError


class Samples:
    """A data set of numbers alone: sample i holds nothing but i."""

    seq_length = 4

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, i: int) -> np.ndarray:
        return np.full(5, i, np.int64)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(world=st.integers(1, 8), micro=st.integers(1, 4), accumulation=st.integers(1, 5), step=st.integers(0, 99))
def test_ranks_share_a_step_out(world: int, micro: int, accumulation: int, step: int) -> None:
    plan = RunPlan(world * micro * accumulation, 4, 100)
    spec = plan.at(step)
    numbers = [Loader(Samples(), plan, Shard(rank, world), micro, 0).sample_numbers(spec) for rank in range(world)]
    assert all(mine.shape == (accumulation, micro) for mine in numbers)
    together = np.sort(np.concatenate(numbers, axis=None))
    assert together.tolist() == list(range(spec.first_sample, spec.first_sample + spec.num_samples))


@pytest.mark.parametrize("kind", [GPTNeoXOrder, PermutationOrder])
def test_both_orders_read_a_store_as_they_read_its_sizes(tmp_path: Path, kind: type) -> None:
    sizes = np.random.RandomState(2).randint(0, 9, 60)
    with StoreWriter(tmp_path / "ds", "u2") as writer:
        writer.add_documents(np.arange(n) for n in sizes)
        writer.finish()
    store = TokenStore(tmp_path / "ds")
    for documents in ((0, 60), (7, 31), (31, 60), np.array([3, 50, 4])):
        by_store, by_sizes = (kind(source, documents, 30, 8, 1) for source in (store, store.sizes))
        assert [by_store.locate(i) for i in range(30)] == [by_sizes.locate(i) for i in range(30)]
        assert by_store.num_epochs == by_sizes.num_epochs


def test_shuffling_everything_needs_a_checked_index(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "ds", "u2") as writer:
        writer.add_documents([[1, 2, 3]] * 50)
        writer.finish()
    content = bytearray((tmp_path / "ds.idx").read_bytes())
    content[34 + 4 * 25] = 2
    (tmp_path / "ds.idx").write_bytes(content)
    with pytest.raises(UserError, match="corrupt"):
        GPTNeoXOrder(TokenStore(tmp_path / "ds", lazy=True), (0, 50), 10, 4, 1)
