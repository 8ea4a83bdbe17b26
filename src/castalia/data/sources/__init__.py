"""Corpora of any packing -> documents, by way of blocks that can be parsed in parallel.

    files, folders, globs, URLs, "-" ──inputs──> streams ──unpack, archives, tables──> bytes
        ──cut at the bounds of documents──> Block, Block, ... ──documents_of, in any worker──> Documents

Making blocks costs little more than reading and decompressing, so one thread can feed many
that parse and tokenise. The blocks are a pure function of the inputs and of the block's size;
docs/sources.md lists what can be read.
"""

from castalia.data.sources.blocks import Block, Document, SourceOptions
from castalia.data.sources.inputs import describe_inputs, find_inputs
from castalia.data.sources.parse import documents_of
from castalia.data.sources.read import BLOCK_SIZE, iter_blocks, iter_documents

__all__ = [
    "BLOCK_SIZE",
    "Block",
    "Document",
    "SourceOptions",
    "describe_inputs",
    "documents_of",
    "find_inputs",
    "iter_blocks",
    "iter_documents",
]
