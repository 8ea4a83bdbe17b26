"""The token data set: GPT-NeoX's bytes, every kind of damage named, nothing half-written."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from castalia.data.store import StoreWriter, TokenStore, data_fingerprint, is_finished, token_dtype
from castalia.errors import UserError

# The example of the format's description: uint16, documents [10, 11] and [12].
IDX_HEX = (
    "4d4d49444944580000010000000000000008020000000000000003000000000000000200000001000000"
    "0000000000000000040000000000000000000000000000000100000000000000"
    "0200000000000000"
)
BIN_HEX = "0a000b000c00"

SHARED_FOLDER = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


def write(prefix: Path, documents: list[list[int]], dtype: str = "u2", info: dict | None = None) -> str:
    with StoreWriter(prefix, dtype) as writer:
        for ids in documents:
            writer.add_document(ids)
        return writer.finish(info)


def test_bytes_are_those_of_gptneox(tmp_path: Path) -> None:
    write(tmp_path / "ds", [[10, 11], [12]])
    assert (tmp_path / "ds.idx").read_bytes().hex() == IDX_HEX
    assert (tmp_path / "ds.bin").read_bytes().hex() == BIN_HEX
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ds.bin", "ds.idx"]


def test_reads_what_gptneox_wrote(tmp_path: Path) -> None:
    (tmp_path / "ds.idx").write_bytes(bytes.fromhex(IDX_HEX))
    (tmp_path / "ds.bin").write_bytes(bytes.fromhex(BIN_HEX))
    store = TokenStore(tmp_path / "ds")
    assert (len(store), store.num_tokens, store.dtype, store.info) == (2, 3, np.dtype("<u2"), None)
    assert store.sizes.tolist() == [2, 1]
    assert store.pointers.tolist() == [0, 4]
    assert store.doc_idx.tolist() == [0, 1, 2]
    assert store.get(0).tolist() == [10, 11]
    assert store.get(0, 1).tolist() == [11]
    assert store.get(1, 0, 1).tolist() == [12]
    assert pickle.loads(pickle.dumps(store)).get(1).tolist() == [12]


@pytest.mark.parametrize("args", [(2,), (-1,), (0, 0, 3), (0, 2, 1), (0, -1, 1), (0, 3), (1, 1, 1)])
def test_get_checks_its_bounds(tmp_path: Path, args: tuple[int, ...]) -> None:
    write(tmp_path / "ds", [[10, 11], [12]])
    with pytest.raises(IndexError):
        TokenStore(tmp_path / "ds").get(*args)


@pytest.mark.parametrize(
    ("vocab_size", "name"), [(257, "uint16"), (65499, "uint16"), (65500, "int32"), (128256, "int32")]
)
def test_dtype_rule(vocab_size: int, name: str) -> None:
    assert token_dtype(vocab_size).name == name


@SHARED_FOLDER
@given(
    documents=st.lists(st.lists(st.integers(0, 2**16 - 1), max_size=20), max_size=12),
    dtype=st.sampled_from(["u2", "i4", "i8"]),
    as_arrays=st.booleans(),
)
def test_round_trip(tmp_path: Path, documents: list[list[int]], dtype: str, as_arrays: bool) -> None:
    with StoreWriter(tmp_path / "ds", dtype) as writer:
        writer.add_documents(np.array(ids, "i8") if as_arrays else ids for ids in documents)
        fingerprint = writer.finish({"version": 1})
    store = TokenStore(tmp_path / "ds")
    assert [store.get(i).tolist() for i in range(len(store))] == documents
    assert store.num_tokens == sum(map(len, documents))
    assert store.doc_idx.tolist() == list(range(len(documents) + 1))
    assert store.info is not None and store.info["sha256"] == fingerprint == store.fingerprint
    assert store.info["bin_sha256"] == hashlib.sha256((tmp_path / "ds.bin").read_bytes()).hexdigest()


@SHARED_FOLDER
@given(ids=st.lists(st.integers(0, 99), min_size=1, max_size=50), data=st.data())
def test_one_changed_token_changes_the_fingerprint(tmp_path: Path, ids: list[int], data: st.DataObject) -> None:
    write(tmp_path / "ds", [ids, [1]])
    before = data_fingerprint(TokenStore(tmp_path / "ds"))
    write(tmp_path / "ds", [ids, [1]], info={"version": 1})
    assert data_fingerprint(TokenStore(tmp_path / "ds")) == before  # the .json has no say in it
    ids[data.draw(st.integers(0, len(ids) - 1))] += 1
    write(tmp_path / "ds", [ids, [1]])
    assert data_fingerprint(TokenStore(tmp_path / "ds")) != before


def test_the_fingerprint_of_a_large_file_samples_it_from_end_to_end(tmp_path: Path) -> None:
    ids = np.zeros(5 << 20, "u1")
    block, gap = 1 << 16, (ids.size - (1 << 16)) // 63  # blocks of 65,536 bytes start every 82,181

    def fingerprint(*changed: int) -> str:
        other = ids.copy()
        other[list(changed)] = 1
        with StoreWriter(tmp_path / "ds", "u1") as writer:
            writer.add_document(other)
            writer.finish()
        return data_fingerprint(TokenStore(tmp_path / "ds"))

    seen = {fingerprint(at) for at in (0, block - 1, 31 * gap + 100, ids.size - block, ids.size - 1)}
    assert len(seen | {fingerprint()}) == 6
    assert fingerprint(block + 100) == fingerprint()  # between two blocks: what makes it cheap


@SHARED_FOLDER
@given(data=st.data(), with_info=st.booleans())
def test_a_damaged_index_is_refused_or_harmless(tmp_path: Path, data: st.DataObject, with_info: bool) -> None:
    documents = [[7, 8, 9], [], [40000, 3], [5]]
    write(tmp_path / "ds", documents, info={"version": 1} if with_info else None)
    path = tmp_path / "ds.idx"
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "grow"]))
    if kind == "flip":
        # Without PREFIX.json the dtype code is left out: of all changes of one byte, uint16 turned into
        # int16 is the one that contradicts nothing.
        places = st.integers(0, len(content) - 1).filter(lambda at: with_info or at != 17)
        at = data.draw(places)
        content[at] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content += bytes(data.draw(st.integers(1, 9)))
    path.write_bytes(content)
    for lazy in (False, True):
        try:
            store = TokenStore(tmp_path / "ds", lazy=lazy)
            found = [store.get(i).tolist() for i in range(len(store))]
        except UserError as error:
            assert str(tmp_path / "ds") in str(error)
        else:
            assert lazy or not with_info  # the fingerprint in PREFIX.json notices any change
            assert found == documents or (kind == "flip" and at == 17)
        if lazy and with_info:
            with pytest.raises(UserError):
                TokenStore(tmp_path / "ds", lazy=True).check()


def test_opened_lazily_only_the_ends_are_read(tmp_path: Path) -> None:
    write(tmp_path / "ds", [[1]] * 2000, info={"version": 1})
    content = bytearray((tmp_path / "ds.idx").read_bytes())
    content[34 + 4 * 1000] = 2  # the size of sequence 1000
    (tmp_path / "ds.idx").write_bytes(content)
    with pytest.raises(UserError, match="sizes and pointers disagree"):
        TokenStore(tmp_path / "ds")
    store = pickle.loads(pickle.dumps(TokenStore(tmp_path / "ds", lazy=True)))
    assert (store.num_tokens, store.get(999).tolist(), store.get(1001).tolist()) == (2000, [1], [1])
    for use in (lambda: store.get(1000), store.check):
        with pytest.raises(UserError, match="sizes and pointers disagree"):
            use()
    assert data_fingerprint(store) == data_fingerprint(TokenStore(tmp_path / "ds", lazy=True))


def damaged(tmp_path: Path, ending: str, content: bytes) -> str:
    write(tmp_path / "ds", [[10, 11], [12]])
    (tmp_path / f"ds{ending}").write_bytes(content)
    with pytest.raises(UserError) as caught:
        TokenStore(tmp_path / "ds")
    return str(caught.value)


def test_damage_is_named(tmp_path: Path) -> None:
    idx, ids = bytes.fromhex(IDX_HEX), bytes.fromhex(BIN_HEX)
    message = damaged(tmp_path, ".bin", ids[:-1])
    assert "ds.bin is truncated: 6 bytes expected, 5 found" in message
    assert "ds.bin is truncated: 6 bytes expected, 0 found" in damaged(tmp_path, ".bin", b"")
    assert "7 found" in damaged(tmp_path, ".bin", ids + b"x")
    assert f"ds.idx is truncated: {len(idx)} bytes expected" in damaged(tmp_path, ".idx", idx[:-3])
    assert "takes 34 bytes and 20 were found" in damaged(tmp_path, ".idx", idx[:20])
    assert "takes 34 bytes and 0 were found" in damaged(tmp_path, ".idx", b"")
    assert "an .idx of another version" in damaged(tmp_path, ".idx", idx[:9] + b"\x02" + idx[10:])
    assert "dtype code 9" in damaged(tmp_path, ".idx", idx[:17] + b"\x09" + idx[18:])
    assert "old lazy/cached format" in damaged(tmp_path, ".idx", b"TNTIDX\0\0" + idx[8:])
    assert "not a token index" in damaged(tmp_path, ".idx", b"PK" + idx[2:])


def test_missing_files_and_foreign_info(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.idx does not exist"):
        TokenStore(tmp_path / "none")
    write(tmp_path / "ds", [[1]], info={"version": 1})
    info = json.loads((tmp_path / "ds.json").read_text())
    for change, words in [({"sha256": "0" * 64}, "does not belong"), ({"version": 2}, "version 2")]:
        (tmp_path / "ds.json").write_text(json.dumps({**info, **change}))
        with pytest.raises(UserError, match=words):
            TokenStore(tmp_path / "ds")
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        TokenStore(tmp_path / "ds")


def test_merged_index_of_gptneox_without_document_starts(tmp_path: Path) -> None:
    """GPT-NeoX's merge tool leaves doc_idx = [0]."""
    idx = bytes.fromhex(IDX_HEX)
    (tmp_path / "ds.bin").write_bytes(bytes.fromhex(BIN_HEX))
    (tmp_path / "ds.idx").write_bytes(idx[:26] + (1).to_bytes(8, "little") + idx[34:-16])
    assert len(TokenStore(tmp_path / "ds")) == 2


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), StoreWriter(tmp_path / "ds", "u2") as writer:
        writer.add_document([1, 2])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_the_old_data_set_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    write(tmp_path / "ds", [[1, 2]], info={"version": 1})
    with pytest.raises(RuntimeError), StoreWriter(tmp_path / "ds", "u2") as writer:
        writer.add_document([9])
        assert TokenStore(tmp_path / "ds").get(0).tolist() == [1, 2]
        raise RuntimeError
    assert TokenStore(tmp_path / "ds").get(0).tolist() == [1, 2]
    write(tmp_path / "ds", [[9]], info={"version": 1})
    assert TokenStore(tmp_path / "ds").get(0).tolist() == [9]


