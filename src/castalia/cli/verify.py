"""`castalia verify layouts|resume A.yml [key=value ...]`, `castalia verify checkpoint PATH ...`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from castalia.cli import split_settings

if TYPE_CHECKING:
    from castalia.tools.verify_compare import Verdict

DEFAULT = "dp2,zero1,zero2,zero3,tp2,tp2sp,cp2"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument(
        "what",
        metavar="layouts|resume|checkpoint",
        help="train in other layouts; go on in another one; compare checkpoints with their manifests",
    )
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="FILE|key=value",
        help="configuration files and overrides; for checkpoint: runs, or single checkpoints",
    )
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest relative difference (default: 1e-5)")
    parser.add_argument("--json", action="store_true", help="print the verdicts as one JSON object")
    layouts = parser.add_argument_group("layouts")
    layouts.add_argument(
        "--layouts", default=DEFAULT, metavar="A,B", help=f"names (default: {DEFAULT}); all: every one"
    )
    layouts.add_argument(
        "--layout", action="append", default=[], metavar="tensor=2,procs=4", help="settings of parallel: and processes"
    )
    layouts.add_argument("--plant", metavar="FAULT", help="plant a fault, to see that it is found")
    resume = parser.add_argument_group("resume")
    resume.add_argument("--before", default="zero3", metavar="LAYOUT", help="that is killed (default: zero3)")
    resume.add_argument("--after", default="tp2", metavar="LAYOUT", help="that goes on (default: tp2)")


def run(args: argparse.Namespace) -> int:
    """Compare, and print a table; 4 where something differs."""
    from castalia.errors import UserError

    if args.what not in ("layouts", "resume", "checkpoint"):
        raise UserError(
            f"'{args.what}' is none of layouts, resume, checkpoint: say first what is to be verified, for example "
            f"`castalia verify checkpoint {args.what}` for the checkpoints of a run"
        )
    if not args.settings:
        what = "a run or a checkpoint" if args.what == "checkpoint" else "a configuration file"
        raise UserError(f"nothing to verify: name {what} after `castalia verify {args.what}`")
    if args.what == "checkpoint":
        return _checkpoints(args)
    from castalia.config import load
    from castalia.tools.verify import LAYOUTS, refusal, verify_layouts, verify_resume
    from castalia.tools.verify_faults import FAULTS

    files, overrides = split_settings(args.settings)
    config = load(files, overrides)
    if args.what == "resume":
        verdicts = [verify_resume(config, args.before, args.after, args.tolerance)]
    else:
        if args.plant is not None and args.plant not in FAULTS:
            raise UserError(f"--plant: '{args.plant}' is not known; known: {', '.join(FAULTS)}")
        names = [name for name in args.layouts.split(",") if name]
        if args.layouts == "all":
            refused = {name: why for name in LAYOUTS if (why := refusal(config, name))}
            for name, why in refused.items():
                print(f"{name}: {why}", file=sys.stderr)
            names = [name for name in LAYOUTS if name not in refused]
        verdicts = verify_layouts(config, [*names, *args.layout], args.tolerance, args.plant)
    if args.json:
        print(json.dumps({"verdicts": [_values(v) for v in verdicts]}))
    else:
        _table(verdicts)
    return 0 if all(v.good for v in verdicts) else 4


def _checkpoints(args: argparse.Namespace) -> int:
    from castalia.checkpoint import verify_checkpoint
    from castalia.tools.checkpoints import checkpoints_of

    found = {path: verify_checkpoint(path) for name in args.settings for path in checkpoints_of(name)}
    if args.json:
        print(json.dumps({"checkpoints": {str(path): problems for path, problems in found.items()}}))
    for path, problems in found.items():
        if not args.json:
            print(f"{path}: {'DAMAGED' if problems else 'whole'}")
        for problem in problems:
            print(f"  {problem}", file=sys.stderr)
    return 4 if any(found.values()) else 0


def _values(verdict: Verdict) -> dict[str, object]:
    numbers = ("loss", "norm", "gradient", "weight")
    values = {name: getattr(verdict, name) for name in numbers}
    values = {name: value if value < float("inf") else None for name, value in values.items()}
    same = {"layout": verdict.layout, "processes": verdict.processes, "good": verdict.good}
    same |= {"first": verdict.first, "guilty": verdict.guilty}
    return same | values


def _table(verdicts: list[Verdict]) -> None:
    width = max(len(v.layout) for v in verdicts)
    print(f"{'layout':<{width}}  procs     loss     norm gradient  weights   (largest relative differences)")
    for v in verdicts:
        numbers = "  ".join(f"{x:7.1e}" for x in (v.loss, v.norm, v.gradient, v.weight))
        said = "equal" if v.good else f"DIFFERS, look at {v.guilty or v.first or 'the loss'}"
        print(f"{v.layout:<{width}}  {v.processes:>5}  {numbers}  {said}")
    if not all(v.good for v in verdicts):
        print("some layouts do not train as one process does", file=sys.stderr)
