"""A configuration as text: complete YAML that reads back exactly, and one key explained.

Numbers are written with the fewest digits that give the same float again, in a form that
YAML 1.1 readers take for numbers too (`1.0e-5`, not `1e-05`).
"""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from castalia.config.compare import RESUME_RULES
from castalia.config.fields import class_of, fields, flat, unit_of
from castalia.config.load import from_yaml, nearest
from castalia.config.schema import Config
from castalia.config.yaml12 import parse_value
from castalia.errors import UserError

__all__ = ["explain", "from_yaml", "scalar", "to_yaml"]

_PLAIN = re.compile(r"[A-Za-z_./~][A-Za-z0-9_./~+-]*")
# Words that older YAML readers take for booleans.
_OLD_BOOLEANS = frozenset(["y", "n", "yes", "no", "on", "off", "true", "false", "null"])


def to_yaml(config: Config, comments: bool = False) -> str:
    """The whole configuration as YAML, every default written out, in the order of the schema.

    Args:
        config: checked, derived or not.
        comments: also write each field's meaning beside it.
    """
    lines: list[str] = []
    for name, info in Config.model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            lines += ["", f"{name}:" + (f"  # {info.description}" if comments else "")]
            lines += [
                _line("  ", key, getattr(value, key), field, comments)
                for key, field in type(value).model_fields.items()
            ]
        else:
            lines.append(_line("", name, value, info, comments))
    return "\n".join(lines) + "\n"


def explain(config: Config, key: str) -> str:
    """What a key means, its class and unit, its value here and where that was said; a section lists its keys.

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
    text += [f"  class    {effect}", f"  type     {_type(info)}", f"  default  {scalar(default)}"]
    return "\n".join([*text, f"  from     {origin or 'the default'}"])


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


def _type(info: FieldInfo) -> str:
    kind = info.annotation
    name = kind.__name__ if isinstance(kind, type) else str(kind)
    limits = {"Gt": ">", "Ge": ">=", "Lt": "<", "Le": "<="}
    bounds = [
        f"{limits[type(m).__name__]} {getattr(m, type(m).__name__.lower())}"
        for m in info.metadata
        if type(m).__name__ in limits
    ]
    plain = name.replace("typing.", "").replace("NoneType", "null").replace("None", "null")
    return ", ".join([plain, *bounds])
