"""`castalia plan CONFIG`: what a configuration weighs and costs; with `--machine`, the layouts to run it in.

A configuration alone is reckoned without torch, at once. `--measure` describes this machine for `--machine`.
"""

from __future__ import annotations

import argparse
import json
import sys

from castalia.cli import split_settings
from castalia.errors import UserError


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("settings", nargs="*", metavar="FILE|key=value", help="configuration files and overrides")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--machine", metavar="NAME|FILE", help="rank every layout on this machine (docs/plan.md)")
    parser.add_argument("--devices", type=int, metavar="N", help="of how many devices (default: one node's)")
    parser.add_argument("--top", type=int, metavar="N", help="layouts to list (default: 10)")
    parser.add_argument("--choose", type=int, metavar="N", help="which of them to look at and write (default: 1)")
    parser.add_argument("--write", metavar="FILE", help="write the configuration with the chosen layout")
    parser.add_argument("--measure", metavar="FILE", help="measure this machine, and describe it in a file")
    parser.add_argument("--rehearse", action="store_true", help="trace a step of a big job's ranks (docs/scale.md)")
    parser.add_argument("--world", type=int, metavar="N", help="--rehearse: of how many processes")
    parser.add_argument("--ranks", metavar="0,17", help="--rehearse: which (default: one of each stage, and the last)")
    parser.add_argument("--mtbf", metavar="12h", help="time between failures of the job: how often to save?")
    parser.add_argument("--failures-per-day", type=float, metavar="X", help="the same as a rate")
    parser.add_argument("--device-mtbf", metavar="50000h", help="the same of one device of --world")
    parser.add_argument("--checkpoint-cost", metavar="30s", help="time that the steps wait for a checkpoint")
    parser.add_argument("--restart-cost", metavar="10m", help="time from a failure to the next step (default: none)")
    parser.add_argument("--step-time", metavar="5s", help="also give the interval in steps")


def run(args: argparse.Namespace) -> int:
    """Print the sizes, the layouts or the machine."""
    from castalia.tools.rehearse_run import asked, before_the_run

    if args.measure:
        return _measure(args)
    if asked(args):
        lines, answer = before_the_run(args, *split_settings(args.settings))
        print(json.dumps(answer, indent=2) if args.json else "\n".join(lines))
        return 0
    if not args.settings:
        raise UserError("castalia plan wants a configuration; `castalia plan --help` lists the arguments")
    if args.machine:
        return _layouts(args)
    for flag in ("devices", "top", "choose", "write"):
        if getattr(args, flag) is not None:
            raise UserError(f"--{flag} is about layouts on a machine: give --machine too")
    return _sizes(args)


def _measure(args: argparse.Namespace) -> int:
    from castalia.tools.plan_run import measure_machine

    if args.settings or args.machine:
        raise UserError("--measure describes this machine, whatever is trained on it: give it alone")
    print("\n".join(measure_machine(args.measure)), file=sys.stderr if args.json else sys.stdout)
    return 0


def _layouts(args: argparse.Namespace) -> int:
    from castalia.tools.plan_run import plan_layouts

    for flag in ("devices", "top", "choose"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: give 1 or more")
    files, overrides = split_settings(args.settings)
    lines, answer = plan_layouts(
        files, overrides, args.machine, args.devices, args.top or 10, args.choose or 1, args.write
    )
    print(json.dumps(answer, indent=2) if args.json else "\n".join(lines))
    return 0


def _sizes(args: argparse.Namespace) -> int:
    from castalia.config import load, notes
    from castalia.config.curriculum import trained_tokens
    from castalia.config.derive import derive
    from castalia.model.size import model_size
    from castalia.tools.plan import tokenizer_vocabulary

    config = load(*split_settings(args.settings))
    full, derivation = derive(config, tokenizer_vocabulary(config))
    size = model_size(full)
    steps = full.training.steps or 0
    tokens = trained_tokens(full, steps)
    state = size.weight_bytes + size.gradient_bytes + size.optimizer_bytes + size.working_bytes
    answer = {
        "name": full.name,
        **size.as_dict(),
        "steps": steps,
        "tokens": tokens,
        "total_flops": tokens * size.flops_per_token,
        "vocab_size": full.model.vocab_size,
        "state_bytes": state,
    }
    if args.json:
        print(json.dumps(answer, indent=2))
        return 0
    for line in [*notes(config), *derivation]:
        print(f"  {line}")
    active = size.active_parameters
    met = f", of which a token meets {active:,}" if active < size.total_parameters else ""
    rows = [
        ("parameters", f"{size.total_parameters:,}{met}"),
        ("without embeddings", f"{size.non_embedding_parameters:,}"),
        ("FLOPs per token", f"{size.flops_per_token:,}"),
        ("training", f"{steps:,} steps, {tokens:,} tokens, {answer['total_flops']:.3g} FLOPs"),
        ("weights", f"{size.weight_bytes / 2**20:,.1f} MiB fp32"),
        ("gradients", f"{size.gradient_bytes / 2**20:,.1f} MiB fp32"),
        ("optimizer", f"{size.optimizer_bytes / 2**20:,.1f} MiB of {full.optimizer.type}"),
        ("bf16 copies", f"{size.working_bytes / 2**20:,.1f} MiB"),
        ("together", f"{state / 2**20:,.1f} MiB, and activations on top"),
    ]
    for label, text in rows:
        print(f"{label:<20} {text}")
    return 0
