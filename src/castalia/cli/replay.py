"""`castalia replay RUN --step N`: compute a step of the past again and compare it with the record."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("run", metavar="RUN", help="run folder; it is not touched")
    parser.add_argument("--step", type=int, required=True, help="the step, from 1 on, as in metrics.jsonl")
    parser.add_argument("--autopsy", action="store_true", help="look at every operation of that step for NaN")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest relative difference (default: 1e-5)")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Replay; 4 where something differs from the record."""
    from castalia.tools.replay import replay

    found = replay(Path(args.run), args.step, args.autopsy)
    worst = found.largest_difference()
    if args.json:
        finding = None if found.finding is None else asdict(found.finding) | {"layer": found.finding.layer}
        answer = {"start": found.start, "steps": found.rows, "largest_difference": worst, "finding": finding}
        print(json.dumps(answer | {"documents": found.documents}))
        return 0 if worst <= args.tolerance else 4
    print(f"from {'initial weights' if not found.start else f'the checkpoint of step {found.start}'}:")
    for row in found.rows:
        logged = row["logged_loss"], row["logged_grad_norm"]
        record = "not recorded" if logged[0] is None else f"recorded {logged[0]:.8g}, {logged[1]:.8g}"
        print(f"step {row['step']:>8}  loss {row['loss']:.8g}  |g| {row['grad_norm']:.8g}   {record}")
    if any(row["logged_loss"] is not None for row in found.rows):
        print(f"largest relative difference {worst:.1e}: {'the same' if worst <= args.tolerance else 'NOT the same'}")
    if found.finding is not None:
        f = found.finding
        place = f", position {f.position}" if f.position is not None else ""
        which = f", sample {f.sample} (row {f.row} of micro-batch {f.micro_batch}{place})" if f.row is not None else ""
        print(f"first value that is not finite: {f.operation} in {f.phase} of {f.module}{which}")
        for d in found.documents:
            print(f"  {d['data']}: document {d['document']}, ids {d['offset']} to {d['offset'] + d['length'] - 1}")
    elif args.autopsy:
        print("autopsy: every value is finite")
    return 0 if worst <= args.tolerance else 4
