"""`castalia import SOURCE RUN`: other people's weights as a run, their logits checked."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument(
        "source", metavar="SOURCE",
        help="a folder in Hugging Face format, one with original Llama weights, a .gguf file, or a GPT-NeoX checkpoint",
    )  # fmt: skip
    parser.add_argument("output", metavar="RUN", help="run folder to write; must not exist")
    parser.add_argument("--config", nargs="+", metavar="YML", help="GPT-NeoX: the files it was trained with")
    parser.add_argument("--tokenizer", metavar="FILE", help="in place of the one beside the weights")
    parser.add_argument("--length", type=int, help="original Llama weights: positions that the model was trained for")
    parser.add_argument("--no-check", action="store_true", help="do not compare logits with the source's")
    parser.add_argument("--json", action="store_true", help="print the parity figures as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Import."""
    from castalia.cli.progress import stages
    from castalia.tools.import_model import import_model

    with stages() as say:
        parity = import_model(
            Path(args.source).expanduser(), Path(args.output), check=not args.no_check, say=say,
            tokenizer=args.tokenizer, configs=args.config or (), length=args.length,
        )  # fmt: skip
    if args.json:
        print(json.dumps({"output": args.output, **parity}))
        return 0
    for remark in parity["remarks"]:
        print(f"note: {remark}")
    if parity["checked"]:
        print(f"{args.output}: logits equal the source's to {parity['largest_relative_difference']:.1e}")
    else:
        print(f"{args.output}: written, logits not checked")
    return 0
