"""`castalia train A.yml [key=value ...]`."""

from __future__ import annotations

import argparse
import json
import sys

from castalia.cli import split_settings


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("settings", nargs="+", metavar="FILE|key=value", help="configuration files and overrides")
    parser.add_argument("--accept", action="store_true", help="go on although a numerics setting was changed")
    parser.add_argument("--quiet", action="store_true", help="no progress lines")
    parser.add_argument("--verbose", action="store_true", help="also say how each value that was left open follows")
    parser.add_argument("--no-report", action="store_true", help="write no report.html at the end")
    parser.add_argument("--json", action="store_true", help="print the last records as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Train, then write the report."""
    from castalia.config import load

    files, overrides = split_settings(args.settings)
    config = load(files, overrides)  # before torch is imported, which takes seconds

    from castalia.tools.report import write_report
    from castalia.train.loop import Stopped
    from castalia.train.run import train

    try:
        done = train(config, sources=files, accept=args.accept, quiet=args.quiet, verbose=args.verbose)
    except Stopped as stop:
        print(f"castalia: {stop}", file=sys.stderr, flush=True)
        if args.json:
            print(json.dumps({"stopped": str(stop)}))
        return 3
    report = None
    if not args.no_report:
        report = done.directory / "report.html"
        try:
            write_report([done.directory], report)
        except Exception as error:  # the run is finished and saved; a page about it is not worth failing for
            print(f"castalia: WARNING: no report was written: {error}", file=sys.stderr)
            report = None
    if args.json:
        print(json.dumps({"run": str(done.directory), "report": report and str(report), "last": done.last}))
    elif not args.quiet:
        done.console.say(f"run: {done.directory}" + (f"   report: {report}" if report else ""))
    return 0
