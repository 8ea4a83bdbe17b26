"""GPT-NeoX YAML -> our values, each with its origin, and a note for every key.

    a.yml ──┐ underscores      TRANSLATED ──> rules ──> values and origins by our key
    b.yml ──┼────────────> keys REPORTED ──> a note saying why it means nothing here
    k=v   ──┘ merged flat      REFUSED ──> a UserError, unless it asks for nothing

`compat: main` (the default) or `compat: v2.0` in a file, or as an override, says whose
defaults and formulas are meant where the two versions of GPT-NeoX differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from castalia.config.gptneox_given import Given, near
from castalia.config.gptneox_keys import COMPAT, IDLE, KNOWN, REFUSED, REPORTED
from castalia.config.gptneox_rules import CHECKS, NULL_COUNTS, RENAMED, REQUIRED, RULES
from castalia.config.schema import Config
from castalia.config.yaml12 import Document, Origin, Path_
from castalia.errors import UserError

VERSIONS = ("main", "v2.0")


@dataclass(frozen=True)
class Translation:
    """What GPT-NeoX files became.

    Attributes:
        values: by our dotted key.
        origins: where each was said, or whose default it is.
        notes: a line each: remarks on the whole, then every key that was given.
        remarks: the first of them alone.
    """

    values: dict[str, Any]
    origins: dict[str, Origin]
    notes: list[str]
    remarks: list[str]


def normalise(key: str) -> str:
    """GPT-NeoX takes dashes in keys for underscores."""
    return key.replace("-", "_")


def is_their_key(key: str) -> bool:
    """Whether GPT-NeoX has such a key."""
    return normalise(key) in KNOWN


def family(document: Document) -> str | None:
    """`gptneox` or `castalia`, by the keys at the top of a file; None where nothing tells them apart."""
    theirs = False
    for key, value in document.values.items():
        if key in Config.model_fields and not _is_their_block(key, value):
            return "castalia"
        if "." in key:
            return "castalia"
        theirs = theirs or is_their_key(key)
    return "gptneox" if theirs else None


def is_gptneox(document: Document) -> bool:
    """Whether a file has GPT-NeoX's flat keys, with dashes or underscores, and no section of ours."""
    return family(document) == "gptneox"


def flatten(document: Document) -> Iterator[tuple[Path_, Any, Origin]]:
    """Key path (one underscored word), value and origin of each key; raises UserError for a repeated one."""
    seen: dict[str, Origin] = {}
    for raw, value in document.values.items():
        key, here = normalise(raw), document.origin(raw)
        if key in seen:
            raise UserError(f"{here}: '{raw}' was given before, at {seen[key]}: keep one")
        seen[key] = here
        yield (key,), value, here


def translate(documents: Sequence[Document], overwrite: Mapping[str, Any] | None = None) -> Translation:
    """Translate GPT-NeoX files.

    Args:
        documents: the files, in order; no key may be in two of them.
        overwrite: values from the command line by their key, which replace those of the files.

    Raises:
        UserError: a key is unknown, repeated, of the wrong kind, or asks for what is not
            implemented; or the values contradict each other.
    """
    given = merge(documents, overwrite or {})
    _refuse(given)
    for _, check in CHECKS:
        check(given)
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    became: dict[str, list[str]] = {}

    def put(ours: str, value: Any, reads: Sequence[str]) -> None:
        if value is None and ours not in NULL_COUNTS:
            return
        values[ours], origins[ours] = value, given.origin(*reads)
        for key in reads:
            became.setdefault(key, []).append(ours)

    for key, ours in REQUIRED.items():
        put(ours, given.required(key), [key])
    for key, ours in RENAMED.items():
        put(ours, given[key], [key])
    for rule in RULES:
        put(rule.ours, rule.value(given), rule.reads)
    file = given.origins["num_layers"].file
    if Path(file).suffix and Path(file).stem:
        put("name", Path(file).stem, ["num_layers"])
        became["num_layers"].remove("name")
    return Translation(values, origins, [*given.remarks, *_notes(given, values, became)], list(given.remarks))


def merge(documents: Sequence[Document], overwrite: Mapping[str, Any]) -> Given:
    """What the files say together, not translated; raises UserError as `translate` does of keys and kinds."""
    given = Given({}, {})
    for document in documents:
        for (key,), value, here in flatten(document):
            if key not in KNOWN:
                raise UserError(f"{here}: GPT-NeoX has no key '{key}'{near(key)}")
            if key in given.values:
                raise UserError(f"{here}: '{key}' was given already at {given.origins[key]}: remove one of the two")
            given.values[key], given.origins[key] = value, here
    for raw, value in overwrite.items():
        given.values[normalise(raw)], given.origins[normalise(raw)] = value, Origin("command line")
    compat = given.values.pop(COMPAT, None)
    if compat is not None:
        if compat not in VERSIONS:
            given.fail_at(COMPAT, f"must be {' or '.join(VERSIONS)}, got {str(compat)[:40]!r}")
        given.compat = compat
    given.check_kinds()
    return given


def _refuse(given: Given) -> None:
    """Raise for the first key that asks for something that is missing."""
    for key, value in given.values.items():
        refused = REFUSED.get(key)
        if refused is not None and refused.asks(value):
            given.unsupported(key, refused.what, refused.instead)


def _notes(given: Given, values: Mapping[str, Any], became: Mapping[str, list[str]]) -> Iterator[str]:
    """A line for every key that was given: first what means nothing here, then what the rest became."""
    for key, value in given.values.items():
        if key in REPORTED and value is not None:
            yield f"{key}: {REPORTED[key]}"
    for key, value in given.values.items():
        if value is None:
            yield f"{key}: null, as if it were not given"
        elif key in became:
            yield f"{key}: became " + ", ".join(f"{ours} {values[ours]}" for ours in dict.fromkeys(became[key]))
        elif key not in REPORTED:
            yield f"{key}: {IDLE.get(key) or f'{str(value)[:40]} asks for nothing that would have to be set here'}"


def _is_their_block(key: str, value: Any) -> bool:
    """GPT-NeoX has mappings `optimizer` (with `params`) and `checkpoint` too, and a switch `profile`."""
    if not isinstance(value, dict) or not is_their_key(key):
        return isinstance(value, bool) and is_their_key(key)
    section = Config.model_fields[key].annotation
    fields = section.model_fields if isinstance(section, type) and issubclass(section, BaseModel) else {}
    return "params" in value if key == "optimizer" else not value.keys() & fields.keys()
