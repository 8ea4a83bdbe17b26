"""Fill-in-the-middle: nothing is lost but what falls off the end, each document can be put together again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from castalia.data.fim import FillInMiddle, sentinel_ids
from castalia.data.loader import Loader, Shard
from castalia.data.plan import RunPlan
from castalia.data.sample import BlendedDataset, PackedDataset
from castalia.data.store import StoreWriter, TokenStore
from castalia.data.tokenizer import load_tokenizer
from castalia.errors import UserError

EOD, PRE, SUF, MID = 0, 101, 102, 103


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TokenStore:
    draw = np.random.default_rng(0)
    prefix = tmp_path_factory.mktemp("fim") / "tokens"
    with StoreWriter(prefix, "u2") as writer:
        for _ in range(80):
            writer.add_document([*draw.integers(1, 100, draw.integers(0, 40)).tolist(), EOD])
        writer.finish()
    return TokenStore(prefix)


def packed(store: TokenStore, length: int = 48, **values) -> PackedDataset:
    return PackedDataset(store, (0, len(store)), 60, length, 7, **values)


def filled(dataset, rate: float = 0.7, spm: float = 0.5, seed: int = 3) -> FillInMiddle:
    return FillInMiddle(dataset, rate, spm, (PRE, SUF, MID), EOD, seed)


def put_together(part: list[int]) -> list[int]:
    """The document that a whole part was made of."""
    if part[:1] != [PRE]:
        return part
    end = [EOD] if part[-1] == EOD else []
    text = part[1 : len(part) - len(end)]
    suffix_at, middle_at = text.index(SUF), text.index(MID)
    suffix, rest = text[suffix_at + 1 : middle_at], text[middle_at + 1 :]
    return text[:suffix_at] + rest + suffix + end  # suffix first: the prefix is before the middle already


@settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rate=st.floats(0, 1), spm=st.floats(0, 1), seed=st.integers(0, 2**32 - 1), i=st.integers(0, 50))
@pytest.mark.parametrize("packing", ["packed", "pack_until_overflow", "unpacked"])
def test_ids_are_kept(store: TokenStore, packing: str, rate: float, spm: float, seed: int, i: int) -> None:
    plain = packed(store, packing=packing, order="permutation")
    i %= len(plain)
    made = filled(plain, rate, spm, seed)
    ids, pieces = made[i], made.pieces(i)
    assert ids.shape == (49,) and ids.dtype == np.int64
    at, served = 0, []
    for piece, before in zip(pieces, plain.pieces(i), strict=False):
        part = ids[at : at + piece.length].tolist()
        at += piece.length
        there = store.get(before.sequence, before.offset, before.length).tolist()
        whole = len(part) == before.length + 3 * (part[:1] == [PRE])
        assert whole or at == 49
        if whole:
            assert put_together(part) == there and sorted(i for i in part if i <= 100) == sorted(there)
        served += part
    assert served == ids[:at].tolist() and not ids[at:].any()
    labels = made.labels(i)
    if at == 49:
        assert labels is None
    else:
        assert labels[:at].tolist() == served and (labels[at:] == -100).all() and len(pieces) == len(plain.pieces(i))


def test_rates(store: TokenStore) -> None:
    plain = packed(store)
    none, always = filled(plain, 0.0), filled(plain, 1.0, 0.0)
    assert all((none[i] == plain[i]).all() and none.pieces(i) == plain.pieces(i) for i in range(50))
    starts = [ids[:2].tolist() for ids in (always[i] for i in range(50)) if ids[0] == PRE]
    assert len(starts) > 45  # all but parts that are an end of document alone
    first = filled(plain, 1.0, 1.0)
    assert all(first[i][1] == SUF for i in range(50) if first[i][0] == PRE)
    big = packed(store, 8)
    parts = [part for i in range(60) for part in filled(big, 0.5)._parts(i)]
    share = np.mean([part[0] == PRE for part in parts])
    assert 0.35 < share < 0.65
    suffix_first = np.mean([part[1] == SUF for part in parts if part[0] == PRE and len(part) > 1])
    assert 0.4 < suffix_first < 0.75  # a PSM with an empty prefix begins so too


def test_layout_and_order_of_reading_do_not_matter(store: TokenStore) -> None:
    blend = BlendedDataset([packed(store), packed(store)], [1, 2], 48)
    plan = RunPlan(8, 48, 6)
    rows = []
    for world in (1, 2):
        loaders = [Loader(filled(blend), plan, Shard(r, world), 2, document_mask=True) for r in range(world)]
        found = {}
        for step in reversed(range(6)) if world == 2 else range(6):
            for batch in (batch for loader in loaders for batch in loader.batch(plan.at(step))):
                found |= dict(zip(batch.sample_ids.tolist(), batch.tokens.tolist(), strict=True))
                restarts = batch.positions == 0
                assert (restarts == (batch.doc_ids.diff(dim=1, prepend=batch.doc_ids[:, :1] - 1) != 0)).all()
                assert (batch.tokens[batch.positions > 0] != PRE).all()
        rows.append(found)
    assert rows[0] == rows[1] and len(rows[0]) == 48
    assert filled(blend, seed=4)[3].tolist() != rows[0][3]


def test_sentinels_are_looked_up(tmp_path: Path) -> None:
    byte = load_tokenizer("byte")
    with pytest.raises(UserError, match="no special token '<a>'"):
        sentinel_ids(["<a>", "<b>", "<c>"], byte)
    with pytest.raises(UserError, match="no tokenizer"):
        sentinel_ids(["<a>", "<b>", "<c>"], None)
    char = load_tokenizer("char")
    assert sentinel_ids(["<padding>", "<end of document>", "<padding>"], char) == (1, 0, 1)
