"""`castalia corpora list|get`."""

from __future__ import annotations

import argparse
import json
import sys


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    verbs = parser.add_subparsers(dest="what", required=True, metavar="list|get")
    verbs.add_parser("list", help="the corpora that can be had")
    get = verbs.add_parser("get", help="write a corpus as train.jsonl and valid.jsonl")
    get.add_argument("name")
    get.add_argument("--output", required=True, metavar="FOLDER")
    get.add_argument("--valid-fraction", type=float, default=0.05, help="share of the files kept for validation")


def run(args: argparse.Namespace) -> int:
    """List or get."""
    from castalia.data.corpora import CORPORA, write_corpus
    from castalia.errors import UserError

    if args.what == "list":
        for name, text in CORPORA.items():
            print(f"{name:<12} {text}")
        return 0
    if args.name not in CORPORA:
        raise UserError(f"unknown corpus '{args.name}'; known: {', '.join(CORPORA)}")
    if not 0 < args.valid_fraction < 1:
        raise UserError(f"--valid-fraction {args.valid_fraction} must lie between 0 and 1")
    summary = write_corpus(args.output, args.valid_fraction)
    print(json.dumps(summary), file=sys.stderr)
    return 0
