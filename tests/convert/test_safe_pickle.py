"""Files are read without running what is in them."""

from __future__ import annotations

import argparse
import builtins
import io
import os
import pickle
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from castalia.convert import load_pt
from castalia.convert.safe_pickle import Placeholder
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
    with pytest.raises(UserError, match=rf"x\.pt: asks for (\w+\.)?{name}, which is how a file runs code") as caught:
        load_pt(tmp_path / "x.pt")
    assert "\n" not in str(caught.value)
    assert not ran.exists()


def test_a_trap_that_is_no_torch_file(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Calls(os.system, f"touch {ran}")))
    with pytest.raises(UserError, match=r"x\.pt"):
        load_pt(tmp_path / "x.pt")
    # The same inside an archive that torch did not write.
    for protocol in range(6):
        archive_with(tmp_path / "y.pt", pickle.dumps(Calls(os.system, f"touch {ran}"), protocol))
        with pytest.raises(UserError, match=r"y\.pt: asks for posix\.system"):
            load_pt(tmp_path / "y.pt")
    assert not ran.exists()


def archive_with(path: Path, content: bytes) -> Path:
    """One of torch's archives with this pickle in the place of its own."""
    stream = io.BytesIO()
    torch.save({"a": torch.ones(2)}, stream)
    with zipfile.ZipFile(stream) as source, zipfile.ZipFile(path, "w") as target:
        for item in source.infolist():
            target.writestr(item, content if item.filename.endswith("data.pkl") else source.read(item))
    return path


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'touch RAN'\ntR.",
        b"(S'touch RAN'\nios\nsystem\n.",
        b"(cos\nsystem\nS'touch RAN'\no.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x09touch RAN\x85R.",
        b"cposix\nsystem\nS'touch RAN'\n\x85\x81.",  # NEWOBJ
        b'c__builtin__\neval\n(S\'open("RAN", "w")\'\ntR.',
        b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'system'\ntR(S'touch RAN'\ntR.",
        b"cos.path\nos.system\n(S'touch RAN'\ntR.",
        b"ctorch\nload\n(S'x.pt'\nN\ncpickle\nloads\ntR.",
        b"ctorch.hub\nload\n(S'a/b'\nS'c'\ntR.",
        b"cpickle\nloads\n(S'x'\ntR.",
        b"cruncommand\nx\n(cos\nsystem\ntR.",
    ],
)
def test_every_way_to_call_is_closed(tmp_path: Path, program: bytes) -> None:
    ran = tmp_path / "ran"
    archive_with(tmp_path / "x.pt", program.replace(b"RAN", bytes(ran)))
    with pytest.raises(UserError, match=r"x\.pt: asks for [\w.]+, which is how a file runs code|x\.pt: is not a file"):
        load_pt(tmp_path / "x.pt")
    assert not ran.exists()


def test_a_class_that_is_imported_nowhere_and_does_nothing(tmp_path: Path) -> None:
    """Names are not looked up, so a module that the file came with is not run either."""
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    archive_with(tmp_path / "x.pt", b"cevil_module\nrun\n(K\x01tR.")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        loaded = load_pt(tmp_path / "x.pt")
    assert isinstance(loaded, Placeholder) and str(loaded.kind) == "evil_module.run" and loaded.arguments == (1,)
    assert not (tmp_path / "ran").exists()


