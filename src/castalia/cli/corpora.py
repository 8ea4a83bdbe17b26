"""`castalia corpora list|get|prepare`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    verbs = parser.add_subparsers(dest="what", required=True, metavar="list|get|prepare")
    listing = verbs.add_parser("list", help="the corpora that have names")
    listing.add_argument("--urls", action="store_true", help="also where their files lie")
    listing.add_argument("--json", action="store_true", help="one JSON object with all that is known")
    get = verbs.add_parser("get", help="fetch or make a corpus; goes on where it was interrupted")
    get.add_argument("--output", metavar="FOLDER", help="where to (default: $DATA_DIR/NAME, or data/NAME)")
    get.add_argument("--overwrite", action="store_true", help="get anew what is there")
    prepare = verbs.add_parser("prepare", help="get a corpus and tokenise all of it")
    prepare.add_argument("--folder", help="where the corpus is kept (default: $DATA_DIR/NAME, or data/NAME)")
    prepare.add_argument("--tokenizer", required=True, help="as for `castalia prepare`")
    prepare.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx, .json")
    prepare.add_argument("--workers", type=int, help="default: one for each core")
    prepare.add_argument("--overwrite", action="store_true", help="replace an existing data set (not the corpus)")
    for verb in (get, prepare):
        verb.add_argument("name", help="a name that `castalia corpora list` gives")
        verb.add_argument("--mirror", metavar="URL", help="a copy that is asked first")
        verb.add_argument(
            "--valid-fraction", type=float, default=0.05, help="stdlib: share of the files kept for validation"
        )


def run(args: argparse.Namespace) -> int:
    """List, get, or get and prepare."""
    from castalia.data.corpora import get_corpus
    from castalia.errors import UserError

    if args.what == "list":
        return _list(args)
    if not 0 < args.valid_fraction < 1:
        raise UserError(f"--valid-fraction {args.valid_fraction} must lie between 0 and 1")
    given = args.output if args.what == "get" else args.folder
    folder = given or os.path.join(os.environ.get("DATA_DIR") or "data", args.name)
    overwrite = args.overwrite and args.what == "get"
    files = get_corpus(args.name, folder, overwrite, args.valid_fraction, args.mirror, _report)
    if args.what == "get":
        size = sum(f.stat().st_size for f in files)
        print(f"{folder}: {args.name}, {len(files)} files, {size:,} bytes", file=sys.stderr)
        return 0
    from castalia.cli import prepare

    parser = argparse.ArgumentParser()
    prepare.arguments(parser)
    flags = ["--tokenizer", args.tokenizer, "--output", args.output]
    flags += ["--workers", str(args.workers)] if args.workers is not None else []
    flags += ["--overwrite"] if args.overwrite else []
    return prepare.run(parser.parse_args([*map(str, files), *flags]))


def _list(args: argparse.Namespace) -> int:
    import dataclasses

    from castalia.data.corpora import CORPORA

    if args.json:
        print(json.dumps({name: dataclasses.asdict(corpus) for name, corpus in CORPORA.items()}))
        return 0
    for name, corpus in CORPORA.items():
        print(f"{name:<18} {corpus.text}")
        print(f"{'':<18} licence: {corpus.licence}{f'; {corpus.state}' if corpus.state else ''}")
        if args.urls:
            for url in (url for file in corpus.files for url in file.urls):
                print(f"{'':<18} {url}")
    return 0


def _report(name: str) -> Callable[[int, int | None], None]:
    """A callback that keeps a line on a terminal up to date; elsewhere one line for each quarter."""
    live = sys.stderr.isatty()
    shown = -1

    def progress(there: int, total: int | None) -> None:
        nonlocal shown
        step = there * (1000 if live else 4) // total if total else there >> (20 if live else 26)
        if step == shown:
            return
        shown = step
        text = f"{name}: {there / 1e6:,.1f}{f' of {total / 1e6:,.1f}' if total else ''} MB"
        end = "\n" if not live or there == total else ""
        print(f"\r{text}" if live else text, end=end, file=sys.stderr, flush=True)

    return progress
