"""`castalia tokenizer train|inspect`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from castalia.data.tokenizer.train import Training


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    verbs = parser.add_subparsers(dest="what", required=True, metavar="train|inspect")
    train = verbs.add_parser("train", help="learn a vocabulary from text")
    add = train.add_argument
    add("inputs", nargs="+", metavar="FILE", help="texts: files, folders, globs, URLs, or - for standard input")
    add("--output", required=True, metavar="tokenizer.json")
    add("--type", default="bpe", choices=("bpe", "unigram", "wordpiece"), help="default bpe")
    add("--vocab-size", type=int, default=8192, help="ids, special tokens included (default 8192)")
    add("--special", nargs="+", metavar="TOKEN", help="default <|endoftext|> <|padding|>; they get the first ids")
    add("--normalizer", default="none", choices=("none", "nfc", "nfkc"), help="default none, which loses nothing")
    add("--prefix-space", action="store_true", help="put a space in front of each text")
    add("--text-key", default="text", help="key of the text in .jsonl files")
    add("--overwrite", action="store_true", help="replace an existing file")
    inspect = verbs.add_parser("inspect", help="what a tokenizer is, and how it does on text")
    add = inspect.add_argument
    add("tokenizer", help="tokenizer.json, its folder, byte, char, FILE.model, tiktoken:NAME, module:attribute, ...")
    add("inputs", nargs="*", metavar="FILE", help="texts to try it on")
    add("--text", help="show the tokens of this text")
    add("--text-key", default="text", help="key of the text in .jsonl files")
    add("--limit", type=int, default=10_000_000, metavar="BYTES", help="of the texts that are tried (default 10 MB)")


def run(args: argparse.Namespace) -> int:
    """Train or inspect."""
    return _train(args) if args.what == "train" else _inspect(args)


def _train(args: argparse.Namespace) -> int:
    from pathlib import Path

    from castalia.data.sources import describe_inputs, iter_documents
    from castalia.data.tokenizer import save_tokenizer, train_tokenizer
    from castalia.data.tokenizer.train import SPECIALS
    from castalia.errors import UserError

    output = Path(args.output).expanduser()
    if not args.output or output.is_dir():
        raise UserError(f"the output '{args.output}' is no file's name: give one such as tokenizer.json")
    for one in describe_inputs(args.inputs):
        if output.exists() and Path(one["name"]).exists() and output.samefile(one["name"]):
            raise UserError(f"{output} is one of the texts, which would be lost: choose another output")
    if output.exists() and not args.overwrite:
        raise UserError(f"{output} exists already: choose another output, or say --overwrite")
    trained = train_tokenizer(
        (document.text for document in iter_documents(args.inputs, args.text_key)),
        args.vocab_size,
        args.type,
        args.special or SPECIALS,
        args.normalizer,
        args.prefix_space,
        _progress(),
    )
    save_tokenizer(trained, output)
    made = trained.get_vocab_size()
    fewer = f", fewer than the {args.vocab_size:,} asked for: the texts hold no more" if made < args.vocab_size else ""
    print(f"{output}: {made:,} ids{fewer}", file=sys.stderr)
    return 0


def _progress() -> Any:
    began = last = time.monotonic()

    def update(now: Training) -> None:
        nonlocal last
        moment = time.monotonic()
        if moment - last < 5:
            return
        last = moment
        doing = "reading" if not now.read else "learning"
        print(
            f"{doing}: {now.texts:,} texts, {now.characters / 1e6:,.1f} million characters, {moment - began:.0f} s",
            file=sys.stderr,
            flush=True,
        )

    return update


def _inspect(args: argparse.Namespace) -> int:
    from castalia.data.sources import iter_documents
    from castalia.data.tokenizer import inspect_tokenizer, load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer)
    texts = (document.text for document in iter_documents(args.inputs, args.text_key)) if args.inputs else ()
    answer = inspect_tokenizer(tokenizer, texts, max(args.limit, 1))
    if args.text is not None:
        ids = tokenizer.encode(args.text)
        answer["text"] = {
            "tokens": [[i, tokenizer.decode([i])] for i in ids],
            "bytes_per_token": len(args.text.encode()) / max(len(ids), 1),
            "round_trip": tokenizer.decode(ids) == args.text,
        }
    print(json.dumps(answer, indent=2, ensure_ascii=False))
    return 0
