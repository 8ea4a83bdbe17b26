"""`castalia train A.yml [key=value ...]`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from castalia.cli import split_settings
from castalia.errors import UserError

if TYPE_CHECKING:
    from castalia.config import Config


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("settings", nargs="+", metavar="FILE|key=value", help="configuration files and overrides")
    parser.add_argument("--accept", action="store_true", help="go on although a numerics setting was changed")
    parser.add_argument("--quiet", action="store_true", help="no progress lines")
    parser.add_argument("--verbose", action="store_true", help="also say how each value that was left open follows")
    parser.add_argument("--no-report", action="store_true", help="write no report.html at the end")
    parser.add_argument("--json", action="store_true", help="print the last records as one JSON object")
    parser.add_argument("--step", type=int, metavar="N", help="go back to the checkpoint of step N (default: newest)")
    parser.add_argument("--procs", type=int, metavar="N", help="processes on this machine (default: one per device)")


def run(args: argparse.Namespace) -> int:
    """Train, then write the report."""
    from castalia.config import load

    files, overrides = split_settings(args.settings)
    config = load(files, overrides)  # before torch is imported, which takes seconds

    procs = _processes(args, config)
    if procs > 1:
        from castalia.config.derive import derive
        from castalia.parallel.launch import supervise
        from castalia.parallel.layout import check_layout, layout_of

        if config.parallel.layout == "given":
            check_layout(derive(config)[0], layout_of(config.parallel, procs))
        flags = [f"--{flag}" for flag in ("accept", "quiet", "verbose", "no-report", "json") if _given(args, flag)]
        flags += [] if args.step is None else ["--step", str(args.step)]
        hang_timeout = config.performance.hang_timeout
        return supervise([sys.executable, "-m", "castalia", "train", *args.settings, *flags], procs, hang_timeout)

    from castalia.parallel.agent import exit_code_of_stop
    from castalia.parallel.launch import noted_failure
    from castalia.tools.report import write_report
    from castalia.train.loop import Stopped
    from castalia.train.run import train

    try:
        with noted_failure():
            done = train(
                config,
                sources=files,
                accept=args.accept,
                quiet=args.quiet,
                verbose=args.verbose,
                step=args.step,
            )
    except Stopped as stop:
        print(f"castalia: {stop}", file=sys.stderr, flush=True)
        if args.json:
            print(json.dumps({"stopped": str(stop)}))
        return exit_code_of_stop()
    if not done.first:
        return 0
    report = None
    if not args.no_report:
        report = done.directory / "report.html"
        try:
            write_report([done.directory], report)
        except Exception as error:  # the run is finished and saved; a page about it is not worth failing for
            print(f"castalia: WARNING: no report was written: {error}", file=sys.stderr)
            report = None
    if args.json:
        print(json.dumps({"run": str(done.directory), "report": report and str(report), "last": done.last}))
    elif not args.quiet:
        done.console.say(f"run: {done.directory}" + (f"   report: {report}" if report else ""))
    return 0


def _given(args: argparse.Namespace, flag: str) -> bool:
    return bool(getattr(args, flag.replace("-", "_")))


def _processes(args: argparse.Namespace, config: Config) -> int:
    """How many processes to start here: 1 where a launcher has started this one, or to be that one.

    Raises:
        UserError: a number that cannot be meant.
    """
    if args.procs is not None and args.procs < 1:
        raise UserError(f"--procs {args.procs}: give at least 1")
    from castalia.parallel.world import launched, local_devices

    if launched():
        if args.procs is not None:
            raise UserError("--procs starts processes, but WORLD_SIZE says that a launcher has done so: leave out one")
        return 1
    return args.procs or local_devices(config.performance.device)
