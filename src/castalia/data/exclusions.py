"""Lists of documents that a run leaves out, as a text file that a person can read and edit.

    castalia-exclusions 1           the format and its version
    # personal data, found on ...    comments and blank lines are ignored
    prefix data/pile/tokens         the data set, named as in the configuration
    17                              a document: its sequence number, from 0
    200-299                         or a range of them, both ends included

Numbers, not texts: they are exact, and the list gives nothing away about what it excludes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from castalia.errors import UserError

HEADER = "castalia-exclusions 1"
_MOST = 100_000_000  # documents in a list: beyond, a data set should be prepared anew


def load_exclusions(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read a list of excluded documents.

    Returns:
        By prefix, as written in the file: int64 sequence numbers, ascending, each once.

    Raises:
        UserError: the file cannot be read; names the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a list of excluded documents ({error}): give a text file") from None
    if not lines or lines[0].strip() != HEADER:
        found = lines[0].strip()[:60] if lines else ""
        raise UserError(f"{path} begins with {found!r} and not with '{HEADER}': write it with `castalia data exclude`")
    ranges: dict[str, list[tuple[int, int]]] = {}
    mine: list[tuple[int, int]] | None = None
    total = 0
    for number, line in enumerate(lines[1:], start=2):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        word, _, rest = text.partition(" ")
        if word == "prefix" and rest.strip():
            mine = ranges.setdefault(rest.strip(), [])
            continue
        pair = parse_range(text)
        if pair is None:
            raise UserError(f"{path}, line {number}: '{text[:60]}' is no document number or range such as 200-299")
        if mine is None:
            raise UserError(f"{path}, line {number}: put a line 'prefix PATH' before the numbers")
        mine.append((pair[0], pair[1] + 1))
        total += pair[1] + 1 - pair[0]
        if total > _MOST:
            raise UserError(f"{path}, line {number}: more than {_MOST} documents are excluded: prepare the data anew")
    empty = [np.empty(0, np.int64)]
    return {
        prefix: np.unique(np.concatenate(empty + [np.arange(*pair, dtype=np.int64) for pair in pairs]))
        for prefix, pairs in ranges.items()
    }


def parse_range(text: str) -> tuple[int, int] | None:
    """`17` or `200-299` -> first and last number; None where it is neither."""
    ends = [part.strip() for part in text.split("-")]
    if len(ends) > 2 or not all(part.isascii() and part.isdigit() and len(part) < 19 for part in ends):
        return None
    return (int(ends[0]), int(ends[-1])) if int(ends[0]) <= int(ends[-1]) else None


def save_exclusions(path: str | os.PathLike[str], exclusions: Mapping[str, np.ndarray], reason: str = "") -> None:
    """Write a list of excluded documents, runs of numbers as ranges; the file appears when it is whole.

    Args:
        path: the text file.
        exclusions: sequence numbers by prefix.
        reason: a comment for the reader.
    """
    lines = [HEADER, *(f"# {line}" for line in reason.splitlines())]
    for prefix, numbers in exclusions.items():
        if "\n" in prefix or prefix != prefix.strip():
            raise UserError(f"the prefix {prefix!r} does not fit a list of excluded documents: rename the data set")
        lines.append(f"prefix {prefix}")
        ordered = np.unique(np.asarray(numbers, np.int64))
        for run in np.split(ordered, np.flatnonzero(np.diff(ordered) != 1) + 1) if ordered.size else ():
            lines.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}")
    temporary = Path(f"{os.fspath(path)}.partial")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def check_exclusions(exclusions: Mapping[str, np.ndarray], num_sequences: Mapping[str, int], path: str) -> None:
    """Hold a list against the data sets of a run.

    Args:
        exclusions: of `load_exclusions`.
        num_sequences: sequences of each data set, by the prefix that the configuration has.
        path: the file, for messages.

    Raises:
        UserError: a prefix is none of the run's, or a document does not exist.
    """
    for prefix, numbers in exclusions.items():
        if prefix not in num_sequences:
            raise UserError(
                f"{path} excludes documents of {prefix}, which this run does not read (it reads "
                f"{', '.join(num_sequences)}): name the prefix as the configuration does"
            )
        if numbers.size and numbers[-1] >= num_sequences[prefix]:
            raise UserError(f"{path} excludes document {numbers[-1]} of {prefix}, which has {num_sequences[prefix]}")
