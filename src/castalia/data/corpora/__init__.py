"""Corpora by name: what they are, where they lie, and how to get them whole.

name ──table──> files, addresses ──download──> FOLDER/NAME/... ──> castalia prepare
          └──> made here: the standard library, Debian's documentation
"""

from castalia.data.corpora.get import corpus_files, get_corpus
from castalia.data.corpora.stdlib import split_by_file, stdlib_corpus, write_corpus, write_documents
from castalia.data.corpora.table import CORPORA, Corpus

__all__ = [
    "CORPORA",
    "Corpus",
    "corpus_files",
    "get_corpus",
    "split_by_file",
    "stdlib_corpus",
    "write_corpus",
    "write_documents",
]
