"""A `.pt` file -> what is in it: the pickle through `safe_pickle`, the numbers mapped, not read.

    zip archive   NAME/data.pkl, NAME/data/0, NAME/data/1, ...        (torch >= 1.6)
    plain         magic, version, machine, pickle, keys, then for each key: count, numbers

Tensors lie in the file's pages: what is not looked at is not read, so that a file may be larger than
memory. Writing into them does not change the file.
"""

from __future__ import annotations

import io
import mmap
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from castalia.convert.safe_pickle import Refused, SafeUnpickler, Storage, StorageKind
from castalia.errors import UserError

_MAGIC = 0x1950A86A20F9469CFC6C  # torch.save before archives
_ZIP_HEADER = struct.Struct("<26xHH")  # of a member: the lengths of its name and its extra field
_DAMAGED = "is not a file of tensors, or is damaged: fetch it again"


def load_pt(path: Path) -> Any:
    """Load a file that torch.save wrote, in either format; tensors are on the CPU, mapped from the file.

    Tensors, numpy arrays and scalars, and plain containers are what they were. Objects of other libraries
    become `Placeholder`s, with their fields; Parameters become Tensors.

    Raises:
        UserError: the file is missing or damaged, or names what only a file that means harm names.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if zipfile.is_zipfile(file):
                return _from_archive(path, file, size)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _from_plain(path, content, size)
    except Refused as error:
        raise UserError(f"{path}: {error}") from error
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file: check the path") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a damaged file makes the unpickler stumble in any way
        raise UserError(f"{path}: {_DAMAGED}") from error


def _from_archive(path: Path, file: BinaryIO, size: int) -> Any:
    with zipfile.ZipFile(file) as archive:
        members = {item.filename: item for item in archive.infolist()}
        pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
        if not pickles:
            raise Refused("is an archive, but not one of torch's: it holds no pickle of what it is")
        main = min(pickles, key=lambda name: name.count("/"))
        folder = main.removesuffix("data.pkl")

        def span(name: str) -> tuple[int, int]:
            item = members[name]
            file.seek(item.header_offset)
            name_length, extra_length = _ZIP_HEADER.unpack(file.read(_ZIP_HEADER.size))
            start = item.header_offset + _ZIP_HEADER.size + name_length + extra_length
            if item.compress_type != zipfile.ZIP_STORED or start + item.file_size > size:
                raise Refused(f"holds {name} compressed, or not whole: {_DAMAGED}")
            return start, item.file_size

        def content(name: str) -> bytes:
            start, length = span(name)
            file.seek(start)
            return file.read(length)

        if f"{folder}byteorder" in members and content(f"{folder}byteorder") != b"little":
            raise Refused("was written on a machine with another byte order")
        whole = _mapped(path, size)
        cache: dict[str, torch.UntypedStorage] = {}

        def storage(reference: Any) -> Storage:
            key, dtype, count = _reference(reference)
            if key not in cache:
                start, length = span(f"{folder}data/{key}")
                cache[key] = _part(whole, start, length, dtype)
            if count * dtype.itemsize > cache[key].nbytes():
                raise Refused(f"promises {count} numbers in {key}, which has {cache[key].nbytes()} bytes")
            return Storage(cache[key], dtype)

        return SafeUnpickler(io.BytesIO(content(main)), storage).load()


def _from_plain(path: Path, content: mmap.mmap, size: int) -> Any:
    def read(storage: Callable[[Any], Any]) -> Any:
        return SafeUnpickler(content, storage).load()

    def nothing(reference: Any) -> Any:
        raise Refused(_DAMAGED)

    if read(nothing) != _MAGIC:
        raise Refused(_DAMAGED)
    read(nothing), read(nothing)  # the protocol's number and the machine
    begin = content.tell()
    kinds: dict[str, torch.dtype] = {}

    def noted(reference: Any) -> Any:
        if _is_module(reference):
            return reference[1]
        key, dtype, count = _reference(reference)
        kinds[key] = dtype
        return Storage(torch.UntypedStorage(count * dtype.itemsize, device="meta"), dtype)

    # Where the numbers of each storage lie follows from the sizes of those before it, which come after the pickle.
    read(noted)
    keys, at = read(nothing), content.tell()
    whole = _mapped(path, size)
    places: dict[str, torch.UntypedStorage] = {}
    for key in keys:
        (count,) = struct.unpack("<q", content[at : at + 8])
        length = count * kinds[key].itemsize
        if count < 0 or at + 8 + length > size:
            raise Refused(_DAMAGED)
        places[key] = _part(whole, at + 8, length, kinds[key])
        at += 8 + length

    def placed(reference: Any) -> Any:
        if _is_module(reference):
            return reference[1]
        key, dtype, _ = _reference(reference)
        start, length = 0, places[key].nbytes()
        if len(reference) > 5 and reference[5] is not None:  # a part of another storage
            _, offset, count = reference[5]
            start, length = offset * dtype.itemsize, count * dtype.itemsize
            if start < 0 or length < 0 or start + length > places[key].nbytes():
                raise Refused(_DAMAGED)
        return Storage(_part(places[key], start, length, dtype), dtype)

    content.seek(begin)
    return read(placed)


def _is_module(reference: Any) -> bool:
    """A class of torch.nn, which the plain format keeps together with its source text."""
    return isinstance(reference, tuple) and len(reference) == 4 and reference[0] == "module"


def _reference(reference: Any) -> tuple[str, torch.dtype, int]:
    """Key, kind and count of numbers, from torch's persistent id."""
    if not (isinstance(reference, tuple) and len(reference) >= 5 and reference[0] in ("storage", b"storage")):
        raise Refused("refers to something outside of it that is no storage of torch's")
    kind, key, _, count = reference[1:5]
    if not isinstance(kind, StorageKind) or not isinstance(count, int) or count < 0:
        raise Refused(f"holds numbers of a kind that is not read ({kind})")
    return str(key), kind.dtype, count


def _mapped(path: Path, size: int) -> torch.UntypedStorage:
    mapped: Any = torch.UntypedStorage.from_file(str(path), False, size)
    return cast(torch.UntypedStorage, mapped)


def _part(whole: torch.UntypedStorage, start: int, length: int, dtype: torch.dtype) -> torch.UntypedStorage:
    if length == 0:
        return torch.UntypedStorage(0)
    if start == 0 and length == whole.nbytes():
        return whole
    part = whole[start : start + length]
    return part if part.data_ptr() % dtype.itemsize == 0 else part.clone()
