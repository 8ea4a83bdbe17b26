"""Corners of the matrix of layouts; all of it is `python -m castalia.tools.certify reshard`."""

import json

import pytest

from castalia.config import load
from castalia.errors import CheckFailed
from castalia.tools import reshard as room


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yml"
    path.write_text(json.dumps({"version": 1, "training": {"steps": 10}}), encoding="utf-8")
    return load([path])


@pytest.mark.parametrize(("before", "after"), [("tp2pp2", ("1", "hsdp")), ("zero3x4", ("tp2",)), ("1", ("pp2",))])
def test_saved_under_one_layout_and_loaded_under_another(config, tmp_path, before, after):
    counts = room.reshard(config, before, after, tmp_path / "c")
    assert all(count > 100 for count in counts.values())


def test_a_difference_is_named(config, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "run_in_processes", lambda *a, **k: [(3, ["model.b", "model.a"])])
    monkeypatch.setattr(room, "verify_checkpoint", lambda path: [])
    with pytest.raises(CheckFailed, match="tp2 -> 1: 2 tensors differ, the first is model.a"):
        room.reshard(config, "tp2", ["1"], tmp_path)
