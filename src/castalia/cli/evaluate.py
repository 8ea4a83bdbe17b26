"""`castalia evaluate RUN [--data PREFIX]`: bits per byte and perplexity on a data set, every token once."""

from __future__ import annotations

import argparse
import json


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--data", required=True, metavar="PREFIX", help="token data set made with the run's tokenizer")
    parser.add_argument("--stride", type=int, help="tokens that each window scores (default: half of seq_length)")
    parser.add_argument("--max-tokens", type=int, help="score only the first so many")
    parser.add_argument("--step", type=int, help="checkpoint to use (default: the newest whole one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the score."""
    import torch

    from castalia.cli.progress import bar
    from castalia.config import load
    from castalia.data.store import TokenStore
    from castalia.errors import UserError
    from castalia.evaluate.perplexity import score_store
    from castalia.generate.load import load_run
    from castalia.model.kernels import choose_fp32_matmul

    for flag, value in (("--max-tokens", args.max_tokens), ("--stride", args.stride)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value} must be at least 1")
    choose_fp32_matmul(torch.device("cpu"))
    model, tokenizer = load_run(args.run, step=args.step)
    store = TokenStore(args.data)
    made_with = (store.info or {}).get("tokenizer", {})
    if made_with and made_with.get("sha256") != tokenizer.identity()["sha256"]:
        raise UserError(
            f"{args.data}: was made with another tokenizer than {args.run}'s: prepare it with the run's own"
        )
    seq_length = load([f"{args.run}/config.yaml"]).data.seq_length
    with bar("scoring", "tokens") as progress:
        score = score_store(
            model, tokenizer, store, seq_length, args.stride, max_tokens=args.max_tokens, progress=progress
        )
    if args.json:
        print(json.dumps(score.as_dict()))
    else:
        line = f"{score.loss:.4f} nats per token, perplexity {score.perplexity:.2f} ({score.tokens:,} tokens"
        if score.bits_per_byte is None:
            print(f"{line}; no bits per byte, since the tokenizer does not keep every byte of a text)")
        else:
            print(f"{score.bits_per_byte:.4f} bits per byte, {line}, {score.bytes:,} bytes)")
        context = seq_length - (args.stride or max(1, seq_length // 2))
        which = "each token" if args.max_tokens is None else f"the first {score.tokens:,} tokens"
        print(
            f"{which} of {args.data} once, with {context} tokens or more before it where there are so many; "
            "validation in training scores samples of its own split, whose first tokens have nothing before them"
        )
    return 0
