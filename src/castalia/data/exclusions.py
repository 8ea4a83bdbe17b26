"""Lists of documents that a run leaves out, as a text file that a person can read and edit.

    castalia-exclusions 1           the format and its version
    # personal data, found on ...    comments and blank lines are ignored
    prefix data/pile/tokens         the data set, named as in the configuration
    17                              a document: its sequence number, from 0
    200-299                         or a range of them, both ends included

Numbers, not texts: they are exact, and the list gives nothing away about what it excludes. A run
notes the list in its journal with the step from which it holds; what the tokens of an excluded
document would teach is then masked, and every sample stays where it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from castalia.data.plan import Amendment, Exclude
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
        lines += _as_ranges(numbers)
    temporary = Path(f"{os.fspath(path)}.partial")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _as_ranges(numbers: np.ndarray) -> list[str]:
    """Numbers -> `17`, `200-299`, ..., ascending."""
    ordered = np.unique(np.asarray(numbers, np.int64))
    if not ordered.size:
        return []
    gaps = np.flatnonzero(np.diff(ordered) != 1)
    firsts, lasts = ordered[np.append(0, gaps + 1)].tolist(), ordered[np.append(gaps, len(ordered) - 1)].tolist()
    return [f"{a}-{b}" if b > a else f"{a}" for a, b in zip(firsts, lasts, strict=True)]


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


def excluded_documents(path: str | None, num_sequences: Mapping[str, int]) -> tuple[tuple[str, ...], ...]:
    """A run's list, in the journal's form: see `Exclude.documents`.

    Args:
        path: of the list; None: nothing is excluded.
        num_sequences: sequences of each training data set, by prefix, in the order of the configuration.

    Raises:
        UserError: the list cannot be read, or does not fit the data sets.
    """
    exclusions = load_exclusions(path) if path is not None else {}
    check_exclusions(exclusions, num_sequences, str(path))
    return tuple(tuple(_as_ranges(exclusions.get(prefix, np.empty(0, np.int64)))) for prefix in num_sequences)


def with_exclusions(
    journal: tuple[Amendment, ...], step: int, documents: tuple[tuple[str, ...], ...]
) -> tuple[Amendment, ...]:
    """The journal of a run that goes on at `step` with these documents excluded; as it was where they already are."""
    before = next((entry.documents for entry in reversed(journal) if isinstance(entry, Exclude)), ())
    if before == documents or not (any(before) or any(documents)):
        return journal
    return (*journal, Exclude(step, documents))


class Exclusions:
    """Which documents a run's journal excludes at which step.

    Args:
        journal: of the run.
        prefixes: of the training data sets, in the order of the configuration, each once.
    """

    def __init__(self, journal: Iterable[Amendment], prefixes: Sequence[str]) -> None:
        self._lists: list[tuple[int, dict[str, np.ndarray]]] = []
        for entry in journal:
            if isinstance(entry, Exclude):
                numbers = {p: _numbers(texts) for p, texts in zip(prefixes, entry.documents, strict=False) if texts}
                self._lists.append((entry.from_step, numbers))

    def holds(self, step: int, prefix: str, sequence: int) -> bool:
        """Whether a document is excluded at a step."""
        numbers = self._at(step).get(prefix)
        return numbers is not None and bool(numbers[np.searchsorted(numbers, sequence) % len(numbers)] == sequence)

    def mask(self, step: int, pieces: Iterable[tuple[str, int, int, int]], length: int) -> np.ndarray:
        """Which of a sample's first `length` ids are of excluded documents: bool [length].

        Args:
            step: the step that takes the sample.
            pieces: (prefix, sequence, offset, length) of the sample's parts, in order.
            length: ids that are looked at.
        """
        out = np.zeros(length, bool)
        if self._at(step):
            at = 0
            for prefix, sequence, _, size in pieces:
                out[at : at + size] = self.holds(step, prefix, sequence)
                at += size
        return out

    def any(self, step: int) -> bool:
        """Whether any document is excluded at a step."""
        return bool(self._at(step))

    def _at(self, step: int) -> dict[str, np.ndarray]:
        return next((numbers for since, numbers in reversed(self._lists) if since <= step), {})


def _numbers(texts: Iterable[str]) -> np.ndarray:
    """The inverse of `_as_ranges`: int64, ascending.

    Raises:
        UserError: a text is no number or range; then the journal was not written by a run.
    """
    pairs = [parse_range(text) for text in texts]
    if None in pairs:
        raise UserError("the checkpoint's journal names excluded documents that are no numbers: use another checkpoint")
    return np.concatenate([np.arange(pair[0], pair[1] + 1, dtype=np.int64) for pair in pairs if pair is not None])
