"""Training speed beside the peers': tokens per second, ratios, memory and utilisation, measured in turns.

    python benchmarks/train.py --setup                        # once: makes .venv-bench
    python benchmarks/train.py [--tokens 4x512 1x2048] [--precision bf16 fp32] [--json results.json]
    python benchmarks/train.py --quick --tokens 4x512 1x2048  # three contenders, 7 rounds of a step: below 6 minutes
    python benchmarks/train.py --costs                        # what documents, dropout, masks, accumulation cost

    round 1:  matrix rate | A A A | B B B | C C C       every contender is a process that sleeps
    round 2:  matrix rate | B B B | C C C | A A A       until its turn comes (peers/contenders.py)

A machine's speed drifts by more than the differences of interest, so nothing is compared with
what was measured at another time: each round gives one ratio per pair, and the answer is the
median of those, with a bootstrap interval. Needs nothing but the standard library itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
VENV = HERE.parent / ".venv-bench"
TORCH = "torch==2.13.0"
NAMES = (
    "castalia",
    "castalia-compiled",
    "transformers",
    "transformers-compiled",
    "litgpt",
    "litgpt-compiled",
)
QUICK = ("castalia", "transformers-compiled", "litgpt-compiled")
COSTS = ("castalia", "castalia-documents", "castalia-dropout", "castalia-masked", "castalia-accumulated")
SHAPES = ("pythia-70m", "pythia-14m", "pythia-160m", "llama-100m", "tiny")
VOCABULARY = {"tiny": 2048, "llama-100m": 32000}
DTYPES = ("float32", "bfloat16")
RESAMPLES = 5000


def say(text: str) -> None:
    """Progress, kept apart from the tables."""
    print(f"  {text}", file=sys.stderr, flush=True)


class Worker:
    """One process of peers/contenders.py and its pipe."""

    def __init__(self, python: Path, name: str, shape: str, batch: int, length: int, precision: str) -> None:
        self.name, started = name, time.perf_counter()
        path = os.pathsep.join(filter(None, [str(HERE.parent / "src"), os.environ.get("PYTHONPATH")]))
        # Progress bars and telemetry of the peers' libraries have no place in a measurement.
        env = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [str(python), str(HERE / "peers" / "contenders.py"), name, shape, str(batch), str(length), precision]
        # A session of its own: an interrupt is for the driver, which then closes the pipes.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True
        )
        self.greeting = self._answer()
        self.greeting["start_seconds"] = time.perf_counter() - started

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        assert self.process.stdin is not None
        print(json.dumps(command), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name}: its process ended (code {self.process.wait()}); what it said is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Let the process end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Median, and the 95 % percentile interval of the medians of resamples."""
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return statistics.median(values), medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES)]


def check_learning(name: str, losses: Sequence[float], vocabulary: int) -> None:
    """A broken step may be fast: the loss starts at that of a uniform guess and falls on the repeated batch."""
    uniform = math.log(vocabulary)
    if abs(losses[0] - uniform) > 0.3:
        sys.exit(
            f"{name}: the first loss is {losses[0]:.3f}, not about ln(vocabulary) = {uniform:.3f}: no fair comparison"
        )
    if not losses[-1] < losses[0] - 0.05:
        sys.exit(f"{name}: the loss does not fall on one repeated batch ({losses[0]:.3f} -> {losses[-1]:.3f})")


