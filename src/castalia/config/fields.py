"""Every dotted key with what the schema says of it, and a configuration's values by dotted key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from castalia.config.load import known_keys
from castalia.config.schema import Config


def fields() -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key with its field."""
    for key in known_keys():
        section, _, name = key.rpartition(".")
        owner: Any = Config.model_fields[section].annotation if section else Config
        yield key, owner.model_fields[name]


def class_of(info: FieldInfo) -> str:
    """numerics, performance or cosmetic."""
    return str(_extra(info).get("class", "numerics"))


def unit_of(info: FieldInfo) -> str | None:
    """The unit of a field, if it has one."""
    unit = _extra(info).get("unit")
    return None if unit is None else str(unit)


def flat(config: Config) -> dict[str, Any]:
    """Values by dotted key, in the order of the schema."""
    out: dict[str, Any] = {}
    for name in Config.model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            out.update({f"{name}.{key}": _plain(getattr(value, key)) for key in type(value).model_fields})
        else:
            out[name] = value
    return out


def _plain(value: Any) -> Any:
    """A field's value as a file gives it: lists of settings are lists of mappings."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.model_dump() if isinstance(value, BaseModel) else value


def _extra(info: FieldInfo) -> dict[str, Any]:
    extra = info.json_schema_extra
    return extra if isinstance(extra, dict) else {}
