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
    parser.add_argument("--json", action="store_true", help="print the parity figures as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Export."""
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
