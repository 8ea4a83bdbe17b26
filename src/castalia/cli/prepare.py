"""`castalia prepare FILE ... --tokenizer T --output PREFIX`."""

from __future__ import annotations

import argparse
import json
import sys


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("inputs", nargs="+", metavar="FILE", help=".txt, .jsonl (.gz, .zst) or folders")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx, .json")
    parser.add_argument("--tokenizer", required=True, help="tokenizer.json, its folder, or byte")
    parser.add_argument("--text-key", default="text", help="key of the text in .jsonl files")
    parser.add_argument("--no-append-eod", action="store_true", help="do not end documents with the end-of-document id")
    parser.add_argument("--workers", type=int, help="threads (default: one for each core)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing data set")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Tokenise."""
    from castalia.cli.progress import preparation_progress
    from castalia.data.prepare import prepare
    from castalia.data.read import find_files
    from castalia.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer)
    files = find_files(args.inputs)
    plain = all(f.suffix in (".txt", ".jsonl") for f in files)
    with preparation_progress(sum(f.stat().st_size for f in files) if plain else None) as progress:
        summary = prepare(
            args.inputs,
            args.output,
            tokenizer,
            text_key=args.text_key,
            append_eod=not args.no_append_eod,
            workers=args.workers,
            progress=progress,
            overwrite=args.overwrite,
        )
    if args.json:
        print(json.dumps(summary))
    else:
        print(
            f"{args.output}: {summary['documents']:,} documents, {summary['tokens']:,} tokens, "
            f"{summary['bytes']:,} bytes of text",
            file=sys.stderr,
        )
    return 0
