"""The JSON Schema says of a file what the loader says of it."""

import re
from pathlib import Path
from typing import Any

import pytest

from castalia.config import load
from castalia.config.fields import fields
from castalia.config.json_schema import NAMES, json_schema
from castalia.config.load import from_yaml
from castalia.config.render import to_yaml
from castalia.config.yaml12 import parse_yaml, read_yaml
from castalia.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SCHEMA = json_schema()
KINDS = {"string": str, "boolean": bool, "array": list, "object": dict, "null": type(None)}


def complaints(value: Any, schema: dict[str, Any], at: str = "") -> list[str]:
    """What JSON Schema's rules say against a value, as far as our schema uses them."""
    known = {"$schema", "title", "description", "default", "type", "properties", "additionalProperties", "anyOf"}
    known |= {"enum", "const", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "pattern"}
    known |= {"items", "minLength", "minItems", "maxItems"}
    assert schema.keys() <= known, schema.keys() - known
    if "anyOf" in schema and not any(not complaints(value, choice, at) for choice in schema["anyOf"]):
        return [f"{at}: none of the choices"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{at}: not one of {schema['enum']}"]
    if "const" in schema and value != schema["const"]:
        return [f"{at}: not {schema['const']}"]
    if "type" in schema and not any(_is(value, kind) for kind in _list(schema["type"])):
        return [f"{at}: not {schema['type']}"]
    out = []
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in schema["properties"]:
                out += complaints(inner, schema["properties"][key], f"{at}.{key}")
            else:
                out.append(f"{at}: unknown {key}")
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 10**9):
            out.append(f"{at}: length")
        for item in value:
            out += complaints(item, schema.get("items", {}), f"{at}[]")
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = schema.get("minimum", value), schema.get("maximum", value)
        over, under = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
        if not low <= value <= high or (over is not None and value <= over) or (under is not None and value >= under):
            out.append(f"{at}: limit")
    if isinstance(value, str) and not (
        re.search(schema.get("pattern", ""), value) and len(value) >= schema.get("minLength", 0)
    ):
        out.append(f"{at}: pattern")
    return out


def _list(kind: Any) -> list[str]:
    return kind if isinstance(kind, list) else [kind]


def _is(value: Any, kind: str) -> bool:
    if kind in ("integer", "number"):
        return isinstance(value, int if kind == "integer" else int | float) and not isinstance(value, bool)
    return isinstance(value, KINDS[kind])


def test_every_key_is_there_with_its_meaning_class_and_unit() -> None:
    for key, info in fields():
        section, _, name = key.rpartition(".")
        properties = SCHEMA["properties"][section]["properties"] if section else SCHEMA["properties"]
        assert properties[name]["description"].startswith(str(info.description))
        assert re.search(r"\((numerics|performance|cosmetic)(, in [\w/ ]+)?\)$", properties[name]["description"])
        assert "title" not in properties[name]


def native_files() -> list[Path]:
    return [path for path in sorted(CONFIGS.rglob("*.yml")) if "gptneox" not in path.parts]


@pytest.mark.parametrize("path", native_files(), ids=lambda path: path.name)
def test_shipped_files_are_right_by_it(path: Path) -> None:
    assert complaints(read_yaml(path).values, SCHEMA) == []


def test_a_complete_file_is_right_by_it() -> None:
    assert complaints(parse_yaml(to_yaml(load([])), "f").values, SCHEMA) == []


@pytest.mark.parametrize(
    "text",
    [
        "modle: {num_layers: 2}",
        "model: {num_layer: 2}",
        "model: {num_layers: 0}",
        "model: {num_layers: two}",
        "model: {num_layers: true}",
        "model: {position: sideways}",
        "model: {hidden_dropout: 1.0}",
        "model: 3",
        "optimizer: {betas: [0.9]}",
        "optimizer: {lr: 0}",
        "training: {precision: fp64}",
        "version: 2",
        "name: ''",
        "data: {train_paths: a}",
    ],
)
def test_what_the_loader_refuses_is_marked(text: str) -> None:
    assert complaints(parse_yaml(text, "f").values, SCHEMA)
    with pytest.raises(UserError):
        from_yaml(text, "f")


@pytest.mark.parametrize(
    "text", ["base: other.yml", "model:", "model: {norm: mine:Norm}", "data: {path: null}", "optimizer: {lr: 1}"]
)
def test_what_the_loader_takes_is_not_marked(text: str) -> None:
    assert complaints(parse_yaml(text, "f").values, SCHEMA) == []


def test_names_are_those_of_the_registries() -> None:
    from castalia.model.initial import INITIALISERS
    from castalia.model.registry import ACTIVATIONS
    from castalia.optim.optimizers import OPTIMIZERS

    assert set(NAMES["model.activation"]) == ACTIVATIONS.keys()
    assert set(NAMES["model.init_method"]) == INITIALISERS.keys()
    assert set(NAMES["optimizer.type"]) == OPTIMIZERS.keys()


def test_names_of_parts_that_tests_may_have_added_to() -> None:
    from castalia.model import norms, transformer
    from castalia.model.registry import BLOCKS, NORMS

    assert norms and transformer  # whose import registers them
    assert set(NAMES["model.norm"]) <= NORMS.keys()
    assert set(NAMES["model.block"]) <= BLOCKS.keys()
