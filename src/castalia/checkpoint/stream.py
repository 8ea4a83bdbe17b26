"""The files of torch.distributed.checkpoint, hashed on their way to disk and read with suspicion.

Hashing what is handed to the disk costs no second read, and catches a disk that did not keep
what it was given. (Hashing in a second thread was no faster on two cores.)
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from castalia.checkpoint.layout import FileRecord


class HashingWriter(FileSystemWriter):
    """Writes as its parent does; `records` then says size and SHA-256 of each file this rank wrote."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, single_file_per_rank=True, sync_files=True, thread_count=1)
        self._files = _HashingFileSystem()
        self.fs = self._files

    @property
    def records(self) -> dict[str, FileRecord]:
        """By file name."""
        return self._files.records


class _HashingFileSystem(FileSystem):
    def __init__(self) -> None:
        self.records: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        if "r" in mode:
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with Path(path).open("wb", buffering=1 << 20) as file:
            hashing = _HashingStream(file)
            try:
                yield hashing
                hashing.flush()
            except BaseException:
                # torch's writer turns an OSError of the stream into a RuntimeError without its reason.
                if hashing.error is not None:
                    raise hashing.error from None
                raise
            self.records[Path(path).name] = FileRecord(hashing.size, hashing.sha.hexdigest())

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


class _HashingStream(io.RawIOBase):
    """A file opened for writing that only appends."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha, self.size = hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Append."""
        view = memoryview(data).cast("B")
        try:
            self._file.write(view)
        except OSError as error:
            self.error = error
            raise
        self.sha.update(view)
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        """Hand everything to the system."""
        if self._file.closed:
            return
        try:
            self._file.flush()
        except OSError as error:
            self.error = error
            raise

    def tell(self) -> int:
        """Bytes so far."""
        return self.size

    def writable(self) -> bool:
        """Yes."""
        return True

    def fileno(self) -> int:
        """The system's handle, for fsync, which covers only what has been flushed."""
        self.flush()
        return self._file.fileno()

    def close(self) -> None:
        """Flush; the file itself is closed by whoever opened it."""
        if not self.closed:
            self.flush()
        super().close()


class CautiousReader(FileSystemReader):
    """Reads as its parent does, but `.metadata` (a pickle) may name nothing beyond what describes tensors."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index of the checkpoint's tensors.

        Raises:
            pickle.UnpicklingError: the file asks for something else.
        """
        with open(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            metadata = cast(Metadata, _MetadataUnpickler(file).load())
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    _ALLOWED = frozenset(
        {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("collections", "OrderedDict"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),
            *(
                ("torch.distributed.checkpoint.metadata", name)
                for name in (
                    "Metadata",
                    "MetadataIndex",
                    "StorageMeta",
                    "TensorProperties",
                    "TensorStorageMetadata",
                    "BytesStorageMetadata",
                    "ChunkStorageMetadata",
                    "_MEM_FORMAT_ENCODING",
                )
            ),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and name.islower()
        found = super().find_class(module, name) if dtype or (module, name) in self._ALLOWED else None
        if found is None or (dtype and not isinstance(found, torch.dtype)):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return found