def test_what_is_handed_out_cannot_be_changed_or_called_on(tmp_path: Path) -> None:
    """A state given to a function, a call of a result, a tensor beyond its storage: all refused, nothing kept."""
    for program, message in (
        (b"ctorch._utils\n_rebuild_tensor_v2\n}S'__defaults__'\nNsb.", "gives a _Callable a state"),
        (b"ccollections\nOrderedDict\n)R(K\x01tR.", "calls a OrderedDict, which is no function"),
        (b"ccollections\nOrderedDict\n]R.", "calls .* with a list"),
        (b"cbuiltins\nbytearray\n(I99999999999\ntR.", "neither bytes nor text"),
        (b"\x82\x01.", "names a class by the number 1"),
        (b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI999999999999\ntQ.", "promises 999999999999 numbers"),
        (b"(S'module'\nI1\nI2\nI3\ntQ.", "no storage of torch's"),
        (b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR.", "numpy array of O8, and only"),
        (b"\x80\x02\x8d\xff\xff\xff\xff\xff\xff\xff\x0fx.", "is damaged"),
    ):
        archive_with(tmp_path / "x.pt", program)
        with pytest.raises(UserError, match=message):
            load_pt(tmp_path / "x.pt")
    storage = b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI2\ntQ"
    for size, stride in ((b"I3", b"I1"), (b"I2", b"I2"), (b"I-1", b"I1"), (b"I2", b"I-1")):
        shape = storage + b"I0\n(" + size + b"\nt(" + stride + b"\ntI00\nN"
        archive_with(tmp_path / "x.pt", b"ctorch._utils\n_rebuild_tensor_v2\n(" + shape + b"tR.")
        with pytest.raises(UserError, match="makes a tensor of shape"):
            load_pt(tmp_path / "x.pt")
    assert torch._utils._rebuild_tensor_v2.__defaults__ == (None,)


def test_a_pickle_in_a_pickle_stays_shut(tmp_path: Path) -> None:
    inner = pickle.dumps(Calls(os.system, f"touch {tmp_path / 'ran'}"))
    torch.save({"inner": inner, "nested": Calls(torch.storage._load_from_bytes, inner)}, tmp_path / "x.pt")
    loaded = load_pt(tmp_path / "x.pt")
    assert loaded["inner"] == inner and loaded["nested"].arguments == (inner,)
    assert not (tmp_path / "ran").exists()


class Scaler:
    """Like what DeepSpeed keeps in an optimizer's file."""

    def __init__(self) -> None:
        self.cur_scale, self.history = 65536, [torch.arange(3.0)]


class Slotted:
    """With fields that are no dictionary."""

    __slots__ = ("rank",)


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_objects_of_other_libraries_keep_their_fields(tmp_path: Path, archive: bool, protocol: int) -> None:
    slotted = Slotted()
    slotted.rank = 3
    torch.save(
        {
            "loss_scaler": Scaler(),
            "args": argparse.Namespace(num_layers=3),
            "where": Path("x"),
            "slotted": slotted,
            "model": torch.nn.Linear(2, 1),
            "array": np.arange(6.0).reshape(2, 3).T,
            "groups": defaultdict(list, {1: [2]}),
        },
        tmp_path / "x.pt",
        _use_new_zipfile_serialization=archive,
        pickle_protocol=protocol,
    )
    loaded = load_pt(tmp_path / "x.pt")
    scaler = loaded["loss_scaler"]
    assert isinstance(scaler, Placeholder) and str(scaler.kind).endswith(".Scaler")
    assert scaler.attributes["cur_scale"] == 65536 and scaler.attributes["history"][0].tolist() == [0, 1, 2]
    assert loaded["args"].attributes == {"num_layers": 3} and loaded["where"].arguments == ("x",)
    assert loaded["slotted"].attributes == {"rank": 3}
    assert loaded["model"].attributes["_parameters"]["weight"].shape == (1, 2)
    assert loaded["array"].tolist() == [[0, 3], [1, 4], [2, 5]] and loaded["groups"] == {1: [2]}


def test_tensors_share_what_they_shared_and_views_stay_views(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    content = {"whole": whole, "view": whole[1:, ::2], "turned": whole.t(), "f8": torch.ones(3).to(torch.float8_e4m3fn)}
    torch.save(content, tmp_path / "x.pt")
    loaded = load_pt(tmp_path / "x.pt")
    assert all(
        torch.equal(loaded[n].float(), t.float()) and loaded[n].stride() == t.stride() for n, t in content.items()
    )
    loaded["whole"][1, 0] = 7.0
    assert loaded["view"][0, 0] == 7.0 and load_pt(tmp_path / "x.pt")["view"][0, 0] == 4.0  # the file stays as it is


def test_structured_types_are_refused(tmp_path: Path) -> None:
    """Their state could be forged so that bytes are taken for pointers to objects."""
    for array in (np.zeros(2, dtype=[("a", "i4"), ("b", "f8")]), np.array([None])):
        torch.save(array, tmp_path / "x.pt")
        with pytest.raises(UserError, match=r"x\.pt: asks for a numpy array of (V12|O8), and only arrays of numbers"):
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
