"""YAML text -> plain values, each with the line it came from.

YAML 1.2's core schema is used, so `6e-4` is a number and `no` is a word; PyYAML's own
resolver follows YAML 1.1, where they are a string and false. A key given twice in one
file is an error. JSON, and the JSON-like flow mappings that GPT-NeoX ships, are YAML.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from castalia.errors import UserError

Path_ = tuple[str, ...]
_PLAIN_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's resolution of plain scalars."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as the base class declares it


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
class Origin:
    """Where a value was said: a file and line, the command line, a default, or derived."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Document:
    """One parsed file, or a file laid on its `base`.

    Attributes:
        path: the file.
        values: nested plain values.
        lines: the line of each key, counted from 1, by the key's path.
        inherited: the origin of what came from a base, by the key's path.
    """

    path: str
    values: dict[str, Any]
    lines: dict[Path_, int]
    inherited: dict[Path_, Origin] = field(default_factory=dict)

    def origin(self, *key: str) -> Origin:
        """Where a key of this document was said."""
        return self.inherited.get(key) or Origin(self.path, self.lines.get(key))


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
        run = Path(path, "config.yaml")
        hint = f": that of the run in it is {run}" if run.is_file() else ""
        raise UserError(f"{path}: is a folder, not a configuration file{hint}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, path: str) -> Document:
    """Parse YAML text; `path` is only for messages. Raises UserError as `read_yaml` does."""
    node = _compose(text, path)
    if node is None:
        return Document(path, {}, {})
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}:{node.start_mark.line + 1}: expected `key: value` pairs at the top of the file")
    reader = _Reader(path)
    return Document(path, reader.plain(node, ()), reader.lines)


def parse_value(text: str) -> Any:
    """The value of an override: one YAML scalar, list or mapping; text that is not YAML is itself."""
    try:
        node = _compose(text, "command line")
    except UserError:
        return text
    return None if node is None else _Reader("command line").plain(node, ())


def _compose(text: str, path: str) -> yaml.Node | None:
    try:
        loader = _Loader(text)
        try:
            node: yaml.Node | None = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except (ValueError, OverflowError):  # PyYAML, of an escape beyond Unicode
        raise UserError(f"{path}: not valid YAML: a character code is out of range") from None
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: nested too deeply") from None
    return node


class _Reader:
    """Nodes of one file to plain values, noting the lines of keys."""

    # Far more than any configuration has; an alias of aliases of aliases would grow without bound.
    most_nodes = 100_000

    def __init__(self, path: str) -> None:
        self.path, self.lines = path, dict[Path_, int]()
        self._open: list[yaml.Node] = []
        self._count = 0

    def plain(self, node: yaml.Node, at: Path_) -> Any:
        """The plain value of a node whose key path is `at`."""
        self._count += 1
        if self._count > self.most_nodes or any(node is outer for outer in self._open):
            raise UserError(f"{self.path}:{node.start_mark.line + 1}: an alias repeats itself without end")
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node, self.path)
        if node.tag not in _PLAIN_TAGS:
            raise UserError(
                f"{self.path}:{node.start_mark.line + 1}: the tag {node.tag} is not supported in configurations"
            )
        self._open.append(node)
        value = self._mapping(node, at) if isinstance(node, yaml.MappingNode) else self._list(node, at)
        self._open.pop()
        return value

    def _list(self, node: yaml.Node, at: Path_) -> list[Any]:
        return [self.plain(child, (*at, str(i))) for i, child in enumerate(node.value)]

    def _mapping(self, node: yaml.MappingNode, at: Path_) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(f"{self.path}:{line}: a key must be a plain word")
            key = str(key_node.value)
            if key in out:
                first = self.lines[(*at, key)]
                raise UserError(f"{self.path}:{line}: key '{key}' was given before, at line {first}: keep one")
            self.lines[(*at, key)] = line
            out[key] = self.plain(value_node, (*at, key))
        return out


def _scalar(node: yaml.ScalarNode, path: str) -> Any:
    kind, text = node.tag.rsplit(":", 1)[-1], node.value
    if kind == "null":
        return None
    if kind == "bool" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind == "str":
        return text
    try:
        if kind == "int":
            value = int(text.replace("_", ""), 0 if text[:2] in ("0x", "0o") else 10)
            if abs(value) < 1 << 63:
                return value
        if kind == "float":
            return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        pass
    where = f"{path}:{node.start_mark.line + 1}"
    # Whole numbers are those of 64 bits, so that what is reckoned with them stays finite.
    if kind in ("bool", "int", "float"):
        raise UserError(f"{where}: '{text[:40]}' cannot be read as {kind}")
    raise UserError(f"{where}: the tag {node.tag} is not supported in configurations")
