"""`castalia train A.yml [key=value ...]`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from castalia.cli import split_settings


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("settings", nargs="+", metavar="FILE|key=value", help="configuration files and overrides")
    parser.add_argument("--accept", action="store_true", help="go on although a numerics setting was changed")
    parser.add_argument("--quiet", action="store_true", help="no progress lines")
    parser.add_argument("--no-report", action="store_true", help="write no report.html at the end")
    parser.add_argument("--json", action="store_true", help="print the last records as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Train, then write the report."""
    from castalia.tools.report import write_report
    from castalia.train.loop import Stopped
    from castalia.train.run import train

    files, overrides = split_settings(args.settings)
    try:
        done = train([Path(f) for f in files], *overrides, accept=args.accept, quiet=args.quiet)
    except Stopped as stop:
        print(f"castalia: {stop}", file=sys.stderr, flush=True)
        if args.json:
            print(json.dumps({"stopped": str(stop)}))
        return 3
    report = None
    if not args.no_report:
        report = done.directory / "report.html"
        write_report([done.directory], report)
    if args.json:
        print(json.dumps({"run": str(done.directory), "report": str(report), "last": done.last}))
    elif not args.quiet:
        done.console.say(f"run: {done.directory}" + (f"   report: {report}" if report else ""))
    return 0
