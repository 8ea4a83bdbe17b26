"""GPT-NeoX YAML -> our keys (placeholder until its table lands)."""

from __future__ import annotations

from typing import Any

from castalia.config.yaml12 import Document


def is_gptneox(document: Document) -> bool:
    """Whether the file's top-level keys are GPT-NeoX's flat ones."""
    return False


def translate(documents: Any) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Translate; returns values and origins by our dotted key, and notes."""
    return {}, {}, []
