"""`castalia inspect PATH...`: what is in a checkpoint, ours or anybody's, without running what is in it."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from castalia.tools.inspect import Contents


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="a run, a checkpoint, a file (.pt .bin .ckpt .safetensors), a folder"
    )
    parser.add_argument("--step", type=int, help="checkpoint of a run (default: the newest)")
    parser.add_argument("--filter", action="append", default=[], metavar="GLOB", help="names that match alone")
    parser.add_argument("--names", action="store_true", help="do not read the numbers: shapes and values alone")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--diff", action="store_true", help="compare two: names on one side, largest differences")
    what.add_argument("--browse", action="store_true", help="fold and unfold the tree by line commands")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Look, compare or browse."""
    from castalia.errors import UserError
    from castalia.tools.inspect import open_contents
    from castalia.tools.inspect_text import chosen

    if args.diff and len(args.paths) != 2:
        raise UserError(f"--diff compares two checkpoints, and {len(args.paths)} were named: give A and B")
    if args.browse and (len(args.paths) != 1 or args.json):
        raise UserError("--browse shows one checkpoint to a reader: give one path, and leave --json out")
    opened = [open_contents(path, args.step) for path in args.paths]
    if args.diff:
        return _diff(args, [_some(side, args.filter) for side in opened])
    parts = [chosen(contents, args.filter) for contents in opened]
    if args.browse:
        return _browse(parts[0])
    if args.json:
        print(json.dumps({"checkpoints": [_as_dict(contents, not args.names) for contents in parts]}))
        return 0
    from castalia.tools.inspect_text import lines

    for contents in parts:
        for line in lines(contents, not args.names):
            print(line)
    return 0


def _some(contents: Contents, globs: list[str]) -> Contents:
    """A side of a comparison may well have none of the names."""
    from castalia.errors import UserError
    from castalia.tools.inspect import Contents
    from castalia.tools.inspect_text import chosen

    try:
        return chosen(contents, globs)
    except UserError:
        return Contents(contents.path)


def _diff(args: argparse.Namespace, sides: list[Contents]) -> int:
    from castalia.errors import UserError
    from castalia.tools.inspect_numbers import differences
    from castalia.tools.inspect_text import difference_line

    if not any(side.tensors or side.values for side in sides):
        raise UserError(f"no name of either side matches {' or '.join(args.filter)}: give another --filter")
    found = []
    for difference in differences(*sides):
        found.append(difference)
        if not args.json:
            print(difference_line(difference))
    if args.json:
        a, b = (str(side.path) for side in sides)
        print(json.dumps({"a": a, "b": b, "equal": not found, "differences": [d.as_dict() for d in found]}))
    elif not found:
        print("no difference")
    return 0


def _browse(contents: Contents) -> int:
    from castalia.tools.inspect_text import Browser

    browser = Browser(contents, print)
    browser.draw()
    while True:
        try:
            line = input("number, + - /GLOB, h, q> ")
        except EOFError:
            print()
            return 0
        if not browser.obey(line):
            return 0


def _as_dict(contents: Contents, read: bool) -> dict[str, Any]:
    from castalia.tools.inspect_numbers import numbers

    tensors = []
    for entry in contents.tensors:
        row: dict[str, Any] = {
            "name": entry.name,
            "shape": list(entry.shape),
            "dtype": entry.dtype,
            "bytes": entry.bytes,
        }
        if read:
            found = numbers(entry.read())
            row |= found.as_dict() if found is not None else {}
        tensors.append(row)
    return {"path": str(contents.path), "tensors": tensors, "values": contents.values}
