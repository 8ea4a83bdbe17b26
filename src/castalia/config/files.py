"""Text -> a file that is whole or not there: written under another name, synced, then renamed."""

from __future__ import annotations

import os
from pathlib import Path

from castalia.errors import UserError


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in one piece.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    fresh = path.with_name(f".{path.name}.new")
    try:
        with open(fresh, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
