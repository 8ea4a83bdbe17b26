"""`castalia report RUN [RUN ...]`."""

from __future__ import annotations

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders; several are set side by side")
    parser.add_argument("--output", metavar="FILE.html", help="default: report.html in the (first) run's folder")


def run(args: argparse.Namespace) -> int:
    """Write the page and print its path."""
    from castalia.tools.report import write_report

    runs = [Path(r) for r in args.runs]
    output = Path(args.output) if args.output else runs[0] / "report.html"
    write_report(runs, output)
    print(output)
    return 0
