"""Checkpoints come back bit for bit, damage is named, and nothing that fails leaves a half one."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from castalia.checkpoint import (
    CheckpointNotSaved,
    find_checkpoint,
    load_checkpoint,
    read_state,
    save_checkpoint,
    tensor_shapes,
    verify_checkpoint,
)
from castalia.errors import UserError

SHAPES = {
    "model.a.weight": (40, 30),
    "model.a.bias": (40,),
    "optimizer.a.weight.exp_avg": (40, 30),
    "model.s": (),
}


def views(fill: int | None) -> tuple[Tensor, dict[str, Tensor]]:
    """One flat buffer and named views into it, between margins that must stay as they are."""
    sizes = [torch.Size(shape).numel() for shape in SHAPES.values()]
    if fill is None:
        flat = torch.full((sum(sizes) + 20,), -1.0)
    else:
        flat = torch.randn(sum(sizes) + 20, generator=torch.Generator().manual_seed(fill))
    pieces = flat[10:-10].split(sizes)
    return flat, {n: p.view(s) for (n, s), p in zip(SHAPES.items(), pieces, strict=True)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: the system refuses in the midst of writing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_views_of_flat_buffers_come_back_bit_for_bit(tmp_path: Path) -> None:
    _, saved = views(1)
    path = save_checkpoint(tmp_path, 200, saved, {"step": 200, "name": "Zoë"})
    assert path == tmp_path / "step-00000200"
    assert (tmp_path / "latest").read_text().strip() == path.name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000200"]
    flat, loaded = views(None)
    load_checkpoint(path, loaded)
    assert same(saved, loaded)
    assert torch.equal(flat[10:50], loaded["model.a.weight"].flatten()[:40]), "loaded into the buffer, not beside it"
    assert (flat[:10] == -1).all() and (flat[-10:] == -1).all()
    assert read_state(path) == {"step": 200, "name": "Zoë"}
    assert verify_checkpoint(path) == []


def test_parameters_and_nested_dicts(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    path = save_checkpoint(tmp_path, 0, {"model": dict(module.named_parameters())}, {})
    assert tensor_shapes(path) == {"model.weight": (2, 3), "model.bias": (2,)}
    other = torch.nn.Linear(3, 2)
    load_checkpoint(path, {f"model.{n}": p for n, p in other.named_parameters()})
    assert torch.equal(module.weight, other.weight) and torch.equal(module.bias, other.bias)
    half = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    load_checkpoint(path, {"model": dict(half.named_parameters())})
    assert torch.equal(half.weight, module.weight.bfloat16())


def test_only_a_part_may_be_loaded(tmp_path: Path) -> None:
    _, saved = views(1)
    path = save_checkpoint(tmp_path, 1, saved, {})
    _, loaded = views(None)
    model = {n: t for n, t in loaded.items() if n.startswith("model.")}
    load_checkpoint(path, model, only="model.")
    assert all(torch.equal(saved[n], t) for n, t in model.items())


def test_names_and_shapes_must_agree(tmp_path: Path) -> None:
    _, saved = views(1)
    path = save_checkpoint(tmp_path, 1, saved, {})
    _, loaded = views(None)
    with pytest.raises(UserError, match=r"does not hold model\.new"):
        load_checkpoint(path, loaded | {"model.new": torch.zeros(1)})
    with pytest.raises(UserError, match=r"does not have: model\.a\.bias"):
        load_checkpoint(path, {n: t for n, t in loaded.items() if n != "model.a.bias"})
    with pytest.raises(UserError, match=r"model\.a\.bias \[40\] there, \[41\] here"):
        load_checkpoint(path, loaded | {"model.a.bias": torch.zeros(41)})
    assert all((t == -1).all() for t in loaded.values()), "nothing was overwritten"


def test_every_damage_is_found_and_named(tmp_path: Path) -> None:
    _, saved = views(1)
    whole = save_checkpoint(tmp_path / "a", 1, saved, {"tokens": 17})
    names = sorted(p.name for p in whole.iterdir())
    assert names == [".metadata", "__0_0.distcp", "manifest.json", "state.json"]
    for name in names:
        for damage in ("flip", "truncate", "remove"):
            directory = tmp_path / "b"
            shutil.copytree(tmp_path / "a", directory)
            file = directory / whole.name / name
            content = bytearray(file.read_bytes())
            if damage == "remove":
                file.unlink()
            else:
                content[len(content) // 2] ^= 4
                file.write_bytes(content if damage == "flip" else content[: len(content) // 2])
            problems = verify_checkpoint(directory / whole.name)
            # A flipped manifest accuses the file whose record it is: either is named, never nothing.
            assert problems and (name == "manifest.json" or problems[0].startswith(f"{file}:")), (
                name,
                damage,
            )
            with pytest.raises(UserError, match="no checkpoint is whole"):
                find_checkpoint(directory)
            with pytest.raises(UserError, match="step-00000001"):
                find_checkpoint(directory, step=1)
            shutil.rmtree(directory)
    (whole / "notes.txt").write_text("mine")
    assert verify_checkpoint(whole) == [f"{whole / 'notes.txt'}: is not in the manifest"]
    assert find_checkpoint(tmp_path / "a") is not None, "a stray file does no harm"


def test_a_newer_format_is_refused_by_name(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"a": torch.ones(1)}, {})
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"version": 2}))
    with pytest.raises(UserError, match="format version 2, this release reads 1"):
        find_checkpoint(tmp_path)


def test_finding(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) is None
    assert find_checkpoint(tmp_path / "nowhere") is None
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"a": torch.full((2,), float(step))}, {"step": step})
    found = find_checkpoint(tmp_path)
    assert found is not None and (found.step, found.skipped, found.state) == (3, (), {"step": 3})
    (tmp_path / "latest").write_text("step-00000002\n")
    found = find_checkpoint(tmp_path)
    assert found is not None and found.step == 3, "the newest whole one, whatever latest says"
    (tmp_path / "step-00000003" / "state.json").unlink()
    found = find_checkpoint(tmp_path)
    assert found is not None and found.step == 2 and "step-00000003/state.json: is missing" in found.skipped[0]
    (tmp_path / "latest").write_text("step-00000009\n")
    found = find_checkpoint(tmp_path)
    assert found is not None and found.step == 2 and "step-00000009: is missing" in found.skipped[0]
    assert find_checkpoint(tmp_path, step=1) is not None
    with pytest.raises(UserError, match=r"no checkpoint of step 4: .*\(1, 2, 3\)"):
        find_checkpoint(tmp_path, step=4)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"a": torch.ones(1)}, {})
    (tmp_path / "step-00000002" / "state.json").unlink()
    for step in (3, 4):
        save_checkpoint(tmp_path, step, {"a": torch.ones(1)}, {}, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "latest",
        "step-00000002",  # broken: not counted as a spare copy, not deleted either
        "step-00000003",
        "step-00000004",
    ]
    path = save_checkpoint(tmp_path, 1, {"a": torch.ones(1)}, {}, keep_last=1)
    assert verify_checkpoint(path) == [], "the one just written stays, though others have a higher step"
    with pytest.raises(ValueError):
        save_checkpoint(tmp_path, 5, {"a": torch.ones(1)}, {}, keep_last=0)


def test_a_step_may_be_saved_again(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        path = save_checkpoint(tmp_path, 7, {"a": torch.full((3,), value)}, {"value": value})
    target = torch.zeros(3)
    load_checkpoint(path, {"a": target})
    assert target.tolist() == [2.0] * 3 and read_state(path) == {"value": 2.0}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000007"]


def test_a_kill_while_a_step_is_replaced_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 7, {"a": torch.ones(3)}, {"value": 1})
    really = os.replace

    class Killed(BaseException):
        pass

    def replace(source: Path, target: Path) -> None:
        if Path(source).name == ".writing-step-00000007":
            raise Killed
        really(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: None)  # the dead do not tidy up
    with pytest.raises(Killed):
        save_checkpoint(tmp_path, 7, {"a": torch.ones(3)}, {"value": 2})
    monkeypatch.undo()
    found = find_checkpoint(tmp_path)
    assert found is not None and found.step == 7 and found.state == {"value": 1}
    save_checkpoint(tmp_path, 8, {"a": torch.ones(3)}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000007", "step-00000008"]
    found = find_checkpoint(tmp_path, step=7)
    assert found is not None and found.state == {"value": 1}


def test_leftovers_of_dead_writers_are_cleared_but_not_those_of_living_ones(tmp_path: Path) -> None:
    import fcntl

    for name in (".writing-step-00000001", ".deleting-step-00000002", ".writing-step-00000003"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("half")
    living = os.open(tmp_path / ".writing-step-00000003", os.O_RDONLY)
    try:
        fcntl.flock(living, fcntl.LOCK_EX)
        save_checkpoint(tmp_path, 1, {"a": torch.ones(1)}, {})
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            ".writing-step-00000003",
            "latest",
            "step-00000001",
        ]
        with pytest.raises(CheckpointNotSaved, match="another process is writing"):
            save_checkpoint(tmp_path, 3, {"a": torch.ones(1)}, {})
        assert (tmp_path / ".writing-step-00000003" / "half").exists()
    finally:
        os.close(living)


def test_a_refusal_in_the_midst_of_writing_is_one_sentence(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"a": torch.ones(3)}, {"step": 1})
    before = sorted(p.name for p in tmp_path.iterdir())
    tensors = {f"model.{i}": torch.randn(200, 200) for i in range(20)}  # 3.2 MB
    with file_size_limit(1_000_000), pytest.raises(CheckpointNotSaved) as caught:
        save_checkpoint(tmp_path, 2, tensors, {}, keep_last=1)
    text = str(caught.value)
    assert str(tmp_path) in text and "step 2" in text and "File too large" in text and "another disk" in text
    assert "\n" not in text
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    found = find_checkpoint(tmp_path)
    assert found is not None and found.step == 1
    save_checkpoint(tmp_path, 2, tensors, {})
    found = find_checkpoint(tmp_path)
    assert found is not None and found.step == 2, "and once there is room again it goes on"


@pytest.mark.parametrize("file", ["state.json", "manifest.json"])
def test_a_disk_full_at_the_small_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    import errno

    save_checkpoint(tmp_path, 1, {"a": torch.ones(3)}, {})
    really = Path.open

    def full(self: Path, *args: object, **more: object) -> object:
        if file in self.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return really(self, *args, **more)  # type: ignore[call-overload]

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(CheckpointNotSaved, match=r"No space left on device\): free some space"):
            save_checkpoint(tmp_path, 2, {"a": torch.ones(3)}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]


def test_our_own_mistakes_are_not_reported_as_the_disks(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a is a int"):
        save_checkpoint(tmp_path, 1, {"a": 3}, {})
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, 1, {"a": torch.ones(1)}, {"not": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_metadata_file_cannot_run_code(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"a": torch.ones(1)}, {})

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'executed'}",)

    (path / ".metadata").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError, match=r"\.metadata: cannot be read \(it asks for posix\.system\)"):
        load_checkpoint(path, {"a": torch.ones(1)})
    assert not (tmp_path / "executed").exists()
