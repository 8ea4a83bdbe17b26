"""A checkpoint, whoever wrote it -> its tensors and values by name, none of them read before it is asked for.

    a run, one checkpoint of it      torch.distributed.checkpoint's files
    .pt .pth .bin .ckpt, any other   torch.save, through the safe unpickler
    .safetensors                     header, then numbers
    *.index.json, or its folder      shards of either
    another folder                   every such file in it, by its name (GPT-NeoX's among them)

Names are joined by dots, as far down as containers go: `optimizer.state.3.exp_avg`.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from castalia.checkpoint import find_checkpoint, load_checkpoint, read_state
from castalia.checkpoint.layout import MANIFEST, step_of
from castalia.checkpoint.stream import CautiousReader
from castalia.convert.safe_pickle import Named, Placeholder, Storage
from castalia.convert.torch_file import load_pt
from castalia.errors import UserError

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")

# Longer rows of plain numbers or words are told by their length.
_SHORT = 16

_CONTAINERS = (Tensor, Mapping, list, tuple, Placeholder, np.ndarray)

# The names of safetensors' header (format of huggingface/safetensors).
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool, "C64": torch.complex64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}


@dataclass(frozen=True)
class Entry:
    """One tensor: what is known of it without reading it, and how to read it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    read: Callable[[], Tensor] = field(compare=False, repr=False)

    @property
    def numel(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)