@pytest.mark.parametrize("num_renames", range(4))
@pytest.mark.parametrize("killed", [False, True])
def test_stopped_between_the_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_renames: int, killed: bool
) -> None:
    """Whatever renames were done, the data set is unfinished until PREFIX.json is in place."""
    write(tmp_path / "ds", [[1, 2]], info={"version": 1})
    real, done = os.replace, []

    def replace(*paths: Path) -> None:
        if len(done) == num_renames:
            raise KeyboardInterrupt
        done.append(real(*paths))

    monkeypatch.setattr(os, "replace", replace)
    if killed:  # nothing gets the chance to tidy up
        monkeypatch.setattr(StoreWriter, "abort", lambda self: None)
    with pytest.raises(KeyboardInterrupt), StoreWriter(tmp_path / "ds", "u2") as writer:
        writer.add_document([9])
        writer.finish({"version": 1}, {".tokenizer.json": b"{}"})
    monkeypatch.undo()
    assert not is_finished(tmp_path / "ds")
    with pytest.raises(UserError):
        TokenStore(tmp_path / "ds")
    del writer
    write(tmp_path / "ds", [[9]], info={"version": 1})
    assert TokenStore(tmp_path / "ds").get(0).tolist() == [9]
    assert not list(tmp_path.glob("ds.json.partial")) and not list(tmp_path.glob("ds.bin.partial"))


def test_stopped_before_the_index_without_info(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New ids must never stand beside an old index of the same shape."""
    write(tmp_path / "ds", [[1, 2]])
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if target.suffix == ".idx":
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(StoreWriter, "abort", lambda self: None)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "ds", [[8, 9]])
    assert not is_finished(tmp_path / "ds")


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "ds", "u2") as first:
        first.add_document([1])
        with pytest.raises(UserError, match="another process"):
            StoreWriter(tmp_path / "ds", "u2")
        first.finish()
    assert TokenStore(tmp_path / "ds").get(0).tolist() == [1]


@pytest.mark.parametrize("ids", [[70000], [-1], np.array([70000]), np.array([-1])])
def test_an_id_that_does_not_fit_is_refused(tmp_path: Path, ids: list[int] | np.ndarray) -> None:
    with StoreWriter(tmp_path / "ds", "u2") as writer, pytest.raises(UserError, match="does not fit uint16"):
        writer.add_document(ids)
