"""`castalia tokenizer train|inspect`."""

from __future__ import annotations

import argparse
import json
import sys


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    verbs = parser.add_subparsers(dest="what", required=True, metavar="train|inspect")
    train = verbs.add_parser("train", help="learn a byte-level BPE vocabulary from text")
    train.add_argument("inputs", nargs="+", metavar="FILE", help=".txt, .jsonl (.gz, .zst) or folders")
    train.add_argument("--output", required=True, metavar="tokenizer.json")
    train.add_argument("--vocab-size", type=int, default=8192, help="ids, special tokens included (default 8192)")
    train.add_argument("--text-key", default="text", help="key of the text in .jsonl files")
    train.add_argument("--overwrite", action="store_true", help="replace an existing file")
    inspect = verbs.add_parser("inspect", help="what a tokenizer is, and how it cuts a text")
    inspect.add_argument("tokenizer", help="tokenizer.json, its folder, or byte")
    inspect.add_argument("--text", help="show the tokens of this text")


def run(args: argparse.Namespace) -> int:
    """Train or inspect."""
    from pathlib import Path

    from castalia.data.read import iter_documents
    from castalia.data.tokenizer import load_tokenizer, save_tokenizer, train_bpe
    from castalia.errors import UserError

    if args.what == "train":
        if Path(args.output).exists() and not args.overwrite:
            raise UserError(f"{args.output} exists already: choose another output, or say --overwrite")
        trained = train_bpe((d.text for d in iter_documents(args.inputs, args.text_key)), args.vocab_size)
        save_tokenizer(trained, args.output)
        print(f"{args.output}: {trained.get_vocab_size()} ids", file=sys.stderr)
        return 0
    tokenizer = load_tokenizer(args.tokenizer)
    answer = tokenizer.identity()
    if args.text is not None:
        ids = tokenizer.encode(args.text)
        answer |= {
            "tokens": [[i, tokenizer.decode([i])] for i in ids],
            "bytes_per_token": len(args.text.encode()) / max(len(ids), 1),
            "round_trip": tokenizer.decode(ids) == args.text,
        }
    print(json.dumps(answer, indent=2, ensure_ascii=False))
    return 0