@dataclass
class Contents:
    """What is in a checkpoint: tensors in their order, and everything else as text by name."""

    path: Path
    tensors: list[Entry] = field(default_factory=list)
    values: dict[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(entry.bytes for entry in self.tensors)


def open_contents(path: str | Path, step: int | None = None) -> Contents:
    """Look at a checkpoint.

    Args:
        path: see the head of this file.
        step: of a run's checkpoints; None: the newest.

    Raises:
        UserError: nothing that can be read is there, or it is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder: check the path")
    if step is not None and not _is_run(path):
        raise UserError(f"{path} is not a run: leave --step out")
    contents = Contents(path)
    try:
        if _is_run(path) or (path / MANIFEST).is_file():
            _castalia(contents, path, step)
        elif path.is_dir():
            _folder(contents, path)
        else:
            _file(contents, path, "")
    except RecursionError:
        raise UserError(f"{path}: its containers lie in one another too deeply: that is no checkpoint") from None
    return contents


def _is_run(path: Path) -> bool:
    if not path.is_dir() or (path / MANIFEST).is_file():
        return False
    return (path / "checkpoints").is_dir() or any(step_of(child.name) is not None for child in path.iterdir())


def _castalia(contents: Contents, path: Path, step: int | None) -> None:
    if not (path / MANIFEST).is_file():
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        found = find_checkpoint(folder, step, verify=False)
        if found is None:
            raise UserError(f"{path}: has no checkpoint yet: let the run save one, or name another")
        path = contents.path = found.path
    try:
        entries = CautiousReader(path).read_metadata().state_dict_metadata
    except Exception as error:  # a damaged pickle stumbles in any way
        raise UserError(f"{path / '.metadata'}: is damaged: choose the checkpoint of another step") from error
    for name, found_entry in entries.items():
        entry: Any = found_entry
        if hasattr(entry, "properties"):
            dtype, shape = entry.properties.dtype, tuple(entry.size)
            size = math.prod(shape) * dtype.itemsize
            read = partial(_read_castalia, path, name, shape, dtype)
            contents.tensors.append(Entry(name, shape, _plain(dtype), size, read))
    _walk(contents, read_state(path), "state", {})


def _read_castalia(path: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    load_checkpoint(path, {name: tensor}, only="\0")  # no name begins so: this tensor alone
    return tensor


def natural(name: str) -> list[Any]:
    """A key by which `layer_2` comes before `layer_10`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _folder(contents: Contents, path: Path) -> None:
    if (path / "latest").is_file():
        newest = path / Path((path / "latest").read_text(encoding="utf-8", errors="replace").strip()).name
        if newest.is_dir():
            contents.path = path = newest
    indices = sorted(path.glob("*.index.json"))
    if indices:
        _shards(contents, indices[0])
        return
    files = sorted((f for f in path.iterdir() if f.suffix in SUFFIXES and f.is_file()), key=lambda f: natural(f.name))
    if not files:
        raise UserError(f"{path}: holds no file that ends in {', '.join(SUFFIXES)}, and is no run: check the path")
    for file in files:
        _file(contents, file, file.stem if len(files) > 1 else "")


def _file(contents: Contents, path: Path, prefix: str) -> None:
    if path.name.endswith(".index.json"):
        _shards(contents, path)
    elif path.suffix == ".safetensors":
        _safetensors(contents, path, prefix)
    else:
        _walk(contents, load_pt(path), prefix, {})


def _shards(contents: Contents, index: Path) -> None:
    try:
        there = json.loads(index.read_bytes())["weight_map"]
        names = sorted({str(file) for file in there.values()}, key=natural)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: is no index of shards, or is damaged: fetch it again") from error
    if any(Path(name).name != name for name in names):
        raise UserError(f"{index}: names files outside of its folder: fetch it again from where you trust")
    for name in names:
        if not (index.parent / name).is_file():
            raise UserError(f"{index.parent / name}: is missing, though {index.name} names it: fetch it")
        _file(contents, index.parent / name, "")
    missing = there.keys() - {entry.name for entry in contents.tensors}
    if missing:
        raise UserError(f"{index}: names {min(missing)}, which is not in {there[min(missing)]}: fetch both again")


def _safetensors(contents: Contents, path: Path, prefix: str) -> None:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError
            header = json.loads(file.read(length))
        for key, value in (header.pop("__metadata__", None) or {}).items():
            contents.values[_join(prefix, f"__metadata__.{key}")] = _told(value)
        for name, about in header.items():
            dtype, shape = _DTYPES[about["dtype"]], tuple(map(int, about["shape"]))
            start, end = (8 + length + int(offset) for offset in about["data_offsets"])
            exact = end - start == math.prod(shape) * dtype.itemsize
            if not exact or min(shape, default=0) < 0 or not 8 + length <= start <= end <= size:
                raise ValueError
            read = partial(_read_span, path, size, start, end, dtype, shape)
            contents.tensors.append(Entry(_join(prefix, name), shape, _plain(dtype), end - start, read))
    except (ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise UserError(f"{path}: is not a safetensors file, or is damaged: fetch it again") from error


def _read_span(path: Path, size: int, start: int, end: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if start == end:
        return torch.empty(shape, dtype=dtype)
    part = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[start:end]
    return (part if start % dtype.itemsize == 0 else part.clone()).view(dtype).view(shape)


def _walk(contents: Contents, value: Any, name: str, seen: dict[int, str]) -> None:
    """Note every tensor and plain value below a container; what stands in several places is told once."""
    if isinstance(value, Storage):
        value = torch.empty(0, dtype=value.dtype).set_(value.memory)
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor):
        shape, size = tuple(value.shape), value.numel() * value.element_size()
        read = partial(_itself, value)
        contents.tensors.append(Entry(name or "tensor", shape, _plain(value.dtype), size, read))
        return
    parts = list(_parts(value))
    if not parts:
        contents.values[name or "value"] = _told(value)
        return
    if id(value) in seen:
        contents.values[name] = f"the same as {seen[id(value)] or 'the whole'}"
        return
    seen[id(value)] = name
    if isinstance(value, Placeholder):
        contents.values[_join(name, "(class)")] = str(value.kind)
    for key, part in parts:
        _walk(contents, part, _join(name, key), seen)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a container holds; nothing for a plain value and for a long row of them."""
    if isinstance(value, Mapping):
        yield from ((str(key), part) for key, part in value.items())
    elif isinstance(value, Placeholder):
        for group in (value.attributes, value.entries):
            yield from ((str(key), part) for key, part in group.items())
        for key, row in (("(arguments)", value.arguments), ("(items)", value.items)):
            if row:
                yield key, row
        if value.state is not None:
            yield "(state)", value.state
    elif isinstance(value, list | tuple) and any(isinstance(part, _CONTAINERS) for part in value):
        yield from ((str(index), part) for index, part in enumerate(value))


def _told(value: Any) -> str:
    """A plain value in a line of text."""
    if isinstance(value, list | tuple | set | frozenset) and len(value) > _SHORT:
        return f"{type(value).__name__} of {len(value):,}"
    if isinstance(value, str | bytes | bytearray) and len(value) > 200:
        return f"{type(value).__name__} of {len(value):,}: {value[:40]!r}..."
    if isinstance(value, Placeholder):
        return str(value.kind)
    text = str(value) if isinstance(value, Named) else repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
