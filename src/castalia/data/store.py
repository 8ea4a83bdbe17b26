"""Token ids on disk: GPT-NeoX's memory-mapped format, read and written byte for byte.

    PREFIX.bin   every sequence's ids, end to end, without a header
    PREFIX.idx   "MMIDIDX" header | sizes i32[S] | pointers i64[S] | doc_idx i64[D]
    PREFIX.json  what the two files mean (docs/contracts.md, section 5); may be absent

The format (GPT-NeoX v1.0 and v2.0, and Megatron-LM for token dtypes) has no checksum, so
`TokenStore` checks everything that the index implies before it hands out a single id; opened
lazily, it checks the ends, and each entry when it is used, so that any corpus opens at once.
`StoreWriter` writes under `.partial` names and brings the index into place only when the
whole is on disk: whatever kills it, nothing is left that looks finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from castalia.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
OLD_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, entries of doc_idx
# GPT-NeoX's codes. Megatron-core swaps the two floating-point ones; token dtypes agree.
DTYPES: Mapping[int, np.dtype[Any]] = {
    code: np.dtype(name) for code, name in enumerate(("<u1", "<i1", "<i2", "<i4", "<i8", "<f4", "<f8", "<u2"), start=1)
}
MEGATRON_DTYPES: Mapping[int, np.dtype[Any]] = {**DTYPES, 6: DTYPES[7], 7: DTYPES[6]}
UINT16_VOCABULARY = 65500  # GPT-NeoX's threshold: vocabularies below it are stored as uint16
_CHUNK = 1 << 17  # entries handled at once: a large index needs little memory, and a part stays in the cache
_BLOCK, _NUM_BLOCKS = 1 << 16, 64  # bytes and number of the parts of the .bin that the fingerprint covers
Prefix = str | os.PathLike[str]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype GPT-NeoX stores ids of an (unpadded) vocabulary in: uint16 or int32."""
    return DTYPES[8] if vocab_size < UINT16_VOCABULARY else DTYPES[4]


def store_files(prefix: Prefix) -> tuple[Path, Path, Path]:
    """The names PREFIX.bin, PREFIX.idx and PREFIX.json."""
    base = os.fspath(prefix)
    return Path(base + ".bin"), Path(base + ".idx"), Path(base + ".json")


def _partial(path: Path) -> Path:
    return Path(f"{path}.partial")


def is_finished(prefix: Prefix) -> bool:
    """Whether a whole data set stands under this prefix.

    `PREFIX.json.partial` without `PREFIX.json` means that the writer was killed between
    its last renames; such a data set counts as unfinished.
    """
    bin_path, idx_path, info_path = store_files(prefix)
    if not (bin_path.exists() and idx_path.exists()):
        return False
    return info_path.exists() or not _partial(info_path).exists()


