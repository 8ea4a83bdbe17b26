"""Whatever key or verb the package names in a string exists, so that no remedy leads nowhere.

    src/**/*.py ─strings─> `section.key` in the configuration?   `castalia VERB` a verb?

The strings are those of the syntax tree, docstrings included; what an f-string puts in at run
time is unknown and a name that touches it is passed over. Names of files (tokenizer.json) and
calls are no keys.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from castalia.cli import VERBS
from castalia.config.load import known_keys

KEYS = frozenset(known_keys())
SECTIONS = sorted({key.split(".")[0] for key in KEYS if "." in key})
FILES = frozenset({"bin", "idx", "json", "jsonl", "model", "pkl", "py", "safetensors", "txt", "yml"})
THEIRS = frozenset({"optimizer.params"})  # GPT-NeoX's own, which messages about its files name
LEFT_OUT = ("castalia/tools/page.py",)  # a script for browsers
HOLE = "\0"  # stands for what an f-string puts in
KEY = re.compile(rf"(?<![\w./{HOLE}-])({'|'.join(SECTIONS)})\.([a-z_][a-z_0-9]*)(?![\w({HOLE}]|\.[\w{HOLE}])")
VERB = re.compile(r"(?:`|\n *(?:\$ )?)castalia ([a-z]+)")


def strings(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every string; an f-string is one."""
    tree = ast.parse(source)
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            texts = (part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)
            yield node.lineno, "".join(map(str, texts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.lineno, node.value


def unknown_names(source: str) -> list[tuple[int, str]]:
    """Line and name of every key and verb that is named and does not exist."""
    found = []
    for line, text in strings(source):
        keys = [m[0] for m in KEY.finditer(text) if m[2] not in FILES]
        found += [(line, key) for key in keys if key not in KEYS | THEIRS]
        found += [(line, f"castalia {m[1]}") for m in VERB.finditer(text) if m[1] not in VERBS]
    return found


def test_every_key_and_verb_that_is_named_exists(sources: dict[str, str]) -> None:
    found = [
        f"{name}:{line}: {what} does not exist"
        for name, text in sources.items()
        if name not in LEFT_OUT
        for line, what in unknown_names(text)
    ]
    assert found == []


def test_bad_examples_are_found() -> None:
    bad = '''
def f(x):
    """Sets `data.eod_mask_loss`.

        castalia convert RUN
    """
    raise UserError(f"{x}: raise model.heads, or run `castalia brew convert {x}`")
'''
    assert sorted(unknown_names(bad)) == [
        (3, "castalia convert"),
        (3, "data.eod_mask_loss"),
        (7, "castalia brew"),
        (7, "model.heads"),
    ]


def test_good_examples_are_passed() -> None:
    good = '''
"""Reads tokenizer.json and castalia.data.sources; see data/model.py, `data.path` and model.num_layers.

    castalia train run.yml
"""
f"give data.{split}_paths or data.train_{what}; model.parameters() and `castalia prepare {x}`"
'''
    assert unknown_names(good) == []
