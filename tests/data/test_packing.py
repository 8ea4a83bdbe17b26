"""Samples of whole documents: which documents, in which order, and that padding is never learnt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.data.loader import Loader, Shard
from castalia.data.packing import DocumentOrder
from castalia.data.plan import RunPlan
from castalia.data.sample import BlendedDataset, PackedDataset
from castalia.data.store import StoreWriter, TokenStore
from castalia.errors import UserError

PACKINGS, ORDERS = ("pack_until_overflow", "unpacked"), ("gptneox", "permutation")
SIZES = st.lists(st.integers(0, 14), min_size=1, max_size=30).filter(any)


def stores(folder: Path, sizes: Sequence[int], learnt: Sequence[bool] | None = None) -> tuple[TokenStore, TokenStore]:
    """Documents whose ids say where they lie, 100 x document + place, and their labels: all, or none of a document."""
    for name in ("ids", "labels"):
        with StoreWriter(folder / name, "i4") as writer:
            for d, size in enumerate(sizes):
                masked = name == "labels" and learnt is not None and not learnt[d]
                writer.add_document(np.full(size, -100) if masked else np.arange(size) + 100 * d)
            writer.finish()
    return TokenStore(folder / "ids"), TokenStore(folder / "labels")


def packs_of_gptneox(sizes, learnt, num_packs, room, seed, allow_chopped):
    """Its `pack_until_overflow`, one document after the other; without the token that it adds from the next pack."""
    random = np.random.RandomState(seed)
    served = np.arange(num_packs)
    random.shuffle(served)
    turn = np.arange(len(sizes))
    packs, length = [], 0
    while len(packs) <= num_packs:
        random.shuffle(turn)
        for d in turn.tolist():
            if sizes[d] == 0 or not learnt[d] or (not allow_chopped and sizes[d] > room):
                continue
            if not packs or length + sizes[d] > room:
                packs.append([])
                length = 0
            packs[-1].append(d)
            length += sizes[d]
    return [packs[k] for k in served]


@settings(deadline=None, derandomize=True, max_examples=40)
@given(sizes=SIZES, chopped=st.booleans(), num=st.integers(1, 40), seed=st.integers(0, 99), masked=st.integers(0, 29))
def test_packs_are_those_of_a_loop_over_documents(tmp_path_factory, sizes, chopped, num, seed, masked) -> None:
    sizes = [*sizes, 3]  # one that can always be used
    learnt = [d != masked for d in range(len(sizes) - 1)] + [True]
    store, labels = stores(tmp_path_factory.mktemp("packs"), sizes, learnt)
    everything = (0, len(sizes))
    order = DocumentOrder(store, everything, num, 8, seed, "gptneox", "pack_until_overflow", chopped, labels)
    expected = packs_of_gptneox(sizes, learnt, num, 9, seed, chopped)
    assert [[p.sequence for p in order.locate(i)] for i in range(len(order))] == expected


def test_unpacked_order_is_gptneox_s(tmp_path: Path) -> None:
    store, labels = stores(tmp_path, [3, 20, 4, 0, 5], [True, True, False, True, True])
    order = DocumentOrder(store, (0, 5), 7, 8, 1234, "gptneox", "unpacked", True, labels)
    served = np.arange(7)
    np.random.RandomState(1234).shuffle(served)
    assert [order.locate(i) for i in range(7)] == [
        [(d, 0, min(n, 9))] for d, n in (((0, 3), (1, 20), (4, 5))[k % 3] for k in served)
    ]
    short = DocumentOrder(store, (0, 5), 7, 8, 1234, "gptneox", "unpacked", False, labels)
    assert {order_piece.sequence for i in range(7) for order_piece in short.locate(i)} == {0, 4}


@settings(deadline=None, derandomize=True, max_examples=40)
@given(sizes=SIZES, packing=st.sampled_from(PACKINGS), order=st.sampled_from(ORDERS), span=st.integers(0, 5))
def test_an_epoch_has_every_document_once_and_cuts_none_that_fits(
    tmp_path_factory, sizes, packing, order, span
) -> None:
    store, _ = stores(tmp_path_factory.mktemp("epoch"), [7, *sizes])
    low = min(span, len(sizes))
    everything = [d for d in range(low, len(sizes) + 1) if store.sizes[d] > 0]
    if not everything:
        return
    number = DocumentOrder(store, (low, len(sizes) + 1), 1, 8, 7, "permutation", packing).num_packs
    # In GPT-NeoX's order, packs go over from one round to the next: a round is its first documents.
    order_ = DocumentOrder(store, (low, len(sizes) + 1), 3 * number + 3, 8, 7, order, packing)
    data = PackedDataset(store, (low, len(sizes) + 1), 3 * number + 3, 8, 7, order, packing=packing)
    if order == "permutation" or packing == "unpacked":
        samples = range(number) if order == "permutation" else np.flatnonzero(order_.shuffle_idx < number).tolist()
        assert sorted(p.sequence for i in samples for p in data.pieces(i)) == everything
    else:
        rounds = order_.doc_idx[: len(order_.doc_idx) // len(everything) * len(everything)]
        assert (np.sort(rounds.reshape(-1, len(everything)), axis=1) == everything).all()
        assert sorted(order_.shuffle_idx.tolist()) == list(range(len(data)))
    for i in range(len(data)):
        ids, labels, pieces = data[i], data.labels(i), data.pieces(i)
        filled = sum(p.length for p in pieces)
        assert 0 < filled <= 9 and ids.shape == (9,) and not ids[filled:].any()
        for p in pieces:
            assert p.offset == 0 and p.length == min(9, store.sizes[p.sequence])
        assert ids[:filled].tolist() == [100 * p.sequence + k for p in pieces for k in range(p.length)]
        if filled == 9:
            assert labels is None
        else:
            assert labels.tolist() == [*ids[:filled].tolist(), *[-100] * (9 - filled)]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("order", ORDERS)
def test_pieces_and_find_are_inverse(tmp_path: Path, packing: str, order: str) -> None:
    store, _ = stores(tmp_path, [5, 1, 9, 30, 2, 17, 8, 4, 0, 3])
    parts = [PackedDataset(store, span, 21, 8, 7, order, packing=packing) for span in ((0, 5), (5, 10))]
    for source in (parts[0], BlendedDataset(parts, [1.0, 2.0], 20)):
        seen: dict[int, list[int]] = {d: [] for d in range(10)}
        for i in range(len(source)):
            for sequence in {p.sequence for p in source.pieces(i)}:
                seen[sequence].append(i)
        assert {d: source.find(store.prefix, d).tolist() for d in range(10)} == seen
        assert source.find("elsewhere", 0).size == 0


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    packing=st.sampled_from(PACKINGS),
    order=st.sampled_from(ORDERS),
    own_labels=st.booleans(),
    world=st.sampled_from([1, 2, 4]),
    micro=st.sampled_from([1, 2]),
    step=st.integers(0, 4),
)
def test_padding_is_never_learnt_on_any_layout(
    tmp_path_factory, packing, order, own_labels, world, micro, step
) -> None:
    folder = tmp_path_factory.mktemp("layouts")
    store, labels = stores(folder, [5, 1, 9, 30, 2, 17], [True, False, True, True, False, True])
    plan = RunPlan(8, 8, 5)
    learnt = labels if own_labels else None
    parts = [PackedDataset(store, (0, 6), 42, 8, seed, order, learnt, packing) for seed in (1, 2)]
    source = BlendedDataset(parts, [1.0, 3.0], plan.num_samples)

    def rows(world: int, micro: int) -> list[tuple[list[int], ...]]:
        found = []
        for rank in range(world):
            for b in Loader(source, plan, Shard(rank, world), micro, document_mask=True).batch(plan.at(step)):
                assert b.sample_ids is not None and b.doc_ids is not None
                columns = (b.sample_ids[:, None], b.tokens, b.labels, b.doc_ids, b.positions)
                found += list(zip(*(column.tolist() for column in columns), strict=True))
        return sorted(found)

    mine = rows(world, micro)
    assert mine == rows(1, 8)
    for (number,), tokens, row, documents, positions in mine:
        pieces = source.pieces(number)
        filled = sum(p.length for p in pieces)
        assert row[max(0, filled - 1) :] == [-100] * (8 - max(0, filled - 1))
        masked = {p.sequence for p in pieces} & {1, 4} if own_labels else set()
        if packing == "unpacked":
            assert not masked  # nothing of it is learnt, so it is no sample
        assert tokens[filled:] == [0] * (8 - filled)
        # Padding is a document of its own, which nothing real attends to.
        assert set(documents[:filled]).isdisjoint(documents[filled:])
        assert documents[filled:] == [len(pieces)] * (8 - filled) and positions[filled:] == list(range(8 - filled))


def test_a_longer_run_of_a_permutation_begins_as_the_shorter_one(tmp_path: Path) -> None:
    store, _ = stores(tmp_path, [5, 1, 9, 30, 2, 17, 8, 4, 0, 3])
    for packing in PACKINGS:
        short, long = (DocumentOrder(store, (0, 10), n, 8, 7, "permutation", packing) for n in (9, 60))
        assert [short.locate(i) for i in range(9)] == [long.locate(i) for i in range(9)]


def test_large_packs_are_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("castalia.data.packing._SHARED_FROM", 1)
    store, labels = stores(tmp_path, [5, 1, 9, 30, 2, 17], [True, True, False, True, True, True])
    for order in ORDERS:
        for packing in PACKINGS:
            for own in (None, labels):
                arguments = (store, (0, 6), 20, 8, 3, order, packing, True, own)
                made, read = DocumentOrder(*arguments), DocumentOrder(*arguments)
                monkeypatch.setattr("castalia.data.packing._SHARED_FROM", 10**9)
                alone = DocumentOrder(*arguments)
                monkeypatch.setattr("castalia.data.packing._SHARED_FROM", 1)
                expected = [alone.locate(i) for i in range(20)]
                assert [made.locate(i) for i in range(20)] == [read.locate(i) for i in range(20)] == expected
    assert len([*(tmp_path / "cache" / "castalia" / "orders").glob("*/key.json")]) == 8


def test_labels_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("castalia.data.packing._PART", 64)
    learnt = [d % 3 != 0 for d in range(200)]
    store, labels = stores(tmp_path, [d % 11 for d in range(200)], learnt)
    order = DocumentOrder(store, (5, 190), 10, 8, 3, "permutation", "unpacked", True, labels)
    assert order.doc_idx.tolist() == [d for d in range(5, 190) if learnt[d] and d % 11]


def test_what_leaves_no_document_is_refused(tmp_path: Path) -> None:
    store, labels = stores(tmp_path, [12, 0], [False, True])
    for more in ({"allow_chopped": False}, {"labels": labels}):
        with pytest.raises(UserError, match="none of the 2 documents"):
            DocumentOrder(store, (0, 2), 3, 8, 1, **more)
    with pytest.raises(UserError, match="sample 3 was asked for, but the data order holds 3"):
        PackedDataset(store, (0, 1), 3, 8, 1, packing="unpacked")[3]


def test_how_often_documents_are_read(tmp_path: Path) -> None:
    store, _ = stores(tmp_path, [4, 5, 9, 20])
    assert PackedDataset(store, (0, 4), 8, 8, 1, packing="unpacked").times_read(8) == 2
    assert PackedDataset(store, (0, 4), 8, 8, 1, "permutation", packing="pack_until_overflow").times_read(6) == 2
    assert PackedDataset(store, (0, 4), 8, 8, 1).times_read(19) == 4


def test_only_labels_that_a_sample_holds_count(tmp_path: Path) -> None:
    """GPT-NeoX looks at L labels of an unpacked document, else at L + 1; what is cut off counts in neither."""
    store, _ = stores(tmp_path, [12, 12, 12])
    with StoreWriter(tmp_path / "late", "i4") as writer:
        for at in (7, 8, 9):
            writer.add_document(np.where(np.arange(12) == at, 5, -100))
        writer.finish()
    labels = TokenStore(tmp_path / "late")
    for packing, kept in (("unpacked", [0]), ("pack_until_overflow", [0, 1])):
        order = DocumentOrder(store, (0, 3), 3, 8, 1, "permutation", packing, True, labels)
        assert order.doc_idx.tolist() == kept
