"""A pickle -> the data in it, without running what is in it.

    GLOBAL torch._utils _rebuild_tensor_v2  ─> a function of this file that checks, then makes a tensor
    GLOBAL deepspeed.x LossScaler           ─> a `Placeholder` that keeps arguments and attributes
    GLOBAL posix system                     ─> refused: only a file that means harm names it

A pickle is a program: it names functions, and calls them. Here a name is never looked up: it
stands for something in the table below, or for nothing but itself. So whatever a file calls, what
it gets is a tensor, an array, a container or a note of the call. `torch_file.py` reads the files
that such pickles lie in.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch
from torch import Tensor

from castalia.errors import UserError

# Modules whose functions run code, or change the machine. Nothing of any module runs here; a file that names
# these is refused so that its owner learns what it is.
_HARMFUL = frozenset(
    {
        *(
            "asyncio",
            "bdb",
            "builtins",
            "code",
            "codeop",
            "commands",
            "ctypes",
            "distutils",
            "ensurepip",
            "http",
            "importlib",
        ),
        *("marshal", "multiprocessing", "nt", "os", "pdb", "pickle", "pip", "pkgutil", "platform", "popen2", "posix"),
        *(
            "posixpath",
            "profile",
            "cProfile",
            "pty",
            "pydoc",
            "runpy",
            "shutil",
            "signal",
            "socket",
            "ssl",
            "subprocess",
        ),
        *("sys", "tempfile", "test", "timeit", "trace", "urllib", "venv", "webbrowser", "zipimport"),
    }
)
_HARMFUL_NAMES = frozenset({"torch.load", "torch.hub.load", "torch.jit.load", "numpy.load", "joblib.load"})

_OLD_MODULES = {"copy_reg": "copyreg", "__builtin__": "builtins"}


class Refused(UserError):
    """The pickle asks for what it cannot have."""


@dataclass(frozen=True)
class Named:
    """A class or function that a pickle names and that is not looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Placeholder:
    """What stands in the place of an object of another library.

    Attributes:
        kind: its class, or the function whose result it is.
        arguments: what that was called with.
        attributes: its fields; `state` is what it keeps in another form than a mapping.
        items, entries: of a kind of list or set, of a kind of dict.
    """

    kind: Named
    arguments: tuple[Any, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    state: Any = None
    items: list[Any] = field(default_factory=list)
    entries: dict[Any, Any] = field(default_factory=dict)

    # How an unpickler fills lists, sets and dicts.

    def append(self, item: Any) -> None:
        """Keep one more item."""
        self.items.append(item)

    add = append

    def extend(self, items: Sequence[Any]) -> None:
        """Keep more items."""
        self.items.extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value


@dataclass(frozen=True)
class Storage:
    """A stretch of numbers that tensors lie in."""

    memory: torch.UntypedStorage
    dtype: torch.dtype


class SafeUnpickler(pickle._Unpickler):
    """Reads one pickle of any protocol.

    Args:
        file: has `read` and `readline`.
        storage: finds what a persistent id refers to (torch's way to keep numbers outside of the pickle).
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]

    def __init__(self, file: Any, storage: Callable[[Any], Any]) -> None:
        super().__init__(file, encoding="utf-8", errors="surrogateescape")
        self._storage = storage

    def persistent_load(self, pid: Any) -> Any:
        """What lies outside of the pickle."""
        return self._storage(pid)

    def find_class(self, module: str, name: str) -> Any:
        """What a name stands for; nothing is imported."""
        module = _OLD_MODULES.get(module, module)
        known = _KNOWN.get(f"{module}.{name}")
        if known is not None:
            return known
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        whole = f"{module}.{name}"
        if module == "builtins" and name in _PLAIN_CLASSES:
            return Named(module, name)
        if module.split(".")[0] in _HARMFUL or whole in _HARMFUL_NAMES:
            raise Refused(
                f"asks for {whole}, which is how a file runs code: nothing was run and nothing loaded; "
                "fetch it again from where you trust"
            )
        return Named(module, name)

    def get_extension(self, code: int) -> NoReturn:
        """Numbers in the place of names, which mean something in the writing program alone."""
        raise Refused(f"names a class by the number {code}, which only the program that wrote it knows")

    def _instantiate(self, kind: Any, args: Any) -> None:
        self.stack.append(_call(kind, tuple(args)))

    def load_reduce(self) -> None:
        """Call: what a name of the table stands for, otherwise keep a note of the call."""
        args = self.stack.pop()
        self.stack[-1] = _call(self.stack[-1], args)

    def load_newobj(self) -> None:
        """A new object of a class."""
        self.load_reduce()

    def load_newobj_ex(self) -> None:
        """The same with keywords."""
        keywords = self.stack.pop()
        self.load_reduce()
        made = self.stack[-1]
        if keywords:
            if not isinstance(made, Placeholder):
                raise Refused("makes a plain object with keywords, which has no meaning")
            made.attributes |= keywords

    def load_build(self) -> None:
        """Give an object its state."""
        state = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, Placeholder):
            _keep(made, state)
        elif isinstance(made, np.ndarray):
            _fill_array(made, state)
        elif isinstance(made, np.dtype):
            if not (isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", "|", "=")):
                raise Refused("asks for numpy numbers in another byte order than this machine's")
        elif not isinstance(made, Tensor | OrderedDict | dict):  # what those keep beside their values is let go
            raise Refused(f"gives a {type(made).__name__} a state, which it cannot have")

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.BUILD[0]] = load_build


def _call(what: Any, args: Any) -> Any:
    if not isinstance(args, tuple):
        raise Refused(f"calls {what} with a {type(args).__name__}")
    if isinstance(what, Named):
        return Placeholder(what, args)
    if isinstance(what, _Callable):
        return what.function(*args)
    raise Refused(f"calls a {type(what).__name__}, which is no function")


def _keep(made: Placeholder, state: Any) -> None:
    parts = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
    if all(part is None or isinstance(part, Mapping) for part in parts):  # fields, and fields in slots
        for part in parts:
            made.attributes |= part or {}
    else:
        made.state = state


@dataclass(frozen=True)
class _Callable:
    """Marks what may be called, so that nothing else is: no class or function is ever handed out itself."""

    function: Callable[..., Any]


def _tensor(storage: Storage, offset: int, size: Any, stride: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A view of a storage that lies within it; torch itself would let a storage grow instead."""
    if not isinstance(storage, Storage):
        raise Refused("makes a tensor of something that is no storage")
    dtype = dtype or storage.dtype
    size, stride = tuple(map(int, size)), tuple(map(int, stride))
    if len(size) != len(stride) or offset < 0 or any(n < 0 for n in size + stride):
        raise Refused(f"makes a tensor of shape {list(size)} and strides {list(stride)}, which there cannot be")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if 0 not in size else -1
    if (last + 1) * dtype.itemsize > storage.memory.nbytes():
        raise Refused(f"makes a tensor of shape {list(size)} out of {storage.memory.nbytes()} bytes")
    made = torch.empty(0, dtype=dtype, device=storage.memory.device)
    return made.set_(storage.memory, offset, size, stride)


def _tensor_v2(
    storage: Any, offset: int, size: Any, stride: Any, requires_grad: Any, hooks: Any, marks: Any = None
) -> Tensor:
    if marks:
        raise Refused(f"holds a tensor that is marked {marks}, which is not read")
    return _tensor(storage, offset, size, stride)


def _tensor_v3(
    storage: Any, offset: int, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, marks: Any = None
) -> Tensor:
    if marks or not isinstance(dtype, torch.dtype):
        raise Refused(f"holds a tensor that is marked {marks or dtype}, which is not read")
    return _tensor(storage, offset, size, stride, dtype)


def _of_type(function: Any, kind: Any, args: Any, state: Any) -> Any:
    return _call(function, args)  # a subclass of Tensor is read as a tensor


def _dtype(code: Any, *_: Any) -> np.dtype[Any]:
    """Numbers only: the state of a structured type can be forged so that bytes are taken for objects."""
    made = np.dtype(code) if isinstance(code, str) else None
    if made is None or made.kind not in "biufc" or made.names is not None:
        raise Refused(f"asks for a numpy array of {str(code)[:40]}, and only arrays of numbers are read")
    return np.dtype(made, copy=True)


def _array(*_: Any) -> np.ndarray[Any, Any]:
    return np.empty(0, np.uint8)


def _fill_array(array: np.ndarray[Any, Any], state: Any) -> None:
    match state:
        case (int(), tuple() as shape, np.dtype() as dtype, bool() | int() as fortran, bytes() | str() as data):
            raw = data.encode("latin1") if isinstance(data, str) else data
            whole = np.frombuffer(raw, dtype).reshape(shape, order="F" if fortran else "C")
        case _:
            raise Refused("holds a numpy array that is not one of numbers")
    checked: Any = (1, whole.shape, whole.dtype, bool(fortran), raw)
    array.__setstate__(checked)


def _scalar(dtype: Any, data: Any) -> Any:
    if not isinstance(dtype, np.dtype):
        raise Refused("holds a numpy number of no kind")
    return np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, dtype)[0]


