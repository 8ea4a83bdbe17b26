"""Columns of .parquet and .arrow files -> blocks, by way of pyarrow.

    batches of rows ──one column──> Arrow's string array ──its buffer, its offsets──> Block

A string array is already the texts one after another with their bounds, so no row is touched
in Python; only columns of lists of strings are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from castalia.data.sources.blocks import Block, Gatherer, SourceOptions, damaged, too_big
from castalia.errors import UserError

_ROWS = 1024  # in a batch of .parquet: some megabytes of usual documents


def table_blocks(file: Any, kind: str, name: str, options: SourceOptions, block_size: int) -> Iterator[Block]:
    """The blocks of a .parquet or .arrow file."""
    try:
        import pyarrow as pa
    except ImportError:
        raise UserError(f"{name} needs a package to be read: pip install 'castalia[parquet]'") from None
    texts = Gatherer("texts", name, block_size)
    row = 0
    try:
        for batch in (_parquet if kind == "parquet" else _arrow)(file, name, options.text_key):
            batch.validate(full=True)  # a damaged file may hold offsets that point anywhere
            column = batch.column(options.text_key)
            data, lengths = _texts(column, f"{name}, row {row} and after", options)
            if block := texts.add(data, lengths=lengths):
                yield block
            row += len(column)
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError, KeyError, TypeError, OverflowError) as error:
        raise damaged(name, error) from None
    if block := texts.flush():
        yield block


def _parquet(file: Any, name: str, key: str) -> Iterator[Any]:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(file, page_checksum_verification=True, memory_map=False)
    _has_column(table.schema_arrow.names, name, key)
    # Its footer is trusted by pyarrow for sizes to set aside, so they are held against the file first.
    rows = 0
    for batch in table.iter_batches(batch_size=_ROWS, columns=[key], use_threads=False):
        yield batch
        rows += len(batch)
    if rows != table.metadata.num_rows:
        raise damaged(name, f"it holds {rows:,} of {table.metadata.num_rows:,} rows")


def _arrow(file: Any, name: str, key: str) -> Iterator[Any]:
    """Arrow's streaming format, as `datasets` writes it, or its file format (Feather version 2)."""
    import pyarrow as pa

    start = file.read(6)
    file.seek(0)
    if start == b"ARROW1":
        table = pa.ipc.open_file(file)
        _has_column(table.schema.names, name, key)
        for number in range(table.num_record_batches):
            yield table.get_batch(number)
        return
    stream = pa.ipc.open_stream(file)
    _has_column(stream.schema.names, name, key)
    yield from stream


def _has_column(names: list[str], name: str, key: str) -> None:
    if names.count(key) != 1:
        raise UserError(
            f"{name} has {'several columns' if key in names else 'no column'} {key!r} "
            f"(columns found: {', '.join(names) or 'none'}): name the column with --text-key"
        )


def _texts(column: Any, where: str, options: SourceOptions) -> tuple[bytes, list[int]]:
    """Texts one after another, and their lengths; a missing text is an empty one."""
    import numpy as np
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        if column.null_count:
            column = column.fill_null("")
        column = column.cast(pa.large_string())
        _, bounds, content = column.buffers()
        offsets = np.frombuffer(bounds, np.int64)[column.offset : column.offset + len(column) + 1]
        lengths = np.diff(offsets)
        if len(lengths) and lengths.max() > options.max_document:
            too_big(where, options.max_document)
        data = memoryview(content)[offsets[0] : offsets[-1]].tobytes() if content is not None and len(column) else b""
        return data, lengths.tolist()
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if is_list and (pa.types.is_string(kind.value_type) or pa.types.is_large_string(kind.value_type)):
        parts = ["\n\n".join(p or "" for p in parts or ()).encode() for parts in column.to_pylist()]
        return b"".join(parts), [len(p) for p in parts]
    raise UserError(
        f"{where}: the column {options.text_key!r} holds {kind} where text was expected: "
        "name a column of strings, or of lists of strings, with --text-key"
    )
