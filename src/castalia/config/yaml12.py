"""YAML text -> plain values, each with the line it came from.

YAML 1.2's core schema is used, so `6e-4` is a number and `no` is a word; PyYAML's own
resolver follows YAML 1.1, where they are a string and false. A key given twice in one
file is an error. JSON, and the JSON-like flow mappings that GPT-NeoX ships, are YAML.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from castalia.errors import UserError

Path_ = tuple[str, ...]


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's resolution of plain scalars."""

    yaml_implicit_resolvers: dict[str, Any] = {}


for _tag, _pattern, _first in [
    ("null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    # Underscores between digits are our one extension: 100_000_000 reads better than 100000000.
    ("int", r"(?:[-+]?[0-9](?:_?[0-9])*|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    (
        "float",
        r"(?:[-+]?(?:\.[0-9]+|[0-9](?:_?[0-9])*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
]:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


@dataclass(frozen=True)
class Document:
    """One parsed file: nested plain values, and the line of each key (1-based) by its path."""

    path: str
    values: dict[str, Any]
    lines: dict[Path_, int]


def read_yaml(path: str | Path) -> Document:
    """Read one YAML or JSON file whose top level is a mapping.

    Raises:
        UserError: the file is missing, not UTF-8, not YAML, or repeats a key.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not a configuration file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, path: str) -> Document:
    """Parse YAML text; `path` is only for messages. Raises UserError as `read_yaml` does."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    finally:
        loader.dispose()
    if node is None:
        return Document(path, {}, {})
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}:{node.start_mark.line + 1}: expected `key: value` pairs at the top of the file")
    lines: dict[Path_, int] = {}
    values = _plain(node, (), path, lines)
    return Document(path, values, lines)


def parse_value(text: str) -> Any:
    """The value of a command-line override: one YAML scalar, list or mapping."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.YAMLError:
        return text
    return None if node is None else _plain(node, (), "<command line>", {})


def _plain(node: yaml.Node, at: Path_, path: str, lines: dict[Path_, int]) -> Any:
    if isinstance(node, yaml.MappingNode):
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(f"{path}:{line}: a key must be a plain word")
            key = str(key_node.value)
            if key in out:
                first = lines[(*at, key)]
                raise UserError(f"{path}:{line}: key '{key}' was given before, at line {first}: keep one")
            lines[(*at, key)] = line
            out[key] = _plain(value_node, (*at, key), path, lines)
        return out
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child, (*at, str(i)), path, lines) for i, child in enumerate(node.value)]
    return _scalar(node, path)


def _scalar(node: yaml.Node, path: str) -> Any:
    kind, text = node.tag.rsplit(":", 1)[-1], node.value
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text.replace("_", ""), 0 if text[:2] in ("0x", "0o") else 10)
    if kind == "float":
        plain = text.replace("_", "").lower()
        return float(plain.replace(".inf", "inf").replace(".nan", "nan"))
    if kind == "str":
        return text
    raise UserError(f"{path}:{node.start_mark.line + 1}: the tag {node.tag} is not supported in configurations")
