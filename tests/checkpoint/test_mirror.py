"""Copies at a URL: whole or not there, retried, pruned, and good enough to go on from."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from castalia.checkpoint import Mirror, MirrorFailed, find_checkpoint, save_checkpoint, verify_checkpoint
from castalia.errors import UserError
from castalia.tools.object_store import Refusing, refusing_store


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://{uuid.uuid4().hex}/run" if request.param == "memory" else f"file://{tmp_path}/far/run"


def saved(directory: Path, *steps: int, value: float = 0.0) -> None:
    for step in steps:
        save_checkpoint(directory, step, {"a": torch.full((5,), step + value)}, {"step": step}, files={"x.txt": b"x"})


def test_whole_checkpoints_go_there_and_come_back(url: str, tmp_path: Path) -> None:
    here, mirror = tmp_path / "here", Mirror(url)
    assert mirror.steps() == []
    saved(here, 1, 2)
    (here / "step-00000003").mkdir()  # not whole: stays here
    assert mirror.update(here) == ["step-00000002", "step-00000001"]
    assert mirror.steps() == [1, 2] and mirror.update(here) == []
    assert Mirror(url).update(here) == [], "another sitting sees that they are the same"
    back = tmp_path / "back"
    path = Mirror(url).fetch(2, back)
    assert path == back / "step-00000002" and verify_checkpoint(path) == []
    found = find_checkpoint(back)
    assert found is not None and found.state == {"step": 2} and (path / "x.txt").read_bytes() == b"x"
    assert sorted(p.name for p in back.iterdir()) == ["latest", "step-00000002"]
    saved(here, 2, value=0.5)  # the same step anew
    assert Mirror(url).update(here) == ["step-00000002"]
    assert mirror.fetch(2, back) == path and verify_checkpoint(path) == []
    assert (path / "manifest.json").read_bytes() == (here / "step-00000002" / "manifest.json").read_bytes()


def test_old_copies_are_deleted_as_they_are_here(url: str, tmp_path: Path) -> None:
    mirror = Mirror(url)
    for step in (10, 20, 25, 30, 35):
        save_checkpoint(tmp_path / "here", step, {"a": torch.ones(1)}, {}, keep_last=2, keep_every=20)
        mirror.update(tmp_path / "here", 2, 20)
        there = sorted(int(p.name[5:]) for p in (tmp_path / "here").glob("step-*"))
        assert mirror.steps() == there
    assert mirror.steps() == [20, 30, 35]


def test_a_damaged_copy_is_named_and_not_taken(url: str, tmp_path: Path) -> None:
    saved(tmp_path / "here", 1)
    mirror = Mirror(url)
    mirror.update(tmp_path / "here")
    fs, root = fsspec.core.url_to_fs(url)
    for name in ("x.txt", "state.json", "__0_0.distcp", ".metadata"):
        file = f"{root}/step-00000001/{name}"
        content = fs.cat_file(file)
        fs.pipe_file(file, bytes([content[0] ^ 1]) + content[1:])
        with pytest.raises(MirrorFailed, match=rf"step-00000001: is damaged \({name}: its content is not"):
            mirror.fetch(1, tmp_path / "back")
        assert list((tmp_path / "back").iterdir()) == [], "nothing of it is left"
        fs.pipe_file(file, content)
    fs.rm_file(f"{root}/step-00000001/x.txt")
    with pytest.raises(MirrorFailed, match="could not be downloaded"):
        mirror.fetch(1, tmp_path / "back")
    fs.rm_file(f"{root}/step-00000001/manifest.json")
    assert mirror.steps() == [], "without a manifest there is no copy"


def test_later_copies_can_be_set_aside(url: str, tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3)
    mirror = Mirror(url)
    mirror.update(tmp_path)
    mirror.set_aside(1)
    assert mirror.steps() == [1]


def test_a_url_that_nobody_knows() -> None:
    with pytest.raises(UserError, match="checkpoint.path: nowhere://x cannot be used"):
        Mirror("nowhere://x")


@pytest.fixture(scope="module")
def store() -> Iterator[Refusing]:
    """An object store on this machine with a bucket `runs`, that can be told to refuse."""
    for module in ("s3fs", "moto.server", "flask_cors"):
        pytest.importorskip(module)
    with refusing_store("runs") as application:
        yield application


def test_an_object_store_that_fails_now_and_then(store: Refusing, tmp_path: Path) -> None:
    here, mirror = tmp_path / "here", Mirror("s3://runs/one", 5 << 20)
    saved(here, 1)
    assert mirror.update(here) == ["step-00000001"]
    tensor = torch.randn(3_000_000, generator=torch.Generator().manual_seed(0))  # 12 MB: several parts
    save_checkpoint(here, 2, {"a": tensor}, {"step": 2})
    for methods in (("PUT",), ("POST",)):  # single objects; parts of large ones
        store.refuse(*methods)
        with pytest.raises(MirrorFailed, match="s3://runs/one: step-00000002 could not be uploaded"):
            mirror.update(here)
        store.refuse()
        assert mirror.steps() == [1], "half a copy is none"
    store.refuse("PUT", times=1, status="500 Internal Server Error")
    assert mirror.update(here, keep_last=1) == ["step-00000002"], "a passing fault is nobody's business"
    store.refuse()
    assert mirror.steps() == [2], "and the old one went"
    store.refuse("GET")
    with pytest.raises(MirrorFailed, match="could not be listed|could not be downloaded"):
        mirror.fetch(2, tmp_path / "back")
    store.refuse()
    assert verify_checkpoint(mirror.fetch(2, tmp_path / "back")) == []
