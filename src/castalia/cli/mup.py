"""`castalia mup check|sweep|shapes A.yml [key=value ...]`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from castalia.cli import split_settings


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument(
        "what",
        choices=("check", "sweep", "shapes"),
        help="check: does nothing grow or vanish with the width? sweep: search learning rate and multipliers at a "
        "small width; shapes: write GPT-NeoX's base_shapes_file",
    )
    parser.add_argument("settings", nargs="+", metavar="FILE|key=value", help="configuration files and overrides")
    parser.add_argument("--output", metavar="FILE", help="check: a page of plots; shapes: the file to write")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--steps", type=int, help="updates (default of check: 4; of sweep: training.steps)")
    check = parser.add_argument_group("check")
    check.add_argument("--widths", default="64,128,256,512", metavar="A,B", help="hidden sizes; the first is the base")
    check.add_argument("--lr", type=float, default=0.003, help="learning rate of the updates (default: 0.003)")
    check.add_argument("--seeds", type=int, default=2, help="runs per width (default: 2)")
    check.add_argument("--tolerance", type=float, default=0.25, help="largest slope, either way (default: 0.25)")
    sweep = parser.add_argument_group("sweep")
    sweep.add_argument("--runs", type=int, default=32, help="trials, those in --results included (default: 32)")
    sweep.add_argument(
        "--results", default="mup_sweep.jsonl", metavar="FILE", help="a line per trial; it goes on there"
    )
    sweep.add_argument("--width", type=int, help="hidden size of the trials (default: model.mup_base_hidden_size)")
    sweep.add_argument("--grid", action="store_true", help="all combinations in order, instead of random draws")
    sweep.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    sweep.add_argument(
        "--try",
        dest="space",
        action="append",
        default=[],
        metavar="NAME=A,B",
        help="values of lr, mup_init_scale, mup_attn_temp, mup_output_temp or mup_embedding_mult; what is not named "
        "stays (default: all are tried)",
    )


def run(args: argparse.Namespace) -> int:
    """Do it; 4 where the check fails."""
    from castalia.config import load
    from castalia.errors import UserError

    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps {args.steps} must be at least 1")
    files, overrides = split_settings(args.settings)
    config = load(files, overrides)
    if args.what == "shapes":
        from castalia.config.files import write_text
        from castalia.tools.mup_shapes import base_shapes_text

        if args.output is None:
            raise UserError("mup shapes: give --output, the file to write (GPT-NeoX adds .0 to its base_shapes_file)")
        write_text(Path(args.output), base_shapes_text(config.model))
        print(f"{args.output}: written")
        return 0
    return _check(args, config) if args.what == "check" else _sweep(args, config)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _check(args: argparse.Namespace, config: object) -> int:
    from typing import cast

    from castalia.config import Config
    from castalia.config.files import write_text
    from castalia.errors import UserError
    from castalia.tools.mup import coordinate_check
    from castalia.tools.mup_page import lines, page, values

    try:
        widths = [int(word) for word in args.widths.split(",")]
    except ValueError:
        raise UserError(f"--widths '{args.widths}' must be whole numbers, for example 64,128,256") from None
    if args.lr <= 0 or args.seeds < 1 or args.tolerance <= 0:
        raise UserError("--lr, --seeds and --tolerance must be above 0")
    check = coordinate_check(cast(Config, config), widths, args.steps or 4, args.lr, args.seeds, args.tolerance, _say)
    if args.output is not None:
        write_text(Path(args.output), page(check))
    print(json.dumps(values(check)) if args.json else "\n".join(lines(check)))
    return 0 if check.good else 4


def _sweep(args: argparse.Namespace, config: object) -> int:
    from typing import cast

    from castalia.config import Config
    from castalia.errors import UserError
    from castalia.tools.mup_sweep import SPACE, described, sweep

    space = {}
    for given in args.space:
        name, _, numbers = given.partition("=")
        try:
            space[name] = tuple(float(word) for word in numbers.split(","))
        except ValueError:
            raise UserError(f"--try '{given}' must be a name and numbers, for example lr=0.001,0.002") from None
        if not all(0 < value < 1e9 for value in space[name]):
            raise UserError(f"--try '{given}': every value must be above 0")
    if args.runs < 1:
        raise UserError(f"--runs {args.runs} must be at least 1")
    found = sweep(
        cast(Config, config),
        Path(args.results),
        args.runs,
        space or SPACE,
        args.width,
        args.steps,
        args.seed,
        args.grid,
        _say,
    )
    if args.json:
        print(json.dumps({"best": found[0], "trials": found}))
    else:
        print(f"best of {len(found)}: {described(found[0])}")
    return 0