def _array_from_buffer(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray[Any, Any]:
    if not isinstance(dtype, np.dtype) or not isinstance(data, bytes | bytearray):
        raise Refused("holds a numpy array that is not one of numbers")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if order == "F" else "C")


def _encode(text: str, how: str = "latin1") -> bytes:
    if how not in ("latin1", "latin-1", "utf-8", "utf8", "ascii"):
        raise Refused(f"encodes text in {str(how)[:40]}")
    return text.encode(how)


def _bytearray(data: Any = b"", how: str = "latin1") -> bytearray:
    if not isinstance(data, bytes | str):  # a number would be a size, however large
        raise Refused("makes bytes of what is neither bytes nor text")
    return bytearray(data if isinstance(data, bytes) else _encode(data, how))


def _dict(items: Any = ()) -> OrderedDict[Any, Any]:
    return OrderedDict(items)


def _default_dict(kind: Any = None, items: Any = ()) -> dict[Any, Any]:
    return dict(items)


def _object(kind: Any, base: Any, state: Any) -> Any:
    return _call(kind, ())


# What a state's `list` or `int` may be where a class is meant (a defaultdict's, say).
_PLAIN_CLASSES = frozenset(
    {"list", "dict", "int", "float", "str", "bool", "tuple", "object", "bytes", "type", "range", "NotImplementedType"}
)


