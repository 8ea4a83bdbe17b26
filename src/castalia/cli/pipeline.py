"""`castalia pipeline --schedule 1f1b --stages 4 --microbatches 8`: a pipeline's schedule as a picture."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from castalia.errors import UserError


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("--schedule", default="1f1b", metavar="WORD[,WORD]", help="which, or several to compare")
    parser.add_argument("--stages", type=int, default=4, metavar="N", help="ranks of the pipeline (default 4)")
    parser.add_argument("--microbatches", type=int, default=8, metavar="N", help="of a step (default 8)")
    parser.add_argument("--per-rank", type=int, metavar="N", help="stages on each rank (default: 1, or 2 if it must)")
    parser.add_argument(
        "--costs", default="1,1,1", metavar="F,I,W", help="of forward, backward of inputs, of weights (default 1,1,1)"
    )
    parser.add_argument("--send", type=float, default=0.0, metavar="T", help="time from rank to rank (default 0)")
    parser.add_argument("--output", metavar="FILE", help="also write the picture: .html or .svg")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the schedules, and write the picture."""
    try:
        costs = [float(cost) for cost in args.costs.split(",")]
    except ValueError:
        costs = []
    if len(costs) != 3 or not all(cost > 0 for cost in costs) or not args.send >= 0:
        raise UserError(
            f"--costs {args.costs}, --send {args.send:g}: give three times above zero, and one of at least 0"
        )
    if args.output is not None and Path(args.output).suffix not in (".html", ".svg"):
        raise UserError(f"--output {args.output}: its name must end in .html or .svg")
    from castalia.parallel.timeline import Costs, timeline
    from castalia.tools.pipeline import as_dict, drawing, lines, page

    many = [
        timeline(word, args.stages, args.microbatches, args.per_rank, Costs(costs[0], costs[1], costs[2], args.send))
        for word in dict.fromkeys(args.schedule.split(","))
    ]
    if args.json:
        print(json.dumps({"schedules": [as_dict(line) for line in many]}))
    else:
        print("\n\n".join("\n".join(lines(line)) for line in many))
    if args.output is not None:
        from castalia.config.files import write_text

        write_text(Path(args.output), page(many) if args.output.endswith(".html") else drawing(many))
        print(f"the picture is {args.output}", file=sys.stderr)
    return 0
