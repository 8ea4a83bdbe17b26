"""A configuration as text: complete YAML that reads back exactly, and one key explained.

Numbers are written with the fewest digits that give the same float again, in a form that
YAML 1.1 readers take for numbers too (`1.0e-5`, not `1e-05`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from castalia.config.compare import RESUME_RULES
from castalia.config.fields import class_of, fields, flat, unit_of
from castalia.config.load import from_yaml, nearest
from castalia.config.schema import Config
from castalia.config.yaml12 import parse_value
from castalia.errors import UserError

__all__ = ["converted", "explain", "from_yaml", "scalar", "to_yaml", "type_text"]

_PLAIN = re.compile(r"[A-Za-z_./~][A-Za-z0-9_./~+-]*")
# Words that older YAML readers take for booleans.
_OLD_BOOLEANS = frozenset(["y", "n", "yes", "no", "on", "off", "true", "false", "null"])


def to_yaml(config: Config, comments: bool = False, minimal: bool = False) -> str:
    """A configuration as YAML, in the order of the schema; it reads back as the same configuration.

    Args:
        config: checked, derived or not.
        comments: also write each field's meaning beside it.
        minimal: leave out what has its default, where the whole would otherwise be written.
    """
    kept = _said(config) if minimal else {key for key, _ in fields()}
    lines: list[str] = []
    for name, info in Config.model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            inner = [
                _line("  ", key, getattr(value, key), field, comments)
                for key, field in type(value).model_fields.items()
                if f"{name}.{key}" in kept
            ]
            if inner:
                lines += ["", f"{name}:" + (f"  # {info.description}" if comments else ""), *inner]
        elif name in kept:
            lines.append(_line("", name, value, info, comments))
    return "\n".join(lines) + "\n"


def _said(config: Config) -> set[str]:
    """The keys of a minimal file: the version, the run's length, and what differs from its default."""
    defaults = {key: info.get_default(call_default_factory=True) for key, info in fields()}
    length = "training.steps" if config.training.tokens is None else "training.tokens"
    return {"version", length} | {key for key, value in flat(config).items() if value != defaults[key]}


def converted(config: Config, minimal: bool = False) -> str:
    """A translated configuration as a native file, with what the translation had to say as comments above it."""
    notes = [f"#   {' '.join(note.split())}" for note in config._notes]
    head = ["# Translated from GPT-NeoX. What became of each key there:", *notes, ""] if notes else []
    return "\n".join([*head, to_yaml(config, minimal=minimal)])


def explain(config: Config, key: str, derivation: Sequence[str] = ()) -> str:
    """What a key means, its class and unit, its value here and where that was said; a section lists its keys.

    `derivation` are the lines of `derive`: one of them says what a null stands for.

    Raises:
        UserError: there is no such key.
    """
    known = dict(fields())
    if key in Config.model_fields and key not in known:
        inner = [name for name in known if name.startswith(f"{key}.")]
        width = max(map(len, inner))
        text = [f"{key}: {Config.model_fields[key].description}"]
        return "\n".join(text + [f"  {name.ljust(width)}  {known[name].description}" for name in inner])
    if key not in known:
        near = nearest(key, [*known, *Config.model_fields])
        raise UserError(f"there is no key '{key}'" + (f"; did you mean '{near}'?" if near else ""))
    info = known[key]
    kind, unit = class_of(info), unit_of(info)
    effect = {
        "numerics": "numerics: changes the function computed; a resumed run refuses a change",
        "performance": "performance: changes only rounding or speed",
        "cosmetic": "cosmetic: changes neither the function computed nor its speed",
    }[kind]
    effect = RESUME_RULES.get(key, effect)
    origin = config._origins.get(key)
    value, default = flat(config)[key], info.get_default(call_default_factory=True)
    text = [
        f"{key} = {scalar(value)}{f' {unit}' if unit and value is not None else ''}",
        f"  meaning  {info.description}",
    ]
    text += [f"  class    {effect}", f"  type     {type_text(info)}", f"  default  {scalar(default)}"]
    text.append(f"  from     {origin or 'the default'}")
    if value is None and derivation:
        text += [f"  here     {line}" for line in derivation if line.startswith(f"{key} = ")]
    return "\n".join(text)


def scalar(value: Any) -> str:
    """A value as YAML on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, list):
        return "[" + ", ".join(scalar(item) for item in value) + "]"
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {scalar(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str):
        return value if _is_plain(value) else _quoted(value)
    return str(value)


def _line(indent: str, key: str, value: Any, info: FieldInfo, comments: bool) -> str:
    text = f"{indent}{key}: {scalar(value)}"
    if isinstance(value, list) and len(text) > 100:
        text = f"{indent}{key}:" + "".join(f"\n{indent}  - {scalar(item)}" for item in value)
    return f"{text}  # {info.description}" if comments and "\n" not in text else text


def _float(value: float) -> str:
    mantissa, e, exponent = repr(value).partition("e")
    if mantissa.lstrip("-") in ("inf", "nan"):
        return mantissa.replace("inf", ".inf").replace("nan", ".nan")
    if not e:
        return mantissa
    sign, digits = exponent[0], exponent.lstrip("+-").lstrip("0")
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{sign}{digits}"


def _is_plain(text: str) -> bool:
    return bool(_PLAIN.fullmatch(text)) and text.lower() not in _OLD_BOOLEANS and parse_value(text) == text


def _quoted(text: str) -> str:
    """Double-quoted, with everything escaped that YAML's reader does not take as it is."""
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(c if c == " " or c.isprintable() else _escape(ord(c)) for c in quoted)


def _escape(code: int) -> str:
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def type_text(info: FieldInfo) -> str:
    """The type of a field in words, with its limits: `int or null, >= 1`."""
    limits = {"Gt": ">", "Ge": ">=", "Lt": "<", "Le": "<="}
    bounds = [
        f"{limits[type(m).__name__]} {getattr(m, type(m).__name__.lower())}"
        for m in info.metadata
        if type(m).__name__ in limits
    ]
    return ", ".join([_words(info.annotation), *bounds])


def _words(kind: Any) -> str:
    inner = [_words(part) for part in get_args(kind)] if get_origin(kind) is not Literal else []
    if get_origin(kind) is Literal:
        return " or ".join(scalar(value) for value in get_args(kind))
    if get_origin(kind) is list:
        return f"list of {inner[0]}"
    if inner:  # a union
        return " or ".join(inner)
    return "null" if kind is type(None) else str(getattr(kind, "__name__", kind))
