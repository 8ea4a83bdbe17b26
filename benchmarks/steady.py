"""Does a step cost the same at the end of a long run, and on a large data set; how soon does the first one come?

    python benchmarks/steady.py [--steps 10000] [--megabytes 10 1000 10000] [--json]

    long     one run of many small steps: the median step and the memory of its first and of its last tenth
    data     the same short run on data sets of several sizes, in turns: each one's median step beside the smallest's
    start    `castalia train` of Pythia-70M's shape, eager: from the command to the end of its first step, and what
             `python -c "import torch"` takes of that

Every run is `castalia train` in a process of its own on two threads, with its defaults but for the sizes. A page
of a data set that is read for the first time comes from the disk or from its cache; the files are written just
before, so mostly from the cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from castalia.data.store import StoreWriter

MODEL = ["model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=2", "model.vocab_size=8192"]
SMALL = [*MODEL, "data.seq_length=128", "training.batch_size=4", "checkpoint.interval=null", "evaluation.interval=null"]
PYTHIA = [
    "model.num_layers=6",
    "model.hidden_size=512",
    "model.num_attention_heads=8",
    "model.vocab_size=50304",
    "data.seq_length=512",
    "training.batch_size=4",
]
ROUNDS = 3
DOCUMENT = 1000


def write_data(prefix: Path, megabytes: int) -> None:
    """Documents of 1000 random 16-bit ids; one block of them is written again and again."""
    block = np.random.default_rng(0).integers(0, 8000, (1000, DOCUMENT), dtype=np.uint16)
    with StoreWriter(prefix, np.uint16) as writer:
        for _ in range(max(1, megabytes // 2)):
            for document in block:
                writer.add_document(document)
        writer.finish()


def command(data: Path, output: Path, steps: int, settings: list[str]) -> list[str]:
    """One run of `castalia train`."""
    sets = [f"data.path={data}", "data.split=1,0,0", f"training.steps={steps}", f"output={output}"]
    # The tenths of a long run are compared, so the rate stays on its plateau and no file is written meanwhile.
    still = ["logging.interval=1", "evaluation.at_end=false", "schedule.type=constant"]
    return [sys.executable, "-m", "castalia", "train", *sets, *still, *settings, "--no-report"]


def steps_of(output: Path) -> list[dict[str, float]]:
    """The records of the steps."""
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "train"]


def run(data: Path, folder: Path, steps: int, settings: list[str]) -> tuple[list[float], list[float]]:
    """Seconds of each step but the first, peak memory after each (MiB)."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        output = Path(place, "run")
        environment = os.environ | {"OMP_NUM_THREADS": str(min(2, os.cpu_count() or 1))}
        done = subprocess.run(command(data, output, steps, settings), env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        records = steps_of(output)
        seconds = [record["seconds"] for record in records]
        gaps = [b - a for a, b in itertools.pairwise(seconds)]
        return gaps, [record["peak_memory"] / 2**20 for record in records]


def long_run(data: Path, folder: Path, steps: int) -> dict[str, float]:
    """The first and the last tenth of one run; the first tenth begins at step 10."""
    gaps, memory = run(data, folder, steps, SMALL)
    tenth = max(1, steps // 10)
    early, late = statistics.median(gaps[10 : 10 + tenth]), statistics.median(gaps[-tenth:])
    return {
        "steps": steps,
        "first_tenth_ms": 1e3 * early,
        "last_tenth_ms": 1e3 * late,
        "last_by_first": late / early,
        "peak_MiB_step_100": memory[min(100, len(memory) - 1)],
        "peak_MiB_end": memory[-1],
    }


def data_sizes(folder: Path, megabytes: list[int], steps: int) -> list[dict[str, float]]:
    """The same run on each size, in turns."""
    times: dict[int, list[float]] = {size: [] for size in megabytes}
    memory: dict[int, float] = {}
    for size in megabytes:
        write_data(folder / f"data-{size}", size)
        run(folder / f"data-{size}", folder, 2, SMALL)  # the index of the documents goes into its cache
    for _ in range(ROUNDS):
        for size in megabytes:
            gaps, peak = run(folder / f"data-{size}", folder, steps, SMALL)
            times[size].append(statistics.median(gaps[10:]))
            memory[size] = peak[-1]
    base = times[megabytes[0]]
    return [
        {
            "megabytes": size,
            "step_ms": 1e3 * statistics.median(times[size]),
            "by_smallest": statistics.median(a / b for a, b in zip(times[size], base, strict=True)),
            "peak_MiB": memory[size],
        }
        for size in megabytes
    ]


def start_up(data: Path, folder: Path) -> dict[str, float]:
    """From the command to the first step of a model of 70 million parameters."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    torch = time.perf_counter() - begun
    waits = []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            output = Path(place, "run")
            begun = time.perf_counter()
            settings = [*PYTHIA, "checkpoint.interval=null", "evaluation.interval=null"]
            with subprocess.Popen(
                command(data, output, 1000, settings), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            ) as process:
                while process.poll() is None and not ((output / "metrics.jsonl").exists() and steps_of(output)):
                    time.sleep(0.02)
                waits.append(time.perf_counter() - begun)
                ended = process.poll()
                process.kill()
            if ended is not None:
                sys.exit(f"the run ended with {ended} before its first step")
    return {"first_step_seconds": statistics.median(waits), "import_torch_seconds": torch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000, help="of the long run")
    parser.add_argument("--short", type=int, default=300, help="steps of a run on one size of data")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 1000, 10_000])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_data(folder / "small", 10)
        result = {
            "start": start_up(folder / "small", folder),
            "long": long_run(folder / "small", folder, args.steps),
            "data": data_sizes(folder, sorted(args.megabytes), args.short),
        }
    if args.json:
        print(json.dumps(result))
        return
    for part in ("start", "long"):
        print(part, *(f"{name} {value:,.4g}" for name, value in result[part].items()), sep="  ")
    for row in result["data"]:
        print("data", *(f"{name} {value:,.4g}" for name, value in row.items()), sep="  ")


if __name__ == "__main__":
    main()
