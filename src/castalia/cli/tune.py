"""`castalia tune CONFIG [key=value]`: measure the most promising ways to run it here; write the quickest."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from castalia.cli import split_settings
from castalia.errors import UserError


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("settings", nargs="+", metavar="FILE|key=value", help="configuration files and overrides")
    parser.add_argument("--minutes", type=float, default=10.0, help="for the trials of this sitting (default: 10)")
    parser.add_argument("--candidates", type=int, default=6, metavar="N", help="layouts to look at (default: 6)")
    parser.add_argument("--machine", metavar="NAME|FILE", help="its description (default: it is measured)")
    parser.add_argument("--folder", metavar="DIR", help="of trials and tuned.yml (default: runs/NAME-tune)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Try, and say which was quickest."""
    from castalia.config import load
    from castalia.parallel.world import launched
    from castalia.tools.tune import say_to_stderr, table, tune

    if launched():
        raise UserError("tune starts processes of its own, and WORLD_SIZE says that a launcher started this one")
    if not args.minutes > 0:
        raise UserError(f"--minutes {args.minutes:g}: give more than 0")
    if args.candidates < 1:
        raise UserError(f"--candidates {args.candidates}: give at least 1")
    files, overrides = split_settings(args.settings)
    folder = Path(args.folder or f"runs/{load(files, overrides).name}-tune")
    answer = tune(files, overrides, folder, args.minutes, args.machine, args.candidates, say_to_stderr)
    if args.json:
        print(json.dumps(answer, indent=2))
        return 0
    print("\n".join(table(answer)))
    gain = answer["speed_up"]
    said = ""
    if gain is not None:
        said = f": {gain['median']:.2f} times as fast as given ({gain['least']:.2f} to {gain['most']:.2f} in turns)"
    print(f"{answer['tuned']}{said}; castalia train {answer['tuned']} --procs {answer['processes']}")
    return 0
