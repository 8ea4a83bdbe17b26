"""The configuration's JSON Schema, by which an editor completes keys, shows their meaning and marks mistakes.

    schema.py ─pydantic─> JSON Schema ─tidy─> docs/castalia.schema.json
                                              # yaml-language-server: $schema=...

Pydantic knows types, limits and choices. Added here: the class and unit in each description,
the names that a registry knows, and `base`, which the loader takes out before pydantic sees it.
"""

from __future__ import annotations

import json
from typing import Any

from castalia.config.fields import class_of, fields, unit_of
from castalia.config.schema import Config

# Registered names by key. The registries hold functions and need torch, so the names stand here
# again; a test holds the two together.
NAMES: dict[str, tuple[str, ...]] = {
    "model.block": ("transformer",),
    "model.attention_core": ("sdpa",),
    "loss.function": ("cross_entropy",),
    "model.norm": ("layernorm", "rmsnorm", "rmsnorm_eps_outside", "scalenorm", "non_parametric_layernorm"),
    "model.activation": (
        *("gelu", "gelu_tanh", "relu", "silu", "swish", "mish", "softsign"),
        *("swiglu", "geglu", "reglu", "bilinear", "glu"),
    ),
    "model.init_method": (
        *("normal", "scaled_normal", "single_residual_scaled_normal", "small_init", "wang_init"),
        *("xavier_uniform", "xavier_normal", "orthogonal", "scaled_orthogonal"),
    ),
    "optimizer.type": (
        *("adamw", "adam", "sgd", "lion", "madgrad", "madgrad_wd", "schedule_free", "adamw_8bit"),
        "onebit_adam",
        *("muon", "soap", "adafactor", "sm3"),
    ),
}
NAMES["model.output_init_method"] = NAMES["model.init_method"]

_BASE = {
    "type": "string",
    "description": "another file, relative to this one, whose values hold where this file gives none",
}


def json_schema() -> dict[str, Any]:
    """The schema of a native configuration file, as plain values."""
    raw = Config.model_json_schema()
    definitions = raw["$defs"]
    properties: dict[str, Any] = {"base": _BASE}
    known = dict(fields())
    for name, entry in raw["properties"].items():
        if "$ref" not in entry:
            properties[name] = _field(name, entry, known)
            continue
        inner = definitions[entry["$ref"].rsplit("/", 1)[-1]]
        properties[name] = {
            "description": Config.model_fields[name].description,
            # A heading with nothing below it is null.
            "type": ["object", "null"],
            "additionalProperties": False,
            "properties": {key: _field(f"{name}.{key}", value, known) for key, value in inner["properties"].items()},
        }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Castalia configuration, version 1",
        "description": "A whole run. `castalia config explain KEY` says more of a key.",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def json_schema_text() -> str:
    """The schema as it is committed."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"


def _field(key: str, entry: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    info = known[key]
    kind, unit = class_of(info), unit_of(info)
    out = {name: value for name, value in entry.items() if name not in ("title", "class", "unit")}
    out["description"] = f"{info.description} ({kind}{f', in {unit}' if unit else ''})"
    if key in NAMES:
        out.pop("type")
        out["anyOf"] = [{"enum": list(NAMES[key])}, {"type": "string", "pattern": "^[A-Za-z_./~]"}]
    return out
