"""An older name of `castalia.data.sources`, for what has not moved yet."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from castalia.data.sources import Document, find_inputs, iter_documents

__all__ = ["Document", "find_files", "iter_documents"]


def find_files(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The files that the paths stand for."""
    return [Path(i.name) for i in find_inputs(paths)]
