"""A corpus by its name -> its files in a folder, each whole or not there.

    FOLDER/enron_emails.jsonl.zst       fetched, one file after another
    FOLDER/train.jsonl, valid.jsonl     stdlib
    FOLDER/debian-docs.jsonl            debian-docs, and what it is made from in packages/

A second call goes on where the first was interrupted.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from castalia.data.corpora.debian import MIRRORS, write_debian_docs
from castalia.data.corpora.download import Progress, download
from castalia.data.corpora.stdlib import write_corpus
from castalia.data.corpora.table import CORPORA, Corpus
from castalia.errors import UserError

Report = Callable[[str], Progress | None]


def corpus_named(name: str) -> Corpus:
    """The corpus of that name."""
    if name not in CORPORA:
        raise UserError(f"unknown corpus '{name}'; known: {', '.join(CORPORA)}")
    return CORPORA[name]


def corpus_files(name: str, folder: str | os.PathLike[str]) -> list[Path]:
    """Where the corpus's files are, or will be, in the order in which they are read."""
    corpus = corpus_named(name)
    made = {"stdlib": ["train.jsonl", "valid.jsonl"], "debian": ["debian-docs.jsonl"]}
    return [Path(folder, n) for n in made.get(corpus.made, [f.name for f in corpus.files])]


def get_corpus(
    name: str,
    folder: str | os.PathLike[str],
    overwrite: bool = False,
    valid_fraction: float = 0.05,
    mirror: str | None = None,
    report: Report = lambda name: None,
) -> list[Path]:
    """Get a corpus, unless it is there.

    Args:
        name: a key of `CORPORA`.
        folder: where its files are put.
        overwrite: get anew what is there.
        valid_fraction: share of the files kept for validation; `stdlib` only.
        mirror: address of a mirror that is asked first: a copy of Debian's for `debian-docs`; for others the
            folder that holds the corpus's files under their names.
        report: gives the progress callback for a file's name.

    Returns:
        The files.

    Raises:
        UserError: no such corpus; a file cannot be fetched or is not what it should be.
    """
    corpus = corpus_named(name)
    files = corpus_files(name, folder)
    first = (mirror.rstrip("/"),) if mirror else ()
    if corpus.made:
        if mirror and corpus.made == "stdlib":
            raise UserError(f"{name} is made on this machine and has no mirror: leave --mirror out")
        if overwrite or not all(f.exists() for f in files):
            if corpus.made == "stdlib":
                write_corpus(folder, valid_fraction)
            else:
                write_debian_docs(files[0], (*first, *MIRRORS), report=report)
        return files
    for number, (file, path) in enumerate(zip(corpus.files, files, strict=True), start=1):
        label = f"{file.name} ({number}/{len(files)})" if len(files) > 1 else file.name
        urls = [*(f"{m}/{file.name}" for m in first), *file.urls]
        try:
            download(urls, path, file.size, file.sha256, overwrite, report(label))
        except UserError as error:
            raise UserError(f"{error}{f' [{corpus.state}]' if corpus.state else ''}") from None
    return files
