"""YAML files and overrides -> a checked `Config`, with the origin of each value.

    a.yml ──┐ read_yaml        merge, in order         pydantic
    b.yml ──┼──────────> values + lines ──> one tree ──────────> Config
    k=v   ──┘ (GPT-NeoX files are translated on the way)

The same key in two files is an error unless the later file says `base: earlier.yml`;
overrides come last. An unknown key names its file, line and the nearest known key.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from castalia.config import gptneox
from castalia.config.gptneox_given import Given
from castalia.config.schema import Config
from castalia.config.yaml12 import Document, Origin, Path_, parse_value, parse_yaml, read_yaml
from castalia.errors import UserError

__all__ = [
    "Origin",
    "Tree",
    "check",
    "check_values",
    "from_yaml",
    "known_keys",
    "load",
    "nearest",
    "notes",
    "origins",
    "read_gptneox",
    "remarks",
]

COMMAND_LINE = Origin("command line")


@dataclass
class Tree:
    """Merged values by dotted key, each with its origin."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

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
    documents = _documents([Path(path) for path in paths])
    _distinct(paths)
    given = [_split_override(text) for text in overrides]
    kinds = {d.path: gptneox.family(d) for d in documents}
    theirs = [path for path, kind in kinds.items() if kind == "gptneox"]
    ours = [path for path, kind in kinds.items() if kind == "castalia"]
    if theirs and ours:
        raise UserError(
            f"{ours[0]} is a Castalia file and {theirs[0]} a GPT-NeoX file: "
            "convert one, or give the few values as key=value overrides"
        )
    tree = Tree()
    if theirs:
        overwrite = {key: value for key, value in given if gptneox.is_their_key(key) and key not in _KNOWN}
        given = [(key, value) for key, value in given if key not in overwrite]
        translation = gptneox.translate(documents, overwrite)
        tree = Tree(translation.values, translation.origins, translation.notes, translation.remarks)
    else:
        for document in documents:
            _merge(tree, document)
    for key, value in given:
        _override(tree, key, value)
    if paths and not tree.values:
        raise UserError(f"{paths[0]}: holds no settings: write some, for example {_example('training')}")
    return check(tree)


def read_gptneox(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> Given:
    """GPT-NeoX files merged and not translated, for what is no part of a run: generation, evaluation.

    Raises:
        UserError: a file is not GPT-NeoX's, or anything is wrong with it.
    """
    _distinct(paths)
    documents = _documents([Path(path) for path in paths])
    for document in documents:
        if gptneox.family(document) == "castalia":
            raise UserError(f"{document.path} is a Castalia file: generate from its run with `castalia generate RUN`")
    return gptneox.merge(documents, dict(_split_override(text) for text in overrides))


def from_yaml(text: str, where: str = "<text>") -> Config:
    """Check one native configuration given as YAML text; `where` is for messages."""
    tree = Tree()
    _merge(tree, parse_yaml(text, where))
    return check(tree)


def check_values(values: dict[str, Any], where: str) -> Config:
    """Validate a configuration that a file of ours holds as nested values (a checkpoint's state)."""
    tree = Tree()
    _merge(tree, Document(where, values, {}))
    return check(tree)


def origins(config: Config) -> dict[str, Origin]:
    """Where each given key was said; keys that are absent have their default."""
    return config._origins


def notes(config: Config) -> list[str]:
    """What the translation of a GPT-NeoX file had to say, a line each."""
    return config._notes


def remarks(config: Config) -> list[str]:
    """Those notes that are not about one key's translation: what comes out otherwise than in GPT-NeoX."""
    return config._remarks


def check(tree: Tree) -> Config:
    """Validate merged values; raises UserError with the origin of the offending key."""
    unknown = [k for k in tree.values if k not in _KNOWN]
    if unknown:
        key = unknown[0]
        near = nearest(key, known_keys() if "." in key else [*known_keys(), *sorted(_SECTIONS)])
        hint = f"; did you mean '{near}'?" if near else "; `castalia config show` lists the known keys"
        raise UserError(f"{tree.origins[key]}: unknown key '{key}'{hint}")
    for key in _PATHS & tree.values.keys():
        tree.values[key] = _expanded(tree.values[key])
    values = tree.nested()
    if not tree.values.keys() & {"training.steps", "training.tokens"}:
        # Either may be given, so neither has a default of its own; the run as a whole has one.
        values.setdefault("training", {})["steps"] = Config().training.steps
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UserError(_sentence(error, tree)) from None
    except OverflowError:
        raise UserError("a number in the configuration is too large to reckon with: make it smaller") from None
    config._origins.update(tree.origins)
    config._notes.extend(tree.notes)
    config._remarks.extend(tree.remarks)
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
    """The known key that `key` was probably meant to be; None if nothing is near.

    In this order: the same word in another section, a like word in the same section, a like
    key, a like word in any section.
    """
    section, _, word = key.rpartition(".")
    words = {k.rsplit(".", 1)[-1]: k for k in reversed(known)}
    if key in known or word in words:
        return key if key in known else words[word]
    inside = [k for k in known if section and k.startswith(f"{section}.")]
    close = difflib.get_close_matches(key, inside, 1, 0.85) or difflib.get_close_matches(key, known, 1, 0.7)
    if close:
        return close[0]
    close = difflib.get_close_matches(word, list(words), 1, 0.75)
    return words[close[0]] if close else None


def _documents(paths: Sequence[Path]) -> list[Document]:
    """The files, each laid on its bases; a file that a later one names as its base is not read twice."""
    read = [_with_base(path, ()) for path in paths]
    out = []
    for i, (document, _) in enumerate(read):
        if not any(paths[i].resolve() in bases for _, bases in read[i + 1 :]):
            out.append(document)
    return out


def _distinct(paths: Sequence[str | Path]) -> None:
    """Files of one name would replace each other where a run keeps its sources."""
    seen: dict[str, Path] = {}
    for path in map(Path, paths):
        if path.name in seen:
            raise UserError(f"{path} and {seen[path.name]} have one name, and a run keeps both: rename one")
        seen[path.name] = path


def _with_base(path: Path, chain: tuple[Path, ...]) -> tuple[Document, tuple[Path, ...]]:
    """A file laid on the file that it names as `base`, and every file below it."""
    document = read_yaml(path)
    name = document.values.pop("base", None)
    if name is None:
        return document, ()
    where = document.origin("base")
    if not isinstance(name, str):
        raise UserError(f"{where}: `base` must be the name of one file")
    chain = (*chain, path.resolve())
    try:
        below = (path.parent / name).resolve()
    except (OSError, ValueError):
        raise UserError(f"{where}: {name!r} is not the name of a file") from None
    if below in chain:
        raise UserError(f"{where}: `base` leads back to {below.name}, which is being read already")
    if not below.exists():
        raise UserError(f"{where}: names {name} as its `base`, and {below} does not exist: mend the name")
    base, bases = _with_base(path.parent / name, chain)
    return _inherit(base, document), (below, *bases)


def _inherit(base: Document, over: Document) -> Document:
    """`over` laid on `base`, as one document that remembers where each value was said."""
    both = Document(over.path, {}, {})
    flatten = gptneox.flatten if "gptneox" in (gptneox.family(base), gptneox.family(over)) else _flatten
    for document in (base, over):
        for path, value, origin in flatten(document):
            at = both.values
            for name in path[:-1]:
                at = at.setdefault(name, {})
            at[path[-1]] = value
            both.inherited[path] = origin
    return both


def _flatten(document: Document) -> Iterator[tuple[Path_, Any, Origin]]:
    """Key path, value and origin of each value; only sections are descended into."""
    for name, value in document.values.items():
        if name not in _SECTIONS:
            yield (name,), value, document.origin(name)
        elif isinstance(value, dict):
            for key, inner in value.items():
                yield (name, key), inner, document.origin(name, key)
        elif value is not None:  # a section heading with nothing below it says nothing
            raise UserError(
                f"{document.origin(name)}: '{name}' is a section: give its keys indented below it, "
                f"for example {_example(name)}"
            )


def _merge(tree: Tree, document: Document) -> None:
    for path, value, here in _flatten(document):
        key = ".".join(path)
        if key in tree.values:
            raise UserError(
                f"{here}: '{key}' was given already at {tree.origins[key]}: "
                "remove one, or name the first file as `base:`"
            )
        tree.values[key], tree.origins[key] = value, here


def _split_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"'{text}': an override is written key=value, for example optimizer.lr=3e-4")
    try:
        return key, parse_value(value)
    except UserError as error:
        raise UserError(f"command line: {key}: {str(error).removeprefix('command line:1: ')}") from None


