"""Every configuration that ships can be loaded, and all that follows from it can be derived."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(f for suffix in ("*.yml", "*.yaml") for f in (ROOT / "configs").rglob(suffix))
VOCABULARY = 50257  # of no consequence here; the real one comes from the data set's tokenizer


def load_and_derive(path: Path) -> object:
    """The complete configuration of one file."""
    from castalia.config import load
    from castalia.config.derive import derive

    return derive(load([path], []), VOCABULARY)[0]


def test_some_configurations_ship():
    assert [f.name for f in CONFIGS if f.name == "demo.yml"] == ["demo.yml"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_a_shipped_configuration_is_right(path):
    assert load_and_derive(path).model.vocab_size >= VOCABULARY


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("version: 1\nmodle:\n  num_layers: 2\n", "modle"),
        ("version: 1\nmodel:\n  num_layers: two\n", "num_layers"),
        ("version: 1\nmodel:\n  hidden_size: 100\n  num_attention_heads: 3\n", "num_attention_heads"),
    ],
)
def test_a_wrong_configuration_is_seen(tmp_path, text, said):
    from castalia.errors import UserError

    path = tmp_path / "wrong.yml"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        load_and_derive(path)
