"""Checkpoints of all kinds are shown, compared and browsed; damaged and hostile ones give one sentence."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from castalia.checkpoint import save_checkpoint
from castalia.cli import main
from castalia.errors import UserError
from castalia.tools.inspect import natural, open_contents
from castalia.tools.inspect_numbers import differences, numbers
from castalia.tools.inspect_text import Browser, chosen, lines

RUNS = Path(__file__).parents[1] / "fixtures" / "gptneox_runs"

TENSORS = {
    "model.a.weight": torch.arange(6.0).view(2, 3),
    "model.a.bias": torch.tensor([1.0, math.nan, -math.inf]),
    "model.b": torch.tensor([3, -4], dtype=torch.int64),
    "half": torch.full((2,), 0.5, dtype=torch.bfloat16),
    "none": torch.empty(0, 3),
}


def shown(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    return {entry.name: (entry.shape, entry.dtype) for entry in open_contents(path).tensors}


EXPECTED = {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in TENSORS.items()}


def write(folder: Path, kind: str) -> Path:
    from safetensors.torch import save_file

    if kind == "pt":
        torch.save(TENSORS, folder / "x.pt")
    elif kind == "old":
        torch.save(TENSORS, folder / "x.bin", _use_new_zipfile_serialization=False)
    elif kind == "ckpt":
        nested = {"model": {"a": {"weight": TENSORS["model.a.weight"], "bias": TENSORS["model.a.bias"]}}}
        nested["model"]["b"] = TENSORS["model.b"]  # type: ignore[assignment]
        torch.save(nested | {"half": TENSORS["half"], "none": TENSORS["none"], "epoch": 3}, folder / "x.ckpt")
    elif kind == "safetensors":
        save_file(TENSORS, folder / "x.safetensors")
    elif kind == "ours":
        return save_checkpoint(folder, 7, TENSORS, {"step": 7, "config": {"name": "n"}})
    else:
        names = list(TENSORS)
        shards = {"m-1.safetensors": names[:2], "m-2.safetensors": names[2:]}
        for file, part in shards.items():
            save_file({name: TENSORS[name] for name in part}, folder / file)
        where = {name: file for file, part in shards.items() for name in part}
        (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        return folder
    return next(folder.iterdir())


@pytest.mark.parametrize("kind", ["pt", "old", "ckpt", "safetensors", "shards", "ours"])
def test_every_format_shows_the_same_tensors(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    contents = open_contents(path)
    assert shown(path) == EXPECTED
    for entry in contents.tensors:
        tensor = entry.read()
        assert torch.equal(tensor.nan_to_num(), TENSORS[entry.name].nan_to_num()) and tensor.nbytes == entry.bytes
    if kind == "ours":
        assert contents.values["state.config.name"] == "'n'" and shown(tmp_path) == EXPECTED


def test_numbers_are_of_the_finite_values() -> None:
    found = numbers(TENSORS["model.a.bias"])
    assert found is not None and (found.norm, found.min, found.max, found.nan, found.inf) == (1.0, 1.0, 1.0, 1, 1)
    whole = numbers(torch.tensor([3, -4]))
    assert whole is not None and (whole.norm, whole.min, whole.max) == (5.0, -4.0, 3.0)
    assert numbers(torch.empty(0)) is not None and numbers(torch.empty(0)).norm is None  # type: ignore[union-attr]
    many = torch.ones(3, 1 << 20).t()  # more than one chunk, and not contiguous
    assert numbers(many).norm == math.sqrt(3 << 20)  # type: ignore[union-attr]


def test_differences_are_named_and_measured(tmp_path: Path) -> None:
    other: dict[str, Any] = {name: tensor.clone() for name, tensor in TENSORS.items()}
    other["model.a.weight"][1, 2] = 5.5
    other["model.b"] = other["model.b"].float()
    other["half"] = torch.zeros(3)
    del other["none"]
    other["new"], other["lr"] = torch.ones(1), 0.1
    torch.save(TENSORS, tmp_path / "a.pt")
    torch.save(other, tmp_path / "b.pt")
    a, b = open_contents(tmp_path / "a.pt"), open_contents(tmp_path / "b.pt")
    assert list(differences(a, a)) == []  # NaN is where NaN is
    found = {difference.name: difference for difference in differences(a, b)}
    assert {name: difference.what for name, difference in found.items()} == {
        "model.a.weight": "values",
        "model.b": "dtype",
        "half": "shape",
        "none": "only in A",
        "new": "only in B",
        "lr": "only in B",
    }
    assert found["model.a.weight"].max_abs == 0.5 and found["model.a.weight"].max_rel == 0.5 / 5.5
    other["model.a.bias"][1] = 0.0
    torch.save(other, tmp_path / "b.pt")
    late = {d.name: d for d in differences(a, open_contents(tmp_path / "b.pt"))}
    assert late["model.a.bias"].as_dict()["max_abs"] == "inf"


def test_objects_and_shared_containers_are_told_once(tmp_path: Path) -> None:
    inner: list[Any] = [torch.ones(2)]
    for _ in range(40):  # 2**40 paths to one tensor
        inner = [inner, inner]
    content: dict[str, Any] = {"deep": inner, "model": torch.nn.Linear(2, 1), "rng": tuple(range(625))}
    content["self"] = content
    torch.save(content, tmp_path / "x.pt")
    contents = open_contents(tmp_path / "x.pt")
    names = [entry.name for entry in contents.tensors]
    assert names == ["deep" + ".0" * 41, "model._parameters.weight", "model._parameters.bias"]
    assert contents.values["model.(class)"] == "torch.nn.modules.linear.Linear"
    assert contents.values["rng"] == "tuple of 625" and contents.values["self"] == "the same as the whole"


def test_the_folders_of_gptneox() -> None:
    contents = open_contents(RUNS / "ckpt_pp1_gptj")
    assert contents.path.name == "global_step30"
    assert "layer_02-model_00-model_states.attention.dense.bias" in {entry.name for entry in contents.tensors}
    assert contents.values["mp_rank_00_model_states.iteration"] == "30"
    assert sorted(["l_10", "l_9"], key=natural) == ["l_9", "l_10"]


def test_text_has_every_name_and_no_escapes(tmp_path: Path) -> None:
    torch.save({"a\x1b[31m": torch.ones(1), "b": "\x1b]0;x\x07"}, tmp_path / "x.pt")
    text = "\n".join(lines(open_contents(tmp_path / "x.pt")))
    assert "\x1b" not in text and "a\\x1b[31m  [1]  float32  4 B  norm 1  min 1  max 1" in text
    with pytest.raises(UserError, match=r"no name matches zz; a name there is a"):
        chosen(open_contents(tmp_path / "x.pt"), ["zz"])


def test_browsing(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "x.pt")
    shown: list[str] = []
    browser = Browser(open_contents(tmp_path / "x.pt"), shown.append)

    def obey(command: str) -> str:
        shown.clear()
        assert browser.obey(command)
        return "\n".join(shown)

    assert "1 + model  (3 tensors" in obey("")
    assert "2 +   a  (2 tensors" in obey("1")
    assert "weight  [2, 3]  float32" in obey("+") and "weight" not in obey("-")
    obey("+")
    assert "begins [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]" in obey("3")
    assert "1 NaN  1 infinite" in obey("4")
    assert "model" not in obey("/ha*").split("\n", 1)[1] and "model" in obey("/")
    assert "neither a number from 1 to 3" in obey("9") and "unfold" in obey("h") and "no name matches" in obey("/zz")
    assert not browser.obey("q")


def test_damaged_and_hostile_files_give_a_sentence(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"x": Trap()}, tmp_path / "trap.pt")
    whole = write(tmp_path, "safetensors").parent / "x.safetensors"
    content = whole.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-3])
    (tmp_path / "long.safetensors").write_bytes(b"\xff" * 8 + content[8:])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "x.index.json").write_text('{"weight_map": {"a": "../x.pt"}}')
    (tmp_path / "y.index.json").write_text('{"weight_map": {"a": "gone.bin"}}')
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("trap.pt", "asks for posix.system"),
        ("cut.safetensors", "is not a safetensors file, or is damaged"),
        ("long.safetensors", "is not a safetensors file, or is damaged"),
        ("text.pt", "is not a file of tensors"),
        ("x.index.json", "names files outside of its folder"),
        ("y.index.json", "is missing, though"),
        ("empty", "holds no file that ends in"),
        ("nowhere", "no such file or folder"),
    ):
        with pytest.raises(UserError, match=message):
            open_contents(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    path = write(tmp_path / "empty", "ours")
    (path / ".metadata").write_bytes(b"x")
    with pytest.raises(UserError, match="is damaged"):
        open_contents(path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(TENSORS, tmp_path / "a.pt")
    torch.save(TENSORS | {"half": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "b.pt")
    a, b = str(tmp_path / "a.pt"), str(tmp_path / "b.pt")
    assert main(["inspect", a, "--json", "--filter", "*bias"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["checkpoints"][0]["tensors"]
    assert row["name"] == "model.a.bias" and row["nan"] == 1 and row["norm"] == 1.0 and row["bytes"] == 12
    assert main(["inspect", a, b, "--names"]) == 0 and "norm" not in capsys.readouterr().out
    assert main(["inspect", "--diff", a, b]) == 0
    assert capsys.readouterr().out == "half: differs by up to 0.5, 0.5 relative\n"
    assert main(["inspect", "--diff", a, b, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["equal"] and [d["max_abs"] for d in found["differences"]] == [0.5]
    assert main(["inspect", "--diff", a, b, "--filter", "model*"]) == 0 and "no difference" in capsys.readouterr().out
    answers = iter(["+", "q"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    assert main(["inspect", a, "--browse"]) == 0 and "weight  [2, 3]" in capsys.readouterr().out
    assert main(["inspect", "--diff", a]) == 2 and "compares two" in capsys.readouterr().err
    assert main(["inspect", "--browse", a, b]) == 2 and main(["inspect", a, "--step", "3"]) == 2