class TokenStore:
    """Reader of PREFIX.bin / PREFIX.idx, memory-mapped; safe to share between threads.

    Args:
        prefix: path without .bin or .idx.
        lazy: check the sizes of the files and both ends of the index now, in constant time, and every
            other entry when it is used, instead of the whole index and its SHA-256 in PREFIX.json.
        dtypes: what the index's codes mean; `MEGATRON_DTYPES` for floating-point data of Megatron-LM.

    Attributes:
        lazy: as given.
        dtype: dtype of the ids.
        sizes: int32 [S], ids per sequence.
        pointers: int64 [S], byte offset of each sequence in the .bin file.
        doc_idx: int64 [D], sequence numbers at which documents start, then the end.
        tokens: the whole .bin file as one array of `dtype`.
        info: the parsed PREFIX.json, or None.

    Raises:
        UserError: a file is missing, truncated, of another format, or contradicts itself.
    """

    def __init__(self, prefix: Prefix, lazy: bool = False, dtypes: Mapping[int, np.dtype[Any]] = DTYPES) -> None:
        self.prefix = os.fspath(prefix)
        self._dtypes = dtypes
        self.lazy = lazy
        self.bin_path, self.idx_path, info_path = store_files(prefix)
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise UserError(
                    f"{path} does not exist: give the prefix of a token data set (the path without "
                    f".bin or .idx), or make one with `castalia prepare`"
                )
        if not is_finished(prefix):
            raise UserError(
                f"{self.prefix} was left unfinished by an interrupted `castalia prepare`: run the same command again"
            )
        self._index: np.ndarray = _map(self.idx_path, np.dtype("u1"))
        self.dtype, self._num_sequences, num_doc_idx = self._read_header()
        size_end = HEADER.size + 4 * self._num_sequences
        pointer_end = size_end + 8 * self._num_sequences
        self.sizes: np.ndarray = self._index[HEADER.size : size_end].view("<i4")
        self.pointers: np.ndarray = self._index[size_end:pointer_end].view("<i8")
        self.doc_idx: np.ndarray = self._index[pointer_end : pointer_end + 8 * num_doc_idx].view("<i8")
        self._num_tokens = self._check_ends() if lazy else self._check_arrays()
        self.tokens: np.ndarray = _map(self.bin_path, self.dtype)
        self._fingerprint: str | None = None
        self.info: dict[str, Any] | None = self._read_info(info_path) if info_path.exists() else None
        if not lazy:
            self._check_digest()
        vocabulary = (self.info or {}).get("tokenizer", {}).get("vocab_size", 0)
        if vocabulary and (self.dtype.kind not in "iu" or vocabulary - 1 > np.iinfo(self.dtype).max):
            raise self._corrupt(f"its dtype {self.dtype.name} does not hold {vocabulary} ids")

    # -- opening and checking ------------------------------------------------------------

    def _read_header(self) -> tuple[np.dtype[Any], int, int]:
        path, found = self.idx_path, len(self._index)
        head = self._index[: HEADER.size].tobytes()
        if head.startswith(OLD_MAGIC):
            raise UserError(
                f"{path} is in the old lazy/cached format (TNTIDX): write it anew with "
                f"`castalia data convert {self.prefix} --output PREFIX`"
            )
        if not head.startswith(MAGIC[: len(head)]):
            raise UserError(f"{path} is not a token index (it does not begin with MMIDIDX): give another prefix")
        if found < HEADER.size:
            raise UserError(
                f"{path} is truncated: its header takes {HEADER.size} bytes and {found} were found; "
                f"prepare or copy it again"
            )
        _, version, code, num_sequences, num_doc_idx = HEADER.unpack(head)
        if version != VERSION:
            raise UserError(
                f"{path} is an .idx of another version ({version}; this reads version {VERSION}): "
                "prepare the data again"
            )
        if code not in self._dtypes:
            raise UserError(f"{path} has the unknown dtype code {code} (known: 1 to 8): prepare or copy it again")
        expected = HEADER.size + 12 * num_sequences + 8 * num_doc_idx
        if found != expected:
            what = "is truncated" if found < expected else "is longer than it says"
            raise UserError(
                f"{path} {what}: {expected} bytes expected for {num_sequences} sequences, {found} found; "
                f"prepare or copy it again"
            )
        return self._dtypes[code], num_sequences, num_doc_idx

    def check(self) -> None:
        """Check the whole index, as opening does unless `lazy`: linear in the number of sequences.

        Raises:
            UserError: it contradicts itself, the .bin or PREFIX.json.
        """
        self._check_arrays()
        self._check_digest()

    def _check_arrays(self) -> int:
        """Check sizes, pointers and doc_idx against each other and the .bin; return the number of ids."""
        total = 0
        # Read, not mapped: the pages of a map would count as this process's memory.
        for sizes, pointers in zip(self._parts(self.sizes), self._parts(self.pointers), strict=True):
            ends = np.cumsum(sizes, dtype=np.int64)
            starts = (ends - sizes + total) * self.dtype.itemsize
            if sizes.min() < 0 or not np.array_equal(starts, pointers):
                raise self._corrupt("its sizes and pointers disagree")
            total += int(ends[-1])
        self._check_bin(total)
        previous = 0
        for first, part in enumerate(self._parts(self.doc_idx)):
            if (first == 0 and part[0] != 0) or part[0] < previous or (part[1:] < part[:-1]).any():
                raise self._corrupt("document starts out of order")
            previous = int(part[-1])
        if previous > len(self):
            raise self._corrupt("document starts out of order")
        return total

    def _parts(self, array: np.ndarray) -> Iterator[np.ndarray]:
        """An array of the index, read in parts that are aligned in memory."""
        start = array.ctypes.data - self._index.ctypes.data
        with open(self.idx_path, "rb") as file:
            file.seek(start)
            for done in range(0, len(array), _CHUNK):
                part = np.fromfile(file, array.dtype, min(_CHUNK, len(array) - done))
                if len(part) < min(_CHUNK, len(array) - done):
                    raise self._corrupt("it was cut short while it was read")
                yield part

    def _check_ends(self) -> int:
        """What can be known of the index in constant time; return the number of ids."""
        if not self._num_sequences:
            self._check_bin(0)
            return 0
        for i in (0, self._num_sequences - 1):
            self._check_entry(i)
        end = int(self.pointers[-1]) + int(self.sizes[-1]) * self.dtype.itemsize
        self._check_bin(end // self.dtype.itemsize)
        if len(self.doc_idx) and (self.doc_idx[0] != 0 or not 0 <= self.doc_idx[-1] <= len(self)):
            raise self._corrupt("document starts out of order")
        return end // self.dtype.itemsize

    def _check_entry(self, i: int) -> None:
        """Check that sequence `i` begins in its place and ends where the next one begins."""
        start, size, itemsize = int(self.pointers[i]), int(self.sizes[i]), self.dtype.itemsize
        # The end of the last one is held against the .bin when the store is opened.
        next_start = int(self.pointers[i + 1]) if i + 1 < len(self) else start + size * itemsize
        if min(start, size) < 0 or start % itemsize or (i == 0 and start) or start + size * itemsize != next_start:
            raise self._corrupt("its sizes and pointers disagree")

    def _check_bin(self, num_tokens: int) -> None:
        expected, found = num_tokens * self.dtype.itemsize, self.bin_path.stat().st_size
        if expected != found:
            what = "is truncated" if found < expected else "is longer than its index says"
            raise UserError(
                f"{self.bin_path} {what}: {expected} bytes expected, {found} found; prepare or copy it again"
            )

    def _check_digest(self) -> None:
        if self.info is not None and self.info.get("sha256") not in (None, self.fingerprint):
            raise UserError(
                f"{self.prefix}.json does not belong to {self.idx_path} (it names another SHA-256): "
                "prepare or copy both again"
            )

    def _corrupt(self, why: str) -> UserError:
        return UserError(f"{self.idx_path} is corrupt ({why}): prepare or copy it again")

    def _read_info(self, path: Path) -> dict[str, Any]:
        try:
            info = json.loads(path.read_bytes())
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON ({error}): prepare the data set again") from None
        if not isinstance(info, dict):
            raise UserError(f"{path} is not a JSON object: prepare the data set again")
        if info.get("version") != 1:
            raise UserError(f"{path} has version {info.get('version')!r}, this reads version 1: prepare it again")
        return info

    # -- reading -------------------------------------------------------------------------

    def __len__(self) -> int:
        return self._num_sequences

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Any, ...]]:
        return TokenStore, (self.prefix, self.lazy, self._dtypes)

    @property
    def num_tokens(self) -> int:
        """Ids in all sequences together."""
        return self._num_tokens

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the index file, in hexadecimal; computed once, when first asked for."""
        if self._fingerprint is None:
            with open(self.idx_path, "rb") as file:
                self._fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
        return self._fingerprint

    def get(self, i: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Ids [offset, offset + length) of sequence `i`, as a read-only view of the file.

        Raises:
            IndexError: the sequence or the range does not exist (GPT-NeoX's reader would
                silently run on into the next document).
            UserError: opened lazily, and the index contradicts itself about this sequence.
        """
        if not 0 <= i < self._num_sequences:
            raise IndexError(f"sequence {i} of {self._num_sequences} in {self.prefix}")
        if self.lazy:
            self._check_entry(i)
        size = int(self.sizes[i])
        if length is None:
            length = size - offset
        if offset < 0 or length < 0 or offset + length > size:
            raise IndexError(f"ids [{offset}, {offset + length}) of sequence {i}, which has {size}, in {self.prefix}")
        start = int(self.pointers[i]) // self.dtype.itemsize + offset
        return self.tokens[start : start + length]


