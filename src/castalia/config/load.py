"""YAML files and overrides -> a checked `Config`, with the origin of each value.

    a.yml ──┐ read_yaml        merge, in order         pydantic
    b.yml ──┼──────────> values + lines ──> one tree ──────────> Config
    k=v   ──┘ (GPT-NeoX files are translated on the way)

The same key in two files is an error unless the later file says `base: earlier.yml`;
overrides come last. An unknown key names its file, line and the nearest known key.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from castalia.config import gptneox
from castalia.config.schema import Config
from castalia.config.yaml12 import Document, parse_value, read_yaml
from castalia.errors import UserError


@dataclass(frozen=True)
class Origin:
    """Where a value was said: a file and line, or the command line."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclass
class Tree:
    """Merged values by dotted key, each with its origin."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def nested(self) -> dict[str, Any]:
        """The values as nested mappings, as pydantic wants them."""
        out: dict[str, Any] = {}
        for dotted, value in self.values.items():
            *parents, leaf = dotted.split(".")
            at = out
            for name in parents:
                at = at.setdefault(name, {})
                if not isinstance(at, dict):
                    raise UserError(f"{self.origins[dotted]}: '{name}' is a value and a section at once")
            at[leaf] = value
        return out


def load(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """Read, merge and check a configuration.

    Args:
        paths: YAML or JSON files, merged in order; native or GPT-NeoX, not both.
        overrides: `dotted.key=value`, the value in YAML.

    Returns:
        The checked configuration; `origins(config)` and `notes(config)` say where values come from.

    Raises:
        UserError: anything wrong with the files or the values, in one sentence.
    """
    documents = [d for path in paths for d in _with_bases(Path(path), ())]
    theirs = [d for d in documents if gptneox.is_gptneox(d)]
    if theirs and len(theirs) < len(documents):
        ours = next(d.path for d in documents if d not in theirs)
        raise UserError(
            f"{ours} is a Castalia file and {theirs[0].path} a GPT-NeoX file: "
            "convert one, or give the few values as key=value overrides"
        )
    tree = Tree()
    if theirs:
        values, origins, tree.notes = gptneox.translate([(d, Origin) for d in theirs])
        for key, value in values.items():
            tree.values[key], tree.origins[key] = value, origins[key]
    else:
        for document in documents:
            _merge(tree, document)
    for text in overrides:
        _override(tree, text)
    return check(tree)


def origins(config: Config) -> dict[str, Origin]:
    """Where each given key was said; keys that are absent have their default."""
    return config._origins


def notes(config: Config) -> list[str]:
    """What the translation of a GPT-NeoX file had to say, a line each."""
    return config._notes


def check(tree: Tree) -> Config:
    """Validate merged values; raises UserError with the origin of the offending key."""
    unknown = [k for k in tree.values if not _known(k)]
    if unknown:
        key = unknown[0]
        near = nearest(key, known_keys())
        hint = f"; did you mean '{near}'?" if near else "; `castalia config show` lists the known keys"
        raise UserError(f"{tree.origins[key]}: unknown key '{key}'{hint}")
    try:
        config = Config.model_validate(tree.nested())
    except ValidationError as error:
        raise UserError(_sentence(error, tree)) from None
    config._origins.update(tree.origins)
    config._notes.extend(tree.notes)
    return config


def known_keys() -> list[str]:
    """Every dotted key of the configuration, in the order of the schema."""
    keys = []
    for name, info in Config.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += [f"{name}.{inner}" for inner in kind.model_fields]
        else:
            keys.append(name)
    return keys


def nearest(key: str, known: Sequence[str]) -> str | None:
    """The known key most like `key`: by its whole, else by its last word; None if nothing is near."""
    close = difflib.get_close_matches(key, known, 1, 0.7)
    if close:
        return close[0]
    leaves = {k.rsplit(".", 1)[-1]: k for k in known}
    close = difflib.get_close_matches(key.rsplit(".", 1)[-1], list(leaves), 1, 0.75)
    return leaves[close[0]] if close else None


def _known(key: str) -> bool:
    return key in _KNOWN


def _with_bases(path: Path, chain: tuple[Path, ...]) -> list[Document]:
    """A file, preceded by the files it names as `base`."""
    if path.resolve() in chain:
        raise UserError(f"{path}: its `base` leads back to itself")
    document = read_yaml(path)
    base = document.values.pop("base", None)
    if base is None:
        return [document]
    if not isinstance(base, str):
        raise UserError(f"{path}:{document.lines[('base',)]}: `base` must be the name of one file")
    below = _with_bases(path.parent / base, (*chain, path.resolve()))
    inherited: dict[str, Any] = {}
    lines: dict[tuple[str, ...], int] = {}
    return [*below[:-1], _inherit(below[-1], document, inherited, lines)]


def _inherit(base: Document, over: Document, values: dict[str, Any], lines: dict[tuple[str, ...], int]) -> Document:
    """`over` laid on `base`, as one document; lines of the base keep the base's name in messages."""
    flat = {**_flatten(base), **_flatten(over)}
    for key, (value, line, path) in flat.items():
        parts = tuple(key.split("."))
        at = values
        for name in parts[:-1]:
            at = at.setdefault(name, {})
        at[parts[-1]] = value
        lines[parts] = line
    return Document(over.path, values, lines)


def _flatten(document: Document) -> dict[str, tuple[Any, int, str]]:
    out: dict[str, tuple[Any, int, str]] = {}

    def walk(values: dict[str, Any], at: tuple[str, ...]) -> None:
        for key, value in values.items():
            here = (*at, key)
            dotted = ".".join(here)
            # Only sections are descended into: a mapping elsewhere is a value of its own.
            if isinstance(value, dict) and len(here) == 1 and dotted in _SECTIONS:
                walk(value, here)
            else:
                out[dotted] = (value, document.lines.get(here, 1), document.path)

    walk(document.values, ())
    return out


def _merge(tree: Tree, document: Document) -> None:
    for key, (value, line, path) in _flatten(document).items():
        here = Origin(path, line)
        if key in tree.values:
            raise UserError(
                f"{here}: '{key}' was given already at {tree.origins[key]}: remove one, or name the first file as `base:`"
            )
        tree.values[key], tree.origins[key] = value, here


def _override(tree: Tree, text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"'{text}': an override is written key=value, for example optimizer.lr=3e-4")
    tree.values[key], tree.origins[key] = parse_value(value), Origin("command line")


def _sentence(error: ValidationError, tree: Tree) -> str:
    """The first of pydantic's complaints as one sentence with its origin."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    origin = tree.origins.get(key) or tree.origins.get(".".join(key.split(".")[:2]))
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        named = [o for k, o in tree.origins.items() if k in message]
        where = origin or (named[0] if named else None)
        return f"{where}: {message}" if where else message
    message = first["msg"][0].lower() + first["msg"][1:]
    got = "" if first["type"] == "missing" else f", got {first['input']!r}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{origin + ': ' if isinstance(origin, str) else (str(origin) + ': ' if origin else '')}{key}: {message}{got}{more}"


_SECTIONS = {
    name
    for name, info in Config.model_fields.items()
    if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
}
_KNOWN = frozenset(known_keys())
