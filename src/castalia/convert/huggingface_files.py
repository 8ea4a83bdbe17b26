"""Files of a Hugging Face folder, one tensor at a time: read when it is asked for, written as it is made.

    model.safetensors | -00001-of-00007.safetensors + index.json | pytorch_model.bin ──open_folder──> Mapping of tensors
    parts (names, shapes, how to make them) ──write_folder──> shards of --shard-size, index.json

safetensors is 8 bytes of length, a JSON header of dtype, shape and place, and the bytes. It is read and written
here by plain file operations: nothing is mapped, so memory holds one tensor and not the file's pages.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from castalia.convert.torch_file import load_pt
from castalia.errors import UserError

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # as the safetensors library has it
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_FILES = ("model.safetensors", "pytorch_model.bin")


class TensorFiles(Mapping[str, Tensor]):
    """Tensors by name, each read anew whenever it is asked for.

    Args:
        places: name -> file.
    """

    def __init__(self, places: Mapping[str, Path]) -> None:
        self._places = dict(places)
        self._safetensors: dict[Path, dict[str, Any]] = {}
        self._pickles: dict[Path, Mapping[str, Tensor]] = {}

    def __getitem__(self, name: str) -> Tensor:
        path = self._places[name]
        if path.suffix == ".safetensors":
            if path not in self._safetensors:
                self._safetensors[path] = read_header(path)
            header = self._safetensors[path]
            if name in header:
                return _read_tensor(path, name, header[name])
        else:
            if path not in self._pickles:
                self._pickles[path] = load_tensors(path)
            if name in self._pickles[path]:
                return self._pickles[path][name]
        raise UserError(f"{path}: does not hold {name}, though the index says so: fetch both again")

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def open_folder(folder: Path) -> TensorFiles:
    """The tensors of a folder in Hugging Face format: safetensors where there are both, in one file or in shards.

    Raises:
        UserError: there are none, or a shard that the index names is missing.
    """
    for index, single in zip(_INDICES, _FILES, strict=True):
        if (folder / index).is_file():
            return TensorFiles(_indexed(folder / index))
        path = folder / single
        if path.is_file():
            return TensorFiles(dict.fromkeys(read_header(path) if path.suffix == ".safetensors" else load_tensors(path),
                                             path))  # fmt: skip
    raise UserError(
        f"{folder}: holds none of {', '.join((*_FILES, *_INDICES))}: give a folder with weights in Hugging Face format"
    )


def _indexed(index: Path) -> dict[str, Path]:
    try:
        entries = json.loads(index.read_bytes())["weight_map"]
        places = {str(name): index.with_name(str(file)) for name, file in entries.items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{index}: is damaged: fetch it again") from None
    for path in sorted(set(places.values())):
        if path.parent != index.parent or not path.is_file():
            raise UserError(f"{index}: names {path.name}, which is not beside it: fetch that file as well")
    return places


def load_tensors(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a file that torch.save wrote; nothing in it is run (see torch_file)."""
    content = load_pt(path)
    if not isinstance(content, Mapping) or not all(isinstance(t, Tensor) for t in content.values()):
        raise UserError(f"{path}: is no dictionary of tensors: give a file of weights")
    return content


def read_header(path: Path) -> dict[str, Any]:
    """What a .safetensors file says of its tensors, each held against the file's size.

    Raises:
        UserError: it is damaged, cut short, or quantised.
    """
    damaged = UserError(f"{path}: is damaged or cut short: fetch it again")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 + length or length > _LONGEST_HEADER:
            raise damaged
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise damaged from None
    found: dict[str, Any] = {}
    try:
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            if entry["dtype"] not in DTYPES:
                raise UserError(
                    f"{path}: {name} is stored as {entry['dtype']}: quantised weights cannot be imported, take the "
                    "release that they were made of"
                )
            bits = prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
            if not 0 <= begin <= end <= size - 8 - length or end - begin != bits:
                raise damaged
            found[name] = entry | {"start": 8 + length + begin}
    except (LookupError, TypeError, ValueError, AttributeError):
        raise damaged from None
    return found


def _read_tensor(path: Path, name: str, entry: Mapping[str, Any]) -> Tensor:
    begin, end = entry["data_offsets"]
    tensor = torch.empty(end - begin, dtype=torch.uint8)
    with path.open("rb", buffering=0) as file:
        file.seek(entry["start"])
        view, done = memoryview(tensor.numpy()), 0  # type: ignore[arg-type]
        while done < len(view):  # one read gives 2 GiB at most
            read = file.readinto(view[done:])
            if not read:
                raise UserError(f"{path}: ends within {name}: fetch it again")
            done += read
    return tensor.view(DTYPES[entry["dtype"]]).view(entry["shape"])


@dataclass(frozen=True)
class Part:
    """Tensors that are made together.

    Attributes:
        shapes: of each, by name.
        make: called once, when it is their turn to be written.
    """

    shapes: Mapping[str, tuple[int, ...]]
    make: Callable[[], Mapping[str, Tensor]]

    def size(self, dtype: torch.dtype) -> int:
        """Bytes."""
        return sum(prod(shape) for shape in self.shapes.values()) * dtype.itemsize


def write_folder(folder: Path, parts: Sequence[Part], dtype: torch.dtype, shard_size: int) -> list[Path]:
    """Write tensors as model.safetensors or, where that would be larger than `shard_size`, as shards with an index.

    A part is never divided, so one that is larger alone has a shard of that size.

    Args:
        folder: exists.
        parts: in the order of the files.
        dtype: that all tensors are written in.
        shard_size: bytes.

    Returns:
        The files.
    """
    shards: list[list[Part]] = [[]]
    for part in parts:
        if shards[-1] and sum(p.size(dtype) for p in shards[-1]) + part.size(dtype) > shard_size:
            shards.append([])
        shards[-1].append(part)
    if len(shards) == 1:
        return [_write_file(folder / _FILES[0], shards[0], dtype)]
    files: list[Path] = []
    places: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        files.append(_write_file(folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors", shard, dtype))
        places |= {name: files[-1].name for part in shard for name in part.shapes}
    total = sum(part.size(dtype) for part in parts)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / _INDICES[0]).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def _write_file(path: Path, parts: Sequence[Part], dtype: torch.dtype) -> Path:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in parts:
        for name, shape in part.shapes.items():
            begin, end = end, end + prod(shape) * dtype.itemsize
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            made = part.make()
            for name, shape in part.shapes.items():
                tensor = made[name]
                if tuple(tensor.shape) != shape:
                    raise UserError(f"{name}: is {list(tensor.shape)}, {list(shape)} was expected")
                file.write(memoryview(tensor.to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
            del made
        file.flush()
        os.fsync(file.fileno())
    return path
