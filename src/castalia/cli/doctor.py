"""`castalia doctor`: does this machine work?"""

from __future__ import annotations

import argparse
import json
import sys


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("--device", help="what to examine (default: the accelerator, else the CPU)")
    parser.add_argument("--procs", type=int, metavar="N", help="processes (default: one for each device; 2 on a CPU)")
    parser.add_argument("--compile", action="store_true", help="also compile a model, which may take minutes")
    parser.add_argument("--output", metavar="FILE", help="write the report as JSON, to send it to the project")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Examine; 4 where something is wrong."""
    from dataclasses import asdict
    from pathlib import Path

    from castalia.errors import UserError
    from castalia.tools.doctor import examine
    from castalia.train.environment import environment

    if args.procs is not None and args.procs < 1:
        raise UserError(f"--procs {args.procs}: give a number from 1 on")
    if args.output and Path(args.output).exists():
        raise UserError(f"{args.output} exists already: choose another output")
    findings = []
    for finding in examine(args.device, args.procs, args.compile):
        findings.append(finding)
        mark = "ok  " if finding.good else "FAIL"
        print(f"{mark} {finding.name:<42} {finding.detail}", file=sys.stderr, flush=True)
    bad = sum(not f.good for f in findings)
    report = {"version": 1, "environment": environment(), "findings": [asdict(f) for f in findings], "failed": bad}
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(report))
    else:
        print(f"{len(findings)} checks, {bad or 'none'} failed", file=sys.stderr)
    return 4 if bad else 0
