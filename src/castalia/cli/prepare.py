"""`castalia prepare FILE ... --tokenizer T --output PREFIX`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from castalia.data.prepare.chat import ChatRecipe
    from castalia.data.sources import SourceOptions
    from castalia.data.tokenizer import Tokenizer


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    add = parser.add_argument
    add("inputs", nargs="+", metavar="FILE", help="texts: files, folders, globs, URLs, or - for standard input")
    add("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx, .json")
    add("--tokenizer", required=True, help="tokenizer.json, its folder, byte, char, FILE.model, tiktoken:NAME, ...")
    add("--text-key", nargs="+", default=None, metavar="KEY", help="key of the text; of several each has an output")
    add("--no-append-eod", action="store_true", help="do not end documents with the end-of-document id")
    add("--ftfy", action="store_true", help="mend wrongly decoded text first")
    add("--normalise", choices=("NFC", "NFD", "NFKC", "NFKD"), help="Unicode normalisation of the text")
    add("--stdin-as", default="jsonl", metavar="ENDING", help="what standard input holds (default jsonl)")
    add("--workers", type=int, help="default: one for each core")
    add("--engine", default="threads", choices=("threads", "processes", "ray"), help="where the workers are")
    add("--encoder", default="auto", choices=("auto", "plain"), help="plain: the tokenizer itself, slower")
    add("--shard", metavar="I/N", help="only the I-th (from 0) of N parts of the files; writes PREFIX-0000I-of-0000N")
    add("--overwrite", action="store_true", help="replace an existing data set")
    add("--restart", action="store_true", help="forget an interrupted preparation instead of going on with it")
    add("--mask-before-token", metavar="ID,ID", help="also write PREFIX_label: -100 up to and including these ids")
    add("--json", action="store_true", help="print the summary as one JSON object")
    chat = parser.add_argument_group("conversations")
    add = chat.add_argument
    add("--chat", action="store_true", help="lines are conversations; writes PREFIX and PREFIX_label")
    add("--chat-template", metavar="FILE", help="Jinja; default: of the tokenizer_config.json beside the tokenizer")
    add("--generation-role", default="assistant", help="whose turns the loss is taken on (default assistant)")
    add("--only-last", action="store_true", help="take the loss on the last turn alone")
    add("--no-mask", action="store_true", help="take the loss on every token")
    add("--for-rm", action="store_true", help="for a reward model: the loss on the last end of document alone")
    add("--reward-key", metavar="KEY", help="also write PREFIX_reward")
    add("--binary-reward", action="store_true", help="rewards are written as +1 and -1")


def run(args: argparse.Namespace) -> int:
    """Tokenise."""
    from castalia.cli.progress import preparation_progress
    from castalia.data.prepare import TextRecipe, parse_shard, run_recipe
    from castalia.data.sources import SourceOptions, describe_inputs
    from castalia.data.tokenizer import load_tokenizer
    from castalia.errors import UserError

    tokenizer = load_tokenizer(args.tokenizer)
    options = SourceOptions(ftfy=args.ftfy, normalise=args.normalise, stdin=args.stdin_as)
    pattern = _ids(args.mask_before_token)
    keys = tuple(args.text_key or ["conversation" if args.chat else "text"])
    recipe: Any
    if args.chat:
        if pattern or args.ftfy or args.normalise or len(keys) > 1:
            raise UserError("--chat takes one --text-key, and neither --mask-before-token, --ftfy nor --normalise")
        recipe = _chat(args, tokenizer, options, keys[0])
    else:
        unused = [n for n in _CHAT_ONLY if getattr(args, n) not in (None, False)]
        if unused:
            raise UserError(f"--{unused[0].replace('_', '-')} is for conversations: add --chat")
        if len(set(keys)) != len(keys):
            raise UserError(f"--text-key {' '.join(keys)}: the keys should differ, since each has an output")
        recipe = TextRecipe(tokenizer, options, keys, not args.no_append_eod, pattern, args.encoder)
    described = describe_inputs(args.inputs, options)
    plain = args.shard is None and all(str(d["name"]).endswith((".txt", ".jsonl")) for d in described)
    total = sum(d["bytes"] or 0 for d in described) if plain else None
    with preparation_progress(total) as progress:
        summary = run_recipe(
            args.inputs,
            args.output,
            recipe,
            args.workers,
            progress,
            args.overwrite,
            restart=args.restart,
            shard=parse_shard(args.shard) if args.shard is not None else None,
            engine=args.engine,
            say=lambda sentence: print(f"castalia: {sentence}", file=sys.stderr),
        )
    if args.json:
        print(json.dumps(summary))
        return 0
    proof = f", proved equal to tokenizers on {summary['proved']:,} documents" if summary["proved"] else ""
    print(
        f"{args.output}: {summary['documents']:,} documents, {summary['tokens']:,} tokens, "
        f"{summary['bytes']:,} bytes of text"
        + (f" (encoder: {summary['encoder']}{proof})" if summary["encoder"] else ""),
        file=sys.stderr,
    )
    if summary["encoder"] == "tokenizers" and args.encoder == "auto" and not _installed("fastokens"):
        print("pip install fastokens makes this some 30 times quicker, with the same ids", file=sys.stderr)
    return 0


_CHAT_ONLY = ("chat_template", "only_last", "no_mask", "for_rm", "reward_key", "binary_reward")


def _chat(args: argparse.Namespace, tokenizer: Tokenizer, options: SourceOptions, key: str) -> ChatRecipe:
    from castalia.data.prepare import ChatRecipe, find_template
    from castalia.errors import UserError

    if args.binary_reward and args.reward_key is None:
        raise UserError("--binary-reward: name the reward's key with --reward-key")
    return ChatRecipe(
        tokenizer,
        options,
        find_template(args.chat_template, args.tokenizer),
        key,
        args.generation_role,
        args.only_last,
        args.no_mask,
        args.for_rm,
        args.reward_key,
        args.binary_reward,
        not args.no_append_eod,
        args.encoder,
    )


def _ids(text: str | None) -> tuple[int, ...]:
    from castalia.errors import UserError

    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) < 2**31 for part in parts):
        raise UserError(f"--mask-before-token {text}: give ids with commas between them, such as 187,29")
    return tuple(int(part) for part in parts)


def _installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None