def measure(
    args: argparse.Namespace, tokens: str, precision: str, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """One table: start the contenders, warm them up, let them run in turns; `keep` what there is after each round."""
    batch, length = map(int, tokens.split("x"))
    names: list[str] = args.contenders
    workers: list[Worker] = []
    try:
        machine = Worker(args.python, "machine", args.shape, batch, length, precision)
        workers.append(machine)
        contenders = {}
        warm_up = {}
        for name in names:
            say(f"warming up {name}")
            contenders[name] = Worker(args.python, name, args.shape, batch, length, precision)
            workers.append(contenders[name])
            warm_up[name] = contenders[name].ask(do="run", steps=args.warm_up)
        rounds: list[dict[str, Any]] = []
        measured = {
            "shape": args.shape,
            "batch": batch,
            "length": length,
            "precision": precision,
            **machine.greeting,
            "contenders": {name: worker.greeting for name, worker in contenders.items()},
            "warm_up": warm_up,
            "rounds": rounds,
        }
        try:
            for number in range(args.rounds):
                shift = number % len(names)
                result: dict[str, Any] = {"machine": machine.ask()}
                for name in names[shift:] + names[:shift]:
                    result[name] = contenders[name].ask(do="run", steps=args.steps)
                rounds.append(result)
                keep(measured)
                say(f"round {number + 1} of {args.rounds}")
        except KeyboardInterrupt:
            if len(rounds) < 3:
                raise
            say(f"interrupted: the table is of {len(rounds)} rounds")
        vocabulary = VOCABULARY.get(args.shape, 50304)
        for name in names:
            losses = warm_up[name]["losses"] + [loss for r in rounds for loss in r[name]["losses"]]
            check_learning(name, losses, vocabulary)
        return measured
    finally:
        for worker in workers:
            worker.close()


def summarise(result: dict[str, Any]) -> dict[str, Any]:
    """Rounds -> one row per contender."""
    rounds, flops = result["rounds"], result["flops_per_token"]
    per_step = result["batch"] * result["length"]
    names = list(result["contenders"])
    rates = {n: [per_step / statistics.median(r[n]["seconds"]) for r in rounds] for n in names}
    rows = {}
    for name in names:
        last, foreign = (
            rounds[-1][name],
            [r[name]["foreign"] for r in rounds if r[name]["foreign"] is not None],
        )
        share = {
            dtype: statistics.median(
                flops * rate / r["machine"]["flops"][dtype] for rate, r in zip(rates[name], rounds, strict=True)
            )
            for dtype in DTYPES
        }
        first = result["warm_up"][name]["seconds"][0]
        rows[name] = {
            "tokens_per_second": statistics.median(rates[name]),
            "model_flops": flops * statistics.median(rates[name]),
            "mfu": share,
            "first_step_seconds": result["contenders"][name]["start_seconds"] + first,
            "peak_memory": last["peak"],
            "foreign": statistics.median(foreign) if foreign else None,
            "first_loss": result["warm_up"][name]["losses"][0],
            "last_loss": last["losses"][-1],
            "warm_up_seconds": sum(result["warm_up"][name]["seconds"]),
            "ratios": {
                other: bootstrap([a / b for a, b in zip(rates[other], rates[name], strict=True)])
                for other in ("castalia", "castalia-compiled")
                if other in names and other != name
            },
        }
    machine = {dtype: statistics.median(r["machine"]["flops"][dtype] for r in rounds) for dtype in DTYPES}
    return {"matmul_flops": machine, "rows": rows}


def table(result: dict[str, Any], summary: dict[str, Any]) -> str:
    """The summary as text."""
    facts = result["environment"]
    threads = next(iter(result["contenders"].values()))["threads"]
    lines = [
        f"{result['shape']}, {result['batch']} x {result['length']} tokens, {result['precision']}; "
        f"{len(result['rounds'])} rounds; {facts['cpu']}, {threads} threads, torch {facts['torch']}",
        f"products of matrices: fp32 {summary['matmul_flops']['float32'] / 1e9:.0f}, bf16 "
        f"{summary['matmul_flops']['bfloat16'] / 1e9:.0f} GFLOP/s; {result['flops_per_token'] / 1e6:.1f} MFLOP/token",
        f"{'':22}{'tokens/s':>9}  {'castalia / it':>19}  {'compiled / it':>19}{'GFLOP/s':>9}{'of fp32':>8}"
        f"{'of bf16':>8}{'peak MiB':>10}{'first step':>11}{'foreign':>9}{'loss':>15}",
    ]
    for name, row in summary["rows"].items():
        cells = []
        for ours in ("castalia", "castalia-compiled"):
            middle = row["ratios"].get(ours)
            cells.append("-" if middle is None else "{:.2f} [{:.2f}, {:.2f}]".format(*middle))
        peak = "?" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:.0f}"
        foreign = "?" if row["foreign"] is None else f"{row['foreign']:.2f}"
        lines.append(
            f"{name:22}{row['tokens_per_second']:9.0f}  {cells[0]:>19}  {cells[1]:>19}{row['model_flops'] / 1e9:9.0f}"
            f"{100 * row['mfu']['float32']:7.0f}%{100 * row['mfu']['bfloat16']:7.0f}%{peak:>10}"
            f"{row['first_step_seconds']:9.1f} s{foreign:>9}{row['first_loss']:8.2f} ->{row['last_loss']:5.2f}"
        )
    return "\n".join(lines)


