"""`castalia export RUN FOLDER`: a run's model in Hugging Face format, its logits checked."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("output", metavar="FOLDER", help="folder to write; must not exist")
    parser.add_argument("--step", type=int, help="checkpoint to use (default: the newest whole one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    parser.add_argument("--shard-size", default="5GB", metavar="SIZE", help="of a file of weights (default: 5GB)")
    parser.add_argument("--no-check", action="store_true", help="do not compare logits with transformers")
    parser.add_argument("--push", metavar="REPO", help="upload the finished folder to this repository of the hub")
    parser.add_argument("--private", action="store_true", help="make that repository a private one")
    parser.add_argument(
        "--format",
        choices=("huggingface", "gptneox"),
        default="huggingface",
        help="what to write (default: huggingface)",
    )
    theirs = parser.add_argument_group("with --format gptneox, where RUN may be a GPT-NeoX checkpoint too")
    theirs.add_argument("--tensor", type=int, metavar="N", help="tensor-parallel degree (default: 1)")
    theirs.add_argument(
        "--pipeline", type=int, metavar="N", help="a file per layer, for N stages (default: sequential)"
    )
    theirs.add_argument("--layout", choices=("v1.0", "v2.0", "main"), help="for which release (default: main)")
    theirs.add_argument("--config", action="append", metavar="FILE", help="a GPT-NeoX source's configuration")
    parser.add_argument("--json", action="store_true", help="print the parity figures as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Export."""
    if args.format == "gptneox":
        return _gptneox(args)
    _alone(args, ("tensor", "pipeline", "layout", "config"), "--format gptneox")
    from castalia.cli.progress import stages
    from castalia.errors import UserError
    from castalia.tools.export import export_run

    if args.private and args.push is None:
        raise UserError("--private says how --push makes a repository: give --push as well, or leave it out")
    size = size_in_bytes(args.shard_size)
    pushed = None
    with stages() as say:
        parity = export_run(
            Path(args.run), Path(args.output), args.step, not args.no_check, say, args.dtype, shard_size=size
        )
        if args.push is not None:
            from castalia.tools.export_push import push

            if say is not None:
                say("uploading")
            pushed = push(Path(args.output), args.push, args.private)
    if args.json:
        print(json.dumps({"output": args.output, **parity} | ({"pushed": pushed} if pushed else {})))
    elif parity["checked"]:
        print(f"{args.output}: logits equal those of transformers to {parity['largest_relative_difference']:.1e}")
    else:
        print(f"{args.output}: written, logits not checked")
    if pushed and not args.json:
        print(f"{args.output}: uploaded to {pushed}")
    return 0


def _alone(args: argparse.Namespace, flags: tuple[str, ...], where: str) -> None:
    """Refuse flags that would say nothing."""
    from castalia.errors import UserError

    for flag in flags:
        if getattr(args, flag, None) not in (None, False, "float32", "5GB"):  # what they are when nothing was said
            raise UserError(f"--{flag.replace('_', '-')} says something with {where} alone: leave it out, or give that")


def _gptneox(args: argparse.Namespace) -> int:
    from castalia.cli.progress import stages
    from castalia.tools.export_gptneox import export_gptneox

    _alone(args, ("push", "private", "no_check", "dtype", "shard_size"), "--format huggingface")
    with stages() as say:
        folder = export_gptneox(
            Path(args.run),
            Path(args.output),
            tensor=1 if args.tensor is None else args.tensor,
            pipeline=args.pipeline or 0,
            layout=args.layout or "main",
            step=args.step,
            configs=[Path(file) for file in args.config or ()],
            say=say,
        )
    print(json.dumps({"output": str(folder)}) if args.json else f"{folder}: written, and read again: nothing differs")
    return 0


def size_in_bytes(text: str) -> int:
    """`5GB`, `500MB`, `2GiB` or a number of bytes.

    Raises:
        UserError: it is none of these.
    """
    import re

    from castalia.errors import UserError

    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise UserError(f"--shard-size {text}: give a size such as 5GB or 500MB")
    return max(1, int(float(match[1]) * units[(match[2] or "").upper()]))
