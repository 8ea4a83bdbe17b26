"""`castalia report RUN [RUN ...]`."""

from __future__ import annotations

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders; several are set side by side")
    parser.add_argument("--output", metavar="FILE.html", help="default: report.html in the (first) run's folder")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is no report, too")


def run(args: argparse.Namespace) -> int:
    """Write the page and print its path."""
    from castalia.errors import UserError
    from castalia.tools.report import is_report, write_report

    runs = [Path(r) for r in args.runs]
    output = Path(args.output) if args.output else runs[0] / "report.html"
    if args.output and output.is_file() and not args.overwrite and not is_report(output):
        raise UserError(f"{output}: exists and is no report: choose another name, or say --overwrite")
    write_report(runs, output)
    print(output)
    return 0