def _override(tree: Tree, key: str, value: Any) -> None:
    if key in _SECTIONS:
        raise UserError(f"command line: '{key}' is a section: give one of its keys, for example {_example(key)}")
    tree.values[key], tree.origins[key] = value, COMMAND_LINE


def _example(section: str) -> str:
    return next(key for key in known_keys() if key.startswith(section + "."))


def _sentence(error: ValidationError, tree: Tree) -> str:
    """The first of pydantic's complaints as one sentence with its origin."""
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"]]
    known = next((n for n in (2, 1) if ".".join(parts[:n]) in _KNOWN), len(parts))
    # Below the key pydantic names the place in a list, which helps, or the member of a union, which does not.
    key = ".".join(parts[:known] + [part for part in parts[known:] if part.isdigit()])
    origin = tree.origins.get(key) or tree.origins.get(".".join(key.split(".")[:2]))
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        at = {k: re.search(rf"\b{re.escape(k)}\b", message) for k in tree.origins}
        named = [tree.origins[k] for k in sorted((k for k in at if at[k]), key=lambda k: at[k].start())]  # type: ignore[union-attr]
        # What was typed last is most likely what is wrong; else the key that the sentence begins with.
        where = origin or (COMMAND_LINE if COMMAND_LINE in named else named[0] if named else None)
        return f"{where}: {message}" if where else message
    message = first["msg"][0].lower() + first["msg"][1:]
    if first["type"] == "extra_forbidden":
        message = f"unknown key '{parts[-1]}'"
    got = "" if first["type"] == "missing" else f", got {_short(first['input'])}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{f'{origin}: ' if origin else ''}{key}: {message}{got}{more}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _expanded(value: Any) -> Any:
    """`~/x` -> the home folder's x, of one path or a list; no shell does so inside a file."""
    if isinstance(value, list):
        return [_expanded(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


_PATHS = {
    *("output", "start.path", "tokenizer.path", "logging.log_dir", "logging.tensorboard"),
    *("data.path", "data.train_paths", "data.valid_paths", "data.test_paths"),
    *("data.label_path", "data.train_label_paths", "data.valid_label_paths", "data.test_label_paths"),
}
_SECTIONS = {
    name
    for name, info in Config.model_fields.items()
    if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
}
_KNOWN = frozenset(known_keys())
