"""Samples: the ids are those that the order points at; labels are shifted and masked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.data.blend import blend_requests
from castalia.data.loader import Loader, Shard
from castalia.data.plan import RunPlan
from castalia.data.sample import BlendedDataset, PackedDataset, labels_of
from castalia.data.store import StoreWriter, TokenStore
from castalia.errors import UserError


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    """Ten documents; id = 100 x document + position, so that every id says where it lies."""
    with StoreWriter(tmp_path / "ds", "u2") as writer:
        for d, size in enumerate([5, 1, 9, 30, 2, 17, 8, 4, 12, 3]):
            writer.add_document(np.arange(size) + 100 * d)
        writer.finish()
    return TokenStore(tmp_path / "ds")


def test_samples_are_the_ids_that_the_order_names(store: TokenStore) -> None:
    data = PackedDataset(store, (0, 9), 40, 8, 1234)
    assert len(data) == 42
    for i in range(len(data)):
        ids = data[i]
        assert ids.dtype == np.int64 and ids.shape == (9,)
        assert ids.tolist() == [100 * seq + offset + k for seq, offset, n in data.order.locate(i) for k in range(n)]
    # Sample 3 served is stream sample 0 (golden shuffle_idx), the beginning of document 8.
    assert data[3].tolist() == [800, 801, 802, 803, 804, 805, 806, 807, 808]
    assert data[0].tolist() == [808, 809, 810, 811, 800, 801, 802, 803, 804]


def test_beyond_the_end_is_an_error(store: TokenStore) -> None:
    data = PackedDataset(store, (0, 9), 40, 8, 1234)
    with pytest.raises(UserError, match="sample 42"):
        data[42]


def test_blend(store: TokenStore) -> None:
    weights = [1.0, 3.0]
    requests = blend_requests(weights, 20)
    parts = [PackedDataset(store, span, n, 8, 7) for span, n in zip([(0, 5), (5, 10)], requests, strict=True)]
    blend = BlendedDataset(parts, weights, 20)
    assert len(blend) == 20
    seen = [0, 0]
    for n in range(20):
        which = blend.blend.at(n)[0]
        assert blend[n].tolist() == parts[which][seen[which]].tolist()
        seen[which] += 1
    assert seen == [5, 15]
    with pytest.raises(UserError, match="the blend holds 20"):
        blend[20]
    with pytest.raises(UserError, match="one weight for each"):
        BlendedDataset(parts, [1.0], 20)


def test_labels_mask_where_the_input_is_eod() -> None:
    ids = np.array([[3, 0, 4, 0, 5]])
    assert labels_of(ids).tolist() == [[0, 4, 0, 5]]
    assert labels_of(ids, eod=0).tolist() == [[0, -100, 0, -100]]
    assert ids.tolist() == [[3, 0, 4, 0, 5]]


@pytest.mark.parametrize("order", ["gptneox", "permutation"])
def test_pieces_and_find_are_inverse(store: TokenStore, order: str) -> None:
    parts = [PackedDataset(store, span, n, 8, 7, order) for span, n in (((0, 5), 30), ((5, 10), 30))]
    for source in (parts[0], BlendedDataset(parts, [1.0, 2.0], 20)):
        seen = {d: [] for d in range(10)}
        for i in range(len(source)):
            ids = [100 * p.sequence + p.offset + k for p in source.pieces(i) for k in range(p.length)]
            assert source[i].tolist() == ids and source.labels(i) is None
            for sequence in {p.sequence for p in source.pieces(i)}:
                seen[sequence].append(i)
        assert {d: source.find(store.prefix, d).tolist() for d in range(10)} == seen
        assert source.find("elsewhere", 0).size == 0


def test_labels_in_lock_step(store: TokenStore, tmp_path: Path) -> None:
    for name, drop in (("good", 0), ("bad", 3)):
        with StoreWriter(tmp_path / name, "i4") as writer:
            for d, size in enumerate(store.sizes.tolist()):
                ids = np.arange(size - (drop if d == 6 else 0)) + 100 * d
                writer.add_document(np.where(ids % 2 == 0, ids, -100))
            writer.finish()
    data = PackedDataset(store, (0, 9), 40, 8, 1234, labels=TokenStore(tmp_path / "good"))
    for i in range(len(data)):
        assert data.labels(i).tolist() == [n if n % 2 == 0 else -100 for n in data[i].tolist()]
    with pytest.raises(UserError, match="5 labels in document 6, where .* has 8 ids"):
        PackedDataset(store, (0, 9), 40, 8, 1234, labels=TokenStore(tmp_path / "bad"))


@pytest.mark.parametrize("documents", [(0, 10), (2, 7), np.array([1, 4])])
def test_tokens_that_take_part(store: TokenStore, documents: tuple[int, int] | np.ndarray) -> None:
    numbers = range(*documents) if isinstance(documents, tuple) else documents
    assert PackedDataset(store, documents, 3, 8, 1).num_tokens == sum(int(store.sizes[d]) for d in numbers)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(world=st.sampled_from([1, 2, 4]), micro=st.sampled_from([1, 2]), step=st.integers(0, 4))
def test_layout_changes_neither_ids_nor_labels_nor_documents(
    tmp_path_factory: pytest.TempPathFactory, world: int, micro: int, step: int
) -> None:
    prefix = tmp_path_factory.getbasetemp() / "layouts"
    for name in ("", "-labels"):
        if not Path(f"{prefix}{name}.idx").exists():
            with StoreWriter(f"{prefix}{name}", "i4") as writer:
                for d, size in enumerate([5, 1, 9, 30, 2, 17]):
                    writer.add_document(np.arange(size) + 100 * d if not name or d % 2 else np.full(size, -100))
                writer.finish()
    stores = TokenStore(prefix), TokenStore(f"{prefix}-labels")
    parts = [PackedDataset(stores[0], (0, 6), 40, 8, seed, "permutation", stores[1]) for seed in (1, 2)]
    plan = RunPlan(8, 8, 5)
    source = BlendedDataset(parts, [1.0, 3.0], plan.num_samples)

    def rows(world: int, micro: int) -> list[tuple[list[int], ...]]:
        found = []
        for rank in range(world):
            for b in Loader(source, plan, Shard(rank, world), micro, document_mask=True).batch(plan.at(step)):
                assert b.sample_ids is not None and b.doc_ids is not None
                columns = (b.sample_ids[:, None], b.tokens, b.labels, b.doc_ids, b.positions)
                found += list(zip(*(column.tolist() for column in columns), strict=True))
        return sorted(found)

    assert rows(world, micro) == rows(1, 8)
