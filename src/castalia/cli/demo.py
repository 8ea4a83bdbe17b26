"""`castalia demo [--corpus FILE]`: train a small model on this machine from nothing, in minutes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument(
        "--corpus", metavar="FILE", help="your own text (.txt, .jsonl, a folder) instead of the standard library"
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings laid over configs/demo.yml")
    parser.add_argument("--folder", default=".", help="write data/demo and runs/demo below this folder (default: here)")
    parser.add_argument("--minutes", type=float, default=3.0, help="how long to train (default 3)")
    parser.add_argument("--prompt", default="def ", help="what the sample at the end continues")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Run the demo and show what came out."""
    from castalia.errors import UserError
    from castalia.tools.demo import demo_minutes, print_lines, run_demo
    from castalia.train.loop import Stopped

    minutes = demo_minutes(args.minutes)
    if not 0 < minutes < 60 * 24 * 365:  # also refuses nan
        raise UserError(f"--minutes {args.minutes} must be a number above 0")
    corpus = Path(args.corpus) if args.corpus else None
    try:
        result = run_demo(Path(args.folder), corpus, minutes, print_lines, args.prompt, args.settings)
    except Stopped as stop:
        print_lines(f"castalia: {stop}")
        return 3
    if args.json:
        print(json.dumps({"run": str(result.run), "report": str(result.report), **result.comparison}))
        return 0
    print("\nbits per byte on files that were never seen in training (less is better)")
    for row in result.comparison["rows"]:
        print(f"  {row['bits_per_byte']:.3f}  {row['name']:<9} {row['note']}")
    print(f"\na sample, continuing {args.prompt!r}:\n")
    print("\n".join("    " + line for line in (args.prompt + result.sample).splitlines()))
    print(f"\nreport:   {result.report}")
    print(f"go on:    castalia generate {result.run} --prompt 'class '")
    return 0
