"""Shared orders: made once whoever asks, found again, never half there, and done without where a disk refuses."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from castalia.data import order as order_module
from castalia.data import order_cache
from castalia.data.order import GPTNeoXOrder
from castalia.data.order_cache import shared_arrays
from castalia.data.store import StoreWriter, TokenStore

KEY = {"of": "a test", "seed": 1}


def arrays() -> dict[str, np.ndarray]:
    return {"a": np.arange(5, dtype=np.uint32), "b": np.zeros((0, 2))}


def never() -> dict[str, np.ndarray]:
    raise AssertionError("made a second time")


def entry_of(folder: Path) -> Path:
    (entry,) = [path for path in folder.iterdir() if path.is_dir()]
    return entry


def test_made_once_and_mapped(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    for make in (arrays, never):
        found = shared_arrays(KEY, make, folder)
        assert found["a"].tolist() == [0, 1, 2, 3, 4] and found["b"].shape == (0, 2)
        assert not found["a"].flags.writeable
    made = []
    shared_arrays({**KEY, "seed": 2}, lambda: made.append(1) or arrays(), folder)
    assert made == [1]
    assert not list(folder.glob(".writing-*"))


def make_and_count(folder: Path, log: Path) -> dict[str, np.ndarray]:
    def make() -> dict[str, np.ndarray]:
        with open(log, "a") as file:
            file.write("made\n")
        return arrays()

    return shared_arrays(KEY, make, folder)


def test_several_processes_make_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=make_and_count, args=(tmp_path / "cache", tmp_path / "log")) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 6
    assert (tmp_path / "log").read_text() == "made\n"


def test_without_a_folder_that_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    assert shared_arrays(KEY, arrays, tmp_path / "file" / "cache")["a"].tolist() == [0, 1, 2, 3, 4]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    assert shared_arrays(KEY, arrays, tmp_path / "cache")["a"].tolist() == [0, 1, 2, 3, 4]
    assert [p for p in (tmp_path / "cache").iterdir() if p.is_dir()] == []


@pytest.mark.parametrize("damage", ["key", "shape", "cut", "gone"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, damage: str) -> None:
    shared_arrays(KEY, arrays, tmp_path)
    entry = entry_of(tmp_path)
    if damage == "key":
        (entry / "key.json").write_text('{"key": "of another"}')
    elif damage == "shape":
        np.save(entry / "a.npy", np.arange(4, dtype=np.uint32))
    elif damage == "cut":
        os.truncate(entry / "a.npy", 130)
    else:
        (entry / "a.npy").unlink()
    assert shared_arrays(KEY, arrays, tmp_path)["a"].tolist() == [0, 1, 2, 3, 4]
    shared_arrays(KEY, never, tmp_path)


def test_what_is_not_used_goes(tmp_path: Path) -> None:
    shared_arrays(KEY, arrays, tmp_path)
    old = entry_of(tmp_path)
    long_ago = time.time() - 40 * 86400
    os.utime(old, (long_ago, long_ago))
    shared_arrays({"other": 1}, arrays, tmp_path)
    assert not old.exists()


def test_large_orders_of_a_store_are_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "_SHARED_FROM", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sizes = np.random.RandomState(1).randint(0, 9, 100)
    with StoreWriter(tmp_path / "ds", "u2") as writer:
        writer.add_documents(np.arange(n) for n in sizes)
        writer.finish()
    store = TokenStore(tmp_path / "ds")

    def places(order: GPTNeoXOrder) -> list:
        return [order.locate(i) for i in range(len(order))]

    expected = places(GPTNeoXOrder(store.sizes, (10, 90), 200, 8, 3))
    assert places(GPTNeoXOrder(store, (10, 90), 200, 8, 3)) == expected
    entry_of(order_cache.cache_folder())
    monkeypatch.setattr(order_module, "_shuffle", never)
    assert places(GPTNeoXOrder(store, (10, 90), 200, 8, 3)) == expected
    for other in ((store, (10, 91), 200, 8, 3), (store, (10, 90), 400, 8, 3), (store, (10, 90), 200, 8, 4)):
        with pytest.raises(TypeError):  # `never` takes no arguments: it was asked to make a new one
            GPTNeoXOrder(*other)
