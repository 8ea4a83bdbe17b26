"""`castalia checkpoint list RUN`, `castalia checkpoint slim RUN OUT`."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    verbs = parser.add_subparsers(dest="what", required=True)
    listing = verbs.add_parser("list", help="steps, sizes, times, and which are damaged")
    listing.add_argument("run", help="a run, or one checkpoint")
    listing.add_argument("--json", action="store_true", help="print one JSON object")
    slim = verbs.add_parser("slim", help="copy weights, settings and tokenizer, without the optimizer's state")
    slim.add_argument("run", help="a run, or one checkpoint")
    slim.add_argument("output", help="the folder to make")
    slim.add_argument("--step", type=int, metavar="N", help="which checkpoint (default: the newest whole one)")


def run(args: argparse.Namespace) -> int:
    """List, or copy."""
    from castalia.tools.checkpoints import listed, slim

    if args.what == "slim":
        path = slim(Path(args.run), Path(args.output), args.step)
        size = sum(file.stat().st_size for file in path.iterdir())
        print(f"{path}: {size / 1e6:,.1f} MB")
        return 0
    rows = listed(args.run)
    if args.json:
        print(json.dumps({"checkpoints": [row.as_dict() for row in rows]}))
        return 0
    for row in rows:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row.written))
        tokens = "" if row.tokens is None else f"{row.tokens:,} tokens"
        print(f"{row.name}  {row.bytes / 1e6:>12,.1f} MB  {when}  {row.problem or tokens}")
    return 0
