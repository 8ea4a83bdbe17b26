"""The files of a run's folder that tell what the run is (docs/contracts.md, section 3).

    Config ─> config.yaml    files as given ─> sources/    machine, versions ─> environment.json
    tokenizer ─> tokenizer.json

Written at the start of every sitting, each replaced as a whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from castalia.config import Config
from castalia.config.render import to_yaml
from castalia.data.tokenizer import Tokenizer
from castalia.errors import UserError


@contextmanager
def made_folder(directory: Path) -> Iterator[None]:
    """Make a run's folder and that of its checkpoints; a run that could not begin leaves nothing of a new one.

    Raises:
        UserError: the system refuses.
    """
    fresh = not directory.exists()
    try:
        (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory}: the run's folder cannot be made: {error.strerror}") from None
    try:
        yield
    except BaseException:
        if fresh and not (directory / "config.yaml").exists():
            for leave in ((directory / "checkpoints").rmdir, (directory / "run.lock").unlink, directory.rmdir):
                with suppress(OSError):  # whatever else got there stays
                    leave()
        raise


def write_files(
    directory: Path, config: Config, sources: Sequence[Path], facts: dict[str, Any], tokenizer: Tokenizer | None
) -> None:
    """config.yaml, sources/, environment.json and the tokenizer."""
    kept = directory / "sources"
    kept.mkdir(exist_ok=True)
    for source in sources:
        if source.resolve() != (directory / "config.yaml").resolve():
            shutil.copyfile(source, kept / source.name)
    _replace(directory / "config.yaml", to_yaml(config))
    _replace(directory / "environment.json", json.dumps(facts, indent=2) + "\n")
    content = tokenizer.file_bytes() if tokenizer is not None else None
    if content is not None:
        _replace(directory / "tokenizer.json", content)


def _replace(path: Path, content: str | bytes) -> None:
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(fresh, path)
