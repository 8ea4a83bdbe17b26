"""GPT-NeoX YAML -> our keys (placeholder until its table lands)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from castalia.config.yaml12 import Document, Origin, Path_


@dataclass
class Translation:
    values: dict[str, Any]
    origins: dict[str, Origin]
    notes: list[str]


def family(document: Document) -> str | None:
    return None


def is_their_key(key: str) -> bool:
    return False


def flatten(document: Document) -> Iterator[tuple[Path_, Any, Origin]]:
    yield from ()


def translate(documents: Sequence[Document], overwrite: Mapping[str, Any]) -> Translation:
    return Translation({}, {}, [])