def set_up(target: Path) -> None:
    """Make the peers' environment: torch first, then the complete list, nothing beyond it."""
    venv.create(target, with_pip=True)
    python = str(python_of(target))
    subprocess.run([python, "-m", "pip", "install", TORCH], check=True)
    requirements = str(HERE / "requirements-peers.txt")
    subprocess.run([python, "-m", "pip", "install", "--no-deps", "-r", requirements], check=True)


def python_of(target: Path) -> Path:
    """The interpreter of a virtual environment."""
    return target / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", action="store_true", help="make the peers' environment and stop")
    parser.add_argument("--venv", type=Path, default=VENV, help="the peers' environment (default: .venv-bench)")
    every = (*NAMES, *COSTS[1:])
    parser.add_argument("--contenders", nargs="+", choices=every, metavar="NAME", help=", ".join(every))
    parser.add_argument("--costs", action="store_true", help="castalia alone, bare and with what a run may add")
    parser.add_argument("--shape", choices=SHAPES, default="pythia-70m")
    parser.add_argument("--tokens", nargs="+", default=["4x512"], help="sequences x tokens of a step, such as 4x512")
    parser.add_argument("--precision", nargs="+", choices=("bf16", "fp32"), default=["bf16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps of a contender's turn (default: 3)")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before the first round (default: 3)")
    parser.add_argument("--quick", action="store_true", help="three contenders, 7 rounds of one step, 2 to warm up")
    parser.add_argument("--json", type=Path, help="also write every measurement to this file")
    args = parser.parse_args(arguments)
    names = COSTS if args.costs else QUICK if args.quick else NAMES
    args.contenders = args.contenders or list(names)
    if args.quick:
        args.rounds, args.steps, args.warm_up = 7, 1, 2
    for tokens in args.tokens:
        if not all(part.isdigit() and int(part) > 0 for part in tokens.split("x")) or tokens.count("x") != 1:
            parser.error(f"--tokens {tokens}: write it as sequences x tokens, for example 4x512")
        if int(tokens.split("x")[1]) > 2048:
            parser.error(f"--tokens {tokens}: the peers' configurations here end at 2048 tokens")
    return args


def main() -> None:
    args = parse()
    if args.setup:
        set_up(args.venv)
        return
    args.python = python_of(args.venv)
    if not args.python.exists():
        sys.exit(
            f"{args.venv}: there is no environment with the peers; make it with: python benchmarks/train.py --setup"
        )
    # `timeout`, like Ctrl-C, leaves a table of the rounds so far.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    results: list[dict[str, Any]] = []

    def keep(result: dict[str, Any]) -> None:
        if args.json:
            part = args.json.with_name(args.json.name + ".part")
            part.write_text(json.dumps([*results, result], indent=1) + "\n", encoding="utf-8")
            part.replace(args.json)

    for precision in args.precision:
        for tokens in args.tokens:
            result = measure(args, tokens, precision, keep)
            summary = summarise(result)
            print(table(result, summary), end="\n\n", flush=True)
            keep(result | {"summary": summary})
            results.append(result | {"summary": summary})


if __name__ == "__main__":
    main()