def data_fingerprint(store: TokenStore) -> str:
    """What a checkpoint keeps to know its data again: a SHA-256 over the index and a sample of the ids.

    It covers the digest of the .idx, the size of the .bin, and 64 evenly spaced blocks of 64 KiB
    of it, the first and the last among them: all ids up to 4 MiB, and 4 MiB of terabytes. Of a store
    that was opened lazily the index is sampled like the ids. It does not depend on PREFIX.json,
    which data of other tools lacks.
    """
    index = f"sampled {_sampled_digest(store.idx_path)}" if store.lazy else store.fingerprint
    size = store.bin_path.stat().st_size
    return hashlib.sha256(f"{index} {size} {_sampled_digest(store.bin_path)}".encode()).hexdigest()


def _sampled_digest(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if size <= _BLOCK * _NUM_BLOCKS:
            digest.update(file.read())
        else:
            for k in range(_NUM_BLOCKS):
                file.seek(k * (size - _BLOCK) // (_NUM_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def _map(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    """Map a file read-only; an empty file, which cannot be mapped, becomes an empty array."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


class StoreWriter:
    """Writes a data set, one sequence per document, in constant memory.

    Use as a context manager and call `finish` inside it; leaving without it (an exception,
    or simply no call) removes what was written, unless `keep` is set. An older data set under
    the same prefix stays readable until `finish` replaces it.

        with StoreWriter("tokens", np.uint16) as writer:
            for ids in documents:
                writer.add_document(ids)
            writer.finish({"version": 1, ...})

    Args:
        prefix: PREFIX.
        dtype: of the ids.
        resume: go on with what a writer left behind; `start_at` must then be called first.

    Attributes:
        keep: leave the unfinished files where they are, for a writer with `resume`.

    Raises:
        UserError: another process is writing under this prefix, or an id does not fit.
    """

    def __init__(self, prefix: Prefix, dtype: np.typing.DTypeLike, resume: bool = False) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        codes = [code for code, known in DTYPES.items() if known == self.dtype]
        if not codes:
            raise ValueError(f"{self.dtype} cannot be stored in a token data set")
        self._code = codes[0]
        self.bin_path, self.idx_path, self.info_path = store_files(prefix)
        self.bin_path.parent.mkdir(parents=True, exist_ok=True)
        self._num_documents = self._num_tokens = 0
        self.keep = False
        self._bin_digest = hashlib.sha256()
        self._partials: list[Path] = []
        self._renaming = False
        self._file: BinaryIO | None = self._open_locked()
        # The sizes wait in a file of their own, which the index is made of at the end.
        self._sizes_path = Path(f"{self.prefix}.sizes.partial")
        self._sizes = open(self._sizes_path, "r+b" if resume and self._sizes_path.exists() else "w+b")  # noqa: SIM115
        self._partials.append(self._sizes_path)
        if not resume:
            self._file.truncate(0)

    def start_at(self, documents: int, tokens: int) -> bool:
        """Go on after so many documents and tokens; what lies behind them is cut off.

        Returns:
            Whether so much is there; if not, nothing is changed and writing begins at nothing.
        """
        assert self._file is not None
        size = tokens * self.dtype.itemsize
        there = os.fstat(self._file.fileno()).st_size >= size
        there = there and os.fstat(self._sizes.fileno()).st_size >= 4 * documents
        if not there:
            documents = tokens = size = 0
        self._file.truncate(size)
        self._sizes.truncate(4 * documents)
        self._file.seek(0)
        for start in range(0, size, _CHUNK):
            self._bin_digest.update(self._file.read(min(_CHUNK, size - start)))
        self._file.seek(size)
        self._sizes.seek(4 * documents)
        self._num_documents, self._num_tokens = documents, tokens
        return there

    def sync(self) -> None:
        """Bring what was written to the disk."""
        assert self._file is not None
        for file in (self._file, self._sizes):
            file.flush()
            os.fsync(file.fileno())

    def _open_locked(self) -> BinaryIO:
        """Open PREFIX.bin.partial under an exclusive lock, so that two writers never mix."""
        import fcntl

        path = _partial(self.bin_path)
        while True:
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=1 << 20)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The holder before us may have renamed the file between our open and our lock.
                same = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
            except FileNotFoundError:
                same = False
            except BlockingIOError:
                file.close()
                raise UserError(
                    f"another process is writing {self.bin_path}: wait for it, or choose another output"
                ) from None
            if same:
                self._partials.append(path)
                return file
            file.close()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    @property
    def num_documents(self) -> int:
        return self._num_documents

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    @property
    def bin_sha256(self) -> str:
        """SHA-256 of the ids written so far, in hexadecimal: of PREFIX.bin, once all are."""
        return self._bin_digest.hexdigest()

    def add_document(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append one document of ids as one sequence."""
        self.add_documents([ids])

    def add_documents(self, documents: Iterable[Sequence[int] | np.ndarray]) -> None:
        """Append several documents, each as one sequence."""
        if self._file is None:
            raise ValueError("the writer is closed")
        for ids in documents:
            part = self._convert(ids)
            if part.size > 2**31 - 1:
                raise UserError(f"a document of {part.size} tokens does not fit the format (2^31 - 1): split it up")
            self._file.write(part.data)
            self._bin_digest.update(part.data)
            self._sizes.write(part.size.to_bytes(4, "little"))
            self._num_documents += 1
            self._num_tokens += part.size

    def add_encoded(self, ids: np.ndarray, sizes: np.ndarray) -> None:
        """Append several documents end to end: ids [total] of the data set's dtype, sizes int32 [documents]."""
        if self._file is None:
            raise ValueError("the writer is closed")
        if ids.dtype != self.dtype or int(sizes.sum()) != ids.size:
            raise ValueError(f"{ids.size} ids of {ids.dtype} do not make documents of {sizes.sum()} {self.dtype}")
        self._file.write(ids.data)
        self._bin_digest.update(ids.data)
        self._sizes.write(sizes.astype("<i4").tobytes())
        self._num_documents += len(sizes)
        self._num_tokens += ids.size

    def _convert(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        try:
            if not isinstance(ids, np.ndarray):
                return np.array(ids, self.dtype)  # numpy itself refuses an int that does not fit
            if self.dtype.kind in "iu" and ids.size and ids.dtype != self.dtype:
                limits = np.iinfo(self.dtype)
                if ids.min() < limits.min or ids.max() > limits.max:
                    raise OverflowError
        except OverflowError:
            raise UserError(
                f"a token id does not fit {self.dtype.name}, the dtype of {self.bin_path}: "
                f"check the tokenizer's vocabulary size"
            ) from None
        return np.ascontiguousarray(ids, self.dtype)

    def finish(self, info: Mapping[str, Any] | None = None, attachments: Mapping[str, bytes] | None = None) -> str:
        """Put the data set in place: everything to disk first, then renames, PREFIX.json last.

        Args:
            info: content of PREFIX.json, to which `sha256` (of the index) and `bin_sha256` are added;
                None: no such file.
            attachments: further files beside it, by the ending after PREFIX (`.tokenizer.json`).

        Returns:
            The SHA-256 of the index.
        """
        if self._file is None:
            raise ValueError("the writer is closed")
        self._file.flush()
        os.fsync(self._file.fileno())
        fingerprint = self._write_index(_partial(self.idx_path))
        targets = [Path(self.prefix + ending) for ending in attachments or {}]
        for path, content in zip(targets, (attachments or {}).values(), strict=True):
            self._write_partial(path, content)
        if info is not None:
            digests = {"sha256": fingerprint, "bin_sha256": self.bin_sha256}
            text = json.dumps({**info, **digests}, indent=2, ensure_ascii=False) + "\n"
            self._write_partial(self.info_path, text.encode())
        # From here a kill leaves no index, or an index beside PREFIX.json.partial: unfinished.
        self._renaming = True
        self.info_path.unlink(missing_ok=True)
        self.idx_path.unlink(missing_ok=True)
        for path in (*targets, self.bin_path, self.idx_path):
            os.replace(_partial(path), path)
        if info is not None:
            os.replace(_partial(self.info_path), self.info_path)
        else:
            _partial(self.info_path).unlink(missing_ok=True)
        self._sizes_path.unlink(missing_ok=True)
        _sync_folder(self.bin_path.parent)
        self._partials.clear()
        self._close()
        return fingerprint

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        self._sizes.close()

    def abort(self) -> None:
        """Remove what was written, unless `finish` was reached or it is to be kept."""
        if self._file is None:
            return
        if self.keep and not self._renaming:
            self._close()
            return
        # Interrupted between the renames of `finish`: the index must not stay without its PREFIX.json.
        for path in (*([self.idx_path] if self._renaming else []), *self._partials):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a full disk cannot take what was still held back
            self._close()

    def _write_partial(self, path: Path, content: bytes) -> None:
        self._partials.append(_partial(path))
        with open(_partial(path), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def _write_index(self, path: Path) -> str:
        self._partials.append(path)
        self._sizes.flush()
        sizes = _map(self._sizes_path, np.dtype("<i4"))
        digest = hashlib.sha256()
        with open(path, "wb") as file:

            def emit(data: bytes) -> None:
                file.write(data)
                digest.update(data)

            emit(HEADER.pack(MAGIC, VERSION, self._code, len(sizes), len(sizes) + 1))
            for start in range(0, len(sizes), _CHUNK):
                emit(sizes[start : start + _CHUNK].astype("<i4").tobytes())
            total = 0
            for start in range(0, len(sizes), _CHUNK):
                part = sizes[start : start + _CHUNK].astype(np.int64)
                ends = np.cumsum(part)
                emit(((ends - part + total) * self.dtype.itemsize).astype("<i8").tobytes())
                total += int(ends[-1])
            for start in range(0, len(sizes) + 1, _CHUNK):
                emit(np.arange(start, min(start + _CHUNK, len(sizes) + 1), dtype="<i8").tobytes())
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
