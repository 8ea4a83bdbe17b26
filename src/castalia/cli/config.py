"""`castalia config show|explain|check|diff|convert|schema`: everything about a configuration, without running it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from castalia.cli import split_settings

if TYPE_CHECKING:
    from castalia.config import Config

SETTINGS = "FILE|key=value"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    verbs = parser.add_subparsers(dest="what", required=True, metavar="show|explain|check|diff|convert|schema")

    show = verbs.add_parser("show", help="the complete configuration, every default written out")
    show.add_argument("settings", nargs="*", metavar=SETTINGS)
    show.add_argument("--comments", action="store_true", help="also write what each key means")
    show.add_argument("--json", action="store_true", help="print one JSON object")

    explain = verbs.add_parser("explain", help="what a key means, its value, and where that comes from")
    explain.add_argument("key", help="a dotted key, or a section, which lists its keys")
    explain.add_argument("settings", nargs="*", metavar=SETTINGS)

    check = verbs.add_parser("check", help="say whether files are right, and what follows from them")
    check.add_argument("settings", nargs="+", metavar=SETTINGS)
    check.add_argument(
        "--settings-only", action="store_true", help="do not look for the data, the tokenizer, the device, the memory"
    )
    check.add_argument("--json", action="store_true", help="print one JSON object")

    diff = verbs.add_parser("diff", help="what differs between two configurations, and what the difference changes")
    diff.add_argument("settings", nargs="+", metavar="FILE|RUN|key=value", help="A [overrides of A] B [overrides of B]")
    diff.add_argument("--json", action="store_true", help="print one JSON object")

    convert = verbs.add_parser("convert", help="write GPT-NeoX's files as one native file")
    convert.add_argument("settings", nargs="+", metavar=SETTINGS)
    convert.add_argument("--minimal", action="store_true", help="leave out what has its default")
    convert.add_argument("--output", metavar="FILE", help="write there (default: standard output)")
    convert.add_argument("--overwrite", action="store_true", help="replace the file if it exists")

    schema = verbs.add_parser("schema", help="the JSON Schema, by which editors complete keys")
    schema.add_argument("--output", metavar="FILE", help="write there (default: standard output)")
    schema.add_argument("--overwrite", action="store_true", help="replace the file if it exists")


def run(args: argparse.Namespace) -> int:
    """Print what was asked for."""
    return _WHAT[args.what](args)


def _settings(given: list[str]) -> tuple[list[str], list[str]]:
    """Files and overrides; a run's folder stands for its config.yaml."""
    files, overrides = split_settings(given)
    return [_of_run(name) for name in files], overrides


def _of_run(name: str) -> str:
    path = Path(name, "config.yaml")
    return str(path) if path.is_file() else name


def _show(args: argparse.Namespace) -> int:
    from castalia.config import load
    from castalia.config.render import to_yaml

    config = load(*_settings(args.settings))
    if args.json:
        print(json.dumps(config.model_dump()))
    else:
        print(to_yaml(config, args.comments), end="")
    return 0


def _explain(args: argparse.Namespace) -> int:
    from castalia.config import load
    from castalia.config.derive import derive
    from castalia.config.render import explain
    from castalia.tools.plan import tokenizer_vocabulary

    config = load(*_settings(args.settings))
    print(explain(config, args.key, derive(config, tokenizer_vocabulary(config))[1]))
    return 0


def _check(args: argparse.Namespace) -> int:
    from castalia.config import load, notes
    from castalia.config.derive import derive
    from castalia.tools.plan import tokenizer_vocabulary

    config = load(*_settings(args.settings))
    warnings: list[str] = []
    if args.settings_only:
        full, derivation = derive(config, tokenizer_vocabulary(config))
    else:
        from castalia.train.preflight import prepare_run

        ready = prepare_run(config)
        full, derivation, warnings = ready.config, ready.derivation, ready.warnings
    if args.json:
        answer = {"notes": notes(config), "derivation": derivation, "warnings": warnings}
        print(json.dumps(answer | {"config": full.model_dump()}))
        return 0
    for line in [*notes(config), *derivation, *(f"WARNING: {warning}" for warning in warnings)]:
        print(line)
    more = "; data, tokenizer, device and memory were not looked at" if args.settings_only else ""
    print(f"the configuration is right{more}")
    return 0


def _diff(args: argparse.Namespace) -> int:
    from castalia.config.compare import MEANINGS, differences

    names, (old, new) = _two_sides(args.settings)
    found = differences(old, new)
    if args.json:
        rows = [{"key": d.key, "a": d.old, "b": d.new, "class": d.kind} for d in found]
        same = not any(d.kind == "numerics" for d in found)
        print(json.dumps({"a": names[0], "b": names[1], "differences": rows, "same_function": same}))
        return 0
    from castalia.config.render import scalar

    for kind, meaning in MEANINGS.items():
        rows_of_kind = [d for d in found if d.kind == kind]
        if rows_of_kind:
            print(f"{kind}: {meaning}")
        for d in rows_of_kind:
            print(f"  {d.key}: {scalar(d.old)} -> {scalar(d.new)}")
    if not found:
        print("no difference")
    return 0


def _two_sides(settings: list[str]) -> tuple[list[str], tuple[Config, Config]]:
    """`A a=1 B b=2` -> both names, both derived configurations; a run's folder stands for its config.yaml."""
    from castalia.config import load
    from castalia.config.derive import derive
    from castalia.errors import UserError
    from castalia.tools.plan import tokenizer_vocabulary

    names: list[str] = []
    overrides: list[list[str]] = []
    for setting in settings:
        if "=" not in setting:
            names.append(setting)
            overrides.append([])
        elif not names:
            raise UserError(f"'{setting}' stands before the first file: give A [overrides of A] B [overrides of B]")
        else:
            overrides[-1].append(setting)
    if len(names) != 2:
        raise UserError(f"a difference is between two configurations, and {len(names)} were named: give two")
    sides = []
    for name, more in zip(names, overrides, strict=True):
        config = load([_of_run(name)], more)
        sides.append(derive(config, tokenizer_vocabulary(config))[0])
    return names, (sides[0], sides[1])


def _convert(args: argparse.Namespace) -> int:
    from castalia.config import load
    from castalia.config.render import converted, from_yaml

    config = load(*split_settings(args.settings))
    text = converted(config, args.minimal)
    assert from_yaml(text).model_dump() == config.model_dump(), "the written file differs from what was read"
    return _write(text, args)


def _schema(args: argparse.Namespace) -> int:
    from castalia.config.json_schema import json_schema_text

    return _write(json_schema_text(), args)


def _write(text: str, args: argparse.Namespace) -> int:
    """To a file, whole or not at all, or to standard output."""
    if args.output is None:
        print(text, end="")
        return 0
    from castalia.config.files import write_text
    from castalia.errors import UserError

    if Path(args.output).is_file() and not args.overwrite:
        raise UserError(f"{args.output}: exists already: choose another name, or say --overwrite")
    write_text(args.output, text)
    return 0


_WHAT: dict[str, Callable[[argparse.Namespace], int]] = {
    "show": _show,
    "explain": _explain,
    "check": _check,
    "diff": _diff,
    "convert": _convert,
    "schema": _schema,
}
