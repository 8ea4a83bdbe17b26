"""`castalia plan CONFIG --rehearse`, and the interval between checkpoints: flags -> lines and a JSON object."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from castalia.errors import UserError

FAILURES = ("mtbf", "failures_per_day", "device_mtbf", "checkpoint_cost", "restart_cost", "step_time")
FLAGS = ("world", "ranks", *FAILURES)


def asked(args: Namespace) -> bool:
    """Whether the flags are of these two.

    Raises:
        UserError: one of them is, without the one that it belongs to.
    """
    if args.rehearse or any(getattr(args, name) is not None for name in FAILURES):
        return True
    for name in FLAGS:
        if getattr(args, name) is not None:
            raise UserError(f"--{name} is about a rehearsal: give --rehearse too")
    return False


def before_the_run(args: Namespace, files: list[str], overrides: list[str]) -> tuple[list[str], dict[str, Any]]:
    """What both say.

    Raises:
        UserError: bad flags, or the job cannot run so.
    """
    lines: list[str] = []
    answer: dict[str, Any] = {}
    found = None
    if any(getattr(args, name) is not None for name in FAILURES):  # first: a wrong flag should not wait for the rest
        found, step = _interval(args)
    if args.rehearse:
        lines, answer = _rehearsal(args, files, overrides)
    if found is not None:
        from castalia.tools.interval import as_dict
        from castalia.tools.interval import lines as interval_lines

        lines = [*lines, *([""] if lines else []), *interval_lines(found, step)]
        answer = answer | {"checkpoint_interval": as_dict(found, step)}
    return lines, answer


def _interval(args: Namespace) -> Any:
    from castalia.tools.interval import best_interval, job_mtbf, seconds

    if args.checkpoint_cost is None:
        raise UserError("how long do the steps wait for a checkpoint? Give --checkpoint-cost, such as 30s")
    mtbf = job_mtbf(args.mtbf, args.failures_per_day, args.device_mtbf, args.world)
    cost = seconds(args.checkpoint_cost, "--checkpoint-cost")
    restart = 0.0 if args.restart_cost is None else seconds(args.restart_cost, "--restart-cost")
    step = None if args.step_time is None else seconds(args.step_time, "--step-time")
    return best_interval(mtbf, cost, restart), step


def _rehearsal(args: Namespace, files: list[str], overrides: list[str]) -> tuple[list[str], dict[str, Any]]:
    from castalia.config import load
    from castalia.config.derive import derive
    from castalia.tools.plan import tokenizer_vocabulary

    if not files:
        raise UserError("--rehearse wants a configuration: `castalia plan CONFIG --rehearse --world 1024`")
    if args.world is None:
        raise UserError("--rehearse: of how many processes? Give --world N")
    try:
        ranks = None if args.ranks is None else [int(rank) for rank in args.ranks.split(",")]
    except ValueError:
        raise UserError(f"--ranks {args.ranks}: give numbers of ranks, such as 0,17") from None
    config = load(files, overrides)
    full, _ = derive(config, tokenizer_vocabulary(config))
    from castalia.tools.rehearse import as_dict, rehearse
    from castalia.tools.rehearse import lines as text

    layout, done = rehearse(full, args.world, ranks)
    return text(layout, done), as_dict(layout, done)
