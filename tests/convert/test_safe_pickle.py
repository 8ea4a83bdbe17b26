"""Files are read without running what is in them."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from castalia.convert import load_pt
from castalia.errors import UserError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "gptneox_runs"

CONTENT: dict[str, Any] = {
    "state": OrderedDict(a=torch.arange(6.0).view(2, 3), b=torch.ones(2, dtype=torch.bfloat16)),
    "shape": torch.Size([2, 3]),
    "dtype": torch.float16,
    "rng": ("MT19937", np.arange(5, dtype=np.uint32), 3, 0.5),
    "scalar": np.float64(1.5),
    "kind": np.dtype("int64"),
    "plain": [1, None, True, "x", b"y", {2, 3}, 1 + 2j],
}


class Calls:
    """What a pickle can be made to do when it is loaded."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("archive", [True, False])
def test_tensors_arrays_and_containers(tmp_path: Path, archive: bool) -> None:
    torch.save(CONTENT, tmp_path / "x.pt", _use_new_zipfile_serialization=archive)
    loaded = load_pt(tmp_path / "x.pt")
    assert loaded.keys() == CONTENT.keys()
    assert all(torch.equal(loaded["state"][n], t) for n, t in CONTENT["state"].items())
    assert np.array_equal(loaded["rng"][1], CONTENT["rng"][1]) and loaded["rng"][1].dtype == np.uint32
    for key in ("shape", "dtype", "scalar", "kind", "plain"):
        assert loaded[key] == CONTENT[key] and type(loaded[key]) is type(CONTENT[key]), key


def test_the_files_of_gptneox() -> None:
    files = sorted(FIXTURES.rglob("*.pt"))
    assert len(files) == 20
    for file in files:
        loaded = load_pt(file)
        if file.name.startswith("mp_rank"):
            assert loaded["np_rng_state"][1].shape == (624,)


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("function", [os.system, builtins.eval, builtins.exec, builtins.__import__, getattr])
def test_nothing_is_executed(tmp_path: Path, archive: bool, function: Callable[..., Any]) -> None:
    ran = tmp_path / "ran"
    if function is os.system:
        call = Calls(function, f"touch {ran}")
    elif function is getattr:
        call = Calls(getattr, "x", "format")
    else:
        call = Calls(function, f"open({str(ran)!r}, 'w')")
    torch.save({"module": torch.ones(2), "trap": call}, tmp_path / "x.pt", _use_new_zipfile_serialization=archive)
    name = function.__name__
    with pytest.raises(UserError, match=rf"x\.pt: asks for (\w+\.)?{name}, which is no tensor") as caught:
        load_pt(tmp_path / "x.pt")
    assert "\n" not in str(caught.value)
    assert not ran.exists()


def test_a_trap_that_is_no_torch_file(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Calls(os.system, f"touch {ran}")))
    with pytest.raises(UserError, match=r"x\.pt"):
        load_pt(tmp_path / "x.pt")
    # The same inside an archive that torch did not write.
    stream = io.BytesIO()
    torch.save({"a": torch.ones(2)}, stream)
    with zipfile.ZipFile(stream) as source, zipfile.ZipFile(tmp_path / "y.pt", "w") as target:
        for item in source.infolist():
            trap = pickle.dumps(Calls(os.system, f"touch {ran}"), protocol=2)
            target.writestr(item, trap if item.filename.endswith("data.pkl") else source.read(item))
    with pytest.raises(UserError, match=r"y\.pt: asks for posix\.system"):
        load_pt(tmp_path / "y.pt")
    assert not ran.exists()


def test_objects_of_other_libraries_are_named(tmp_path: Path) -> None:
    torch.save({"loss_scaler": Path("x")}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"asks for pathlib\.(_local\.)?PosixPath"):
        load_pt(tmp_path / "x.pt")


def test_structured_types_are_refused(tmp_path: Path) -> None:
    """Their state could be forged so that bytes are taken for pointers to objects."""
    torch.save(np.zeros(2, dtype=[("a", "i4"), ("b", "f8")]), tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt: asks for numpy\.dtypes\.VoidDType|VoidDType"):
        load_pt(tmp_path / "x.pt")


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_pt(tmp_path / "x.pt")
    torch.save({"a": torch.ones(100)}, tmp_path / "x.pt")
    whole = (tmp_path / "x.pt").read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(UserError, match=r"x\.pt: is not a file of tensors, or is damaged"):
            load_pt(tmp_path / "x.pt")
