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
    parser.add_argument("--no-check", action="store_true", help="do not compare logits with transformers")
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
    from castalia.tools.export import export_run

    with stages() as say:
        parity = export_run(Path(args.run), Path(args.output), args.step, check=not args.no_check, say=say)
    if args.json:
        print(json.dumps({"output": args.output, **parity}))
    elif parity["checked"]:
        print(f"{args.output}: logits equal those of transformers to {parity['largest_relative_difference']:.1e}")
    else:
        print(f"{args.output}: written, logits not checked")
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