_STORAGE_DTYPES = {
    **{"Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16},
    **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
    **{"Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128},
}


@dataclass(frozen=True)
class StorageKind:
    """A class of storages, which says what numbers lie in it."""

    dtype: torch.dtype


_NUMPY = {
    f"numpy.{core}.multiarray.{name}": _Callable(function)
    for core in ("core", "_core")
    for name, function in (("_reconstruct", _array), ("scalar", _scalar))
} | {f"numpy.{core}.numeric._frombuffer": _Callable(_array_from_buffer) for core in ("core", "_core")}
_KNOWN: dict[str, Any] = {
    **{
        f"torch.{device}{name}Storage": StorageKind(dtype)
        for name, dtype in _STORAGE_DTYPES.items()
        for device in ("", "cuda.")
    },
    **{f"torch{where}.UntypedStorage": StorageKind(torch.uint8) for where in ("", ".storage")},
    **_NUMPY,
    **{
        f"torch._utils.{name}": _Callable(function)
        for name, function in (
            ("_rebuild_tensor", _tensor),
            ("_rebuild_tensor_v2", _tensor_v2),
            ("_rebuild_tensor_v3", _tensor_v3),
            ("_rebuild_parameter", lambda tensor, *_: tensor),
            ("_rebuild_parameter_with_state", lambda tensor, *_: tensor),
        )
    },
    "torch._tensor._rebuild_from_type_v2": _Callable(_of_type),
    "torch.Size": _Callable(lambda size=(): torch.Size(size)),
    "torch.device": _Callable(lambda *where: torch.device(*where)),
    # As long as nothing can be called but what is in this table, these need no names of their own.
    "numpy.dtype": _Callable(_dtype),
    "numpy.ndarray": Named("numpy", "ndarray"),
    "collections.OrderedDict": _Callable(_dict),
    "collections.defaultdict": _Callable(_default_dict),
    "collections.Counter": _Callable(_dict),
    "builtins.set": _Callable(set),
    "builtins.frozenset": _Callable(frozenset),
    "builtins.complex": _Callable(complex),
    "builtins.slice": _Callable(slice),
    "builtins.bytearray": _Callable(_bytearray),
    "_codecs.encode": _Callable(_encode),
    "copyreg._reconstructor": _Callable(_object),
}
