"""How fast `prepare` is beside what others do with the same text on the same cores, in turns.

    python benchmarks/prepare.py --corpus FILE.jsonl [--tokenizer tokenizer.json] [--rounds 3] [--json]

    castalia N         `castalia prepare` with N workers: reads .jsonl, writes and syncs the data set
    tokenizers         Hugging Face's `encode_batch` with its own threads; reads, and writes nothing
    stand-in N         GPT-NeoX's preprocess_data as it works: `json.loads` and one `encode` for each
                       document in a pool of N processes, ordered `imap` in chunks of 25, and the
                       parent appends every document's ids to the .bin with numpy

All are fresh processes, and all that write must write the same bytes. The slow ones get the first
`--slice` megabytes, since they take minutes for the whole (`--slice 0` gives them everything), and
Castalia the same slice too, for the comparison of bytes. Start-up weighs otherwise on the slice than
on the whole, so ratios are given with it and without: the time for the first document alone is then
taken off of both. A ratio above 1 means that Castalia is quicker; each is of one round. A machine
that others use gives lower and wider figures; CPU seconds suffer less.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORKER: dict[str, Any] = {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help=".jsonl; `castalia corpora get debian-docs` gives one")
    parser.add_argument("--tokenizer", help="default: a byte-level BPE of 50,257 ids, trained on the slice")
    parser.add_argument("--slice", type=float, default=8, help="MB that the slow ones get (default 8; 0: all)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--contender", nargs=4, help=argparse.SUPPRESS)  # name, workers, corpus, prefix
    args = parser.parse_args()
    if args.contender is not None:
        name, workers, corpus, prefix = args.contender
        CONTENDERS[name](corpus, args.tokenizer, prefix, int(workers))
        return
    with tempfile.TemporaryDirectory() as folder:
        report = measure(args, Path(folder))
    if args.json:
        print(json.dumps(report))
    else:
        show(report)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run all contenders in turns; returns what was measured."""
    corpus = Path(args.corpus)
    part = corpus
    if args.slice:
        part = folder / "slice.jsonl"
        with open(corpus, "rb") as source, open(part, "wb") as target:
            for line in source:
                target.write(line)
                if target.tell() >= args.slice * 1e6:
                    break
    tokenizer = args.tokenizer or str(folder / "tokenizer.json")
    if args.tokenizer is None:
        command = [sys.executable, "-m", "castalia", "tokenizer", "train", str(part)]
        subprocess.run([*command, "--vocab-size", "50257", "--output", tokenizer], check=True)
    one = folder / "one.jsonl"
    with open(part, "rb") as source:
        one.write_bytes(source.readline())
    runs = [("castalia", n, corpus) for n in args.workers] + [("castalia", 2, part), ("tokenizers", 0, part)]
    runs += [("stand-in", n, part) for n in args.workers]
    rows: dict[str, dict[str, Any]] = {}
    digests: dict[str, set[str]] = {}
    for turn in range(args.rounds):
        for name, workers, source in runs[turn % len(runs) :] + runs[: turn % len(runs)]:
            label = f"{name} {workers}" if workers else name
            label += " (slice)" if source == part and name == "castalia" else ""
            row = rows.setdefault(label, {"seconds": [], "cpu": [], "start": [], "bytes": text_bytes(source)})
            prefix = folder / "out"
            seconds, cpu = timed(name, workers, source, prefix, tokenizer)
            row["seconds"].append(seconds)
            row["cpu"].append(cpu)
            print(f"{label}: {seconds:.2f} s, {cpu:.2f} CPU s", file=sys.stderr, flush=True)
            if Path(f"{prefix}.bin").exists():
                row["ids"] = os.path.getsize(f"{prefix}.bin") // 2
                content = Path(f"{prefix}.bin").read_bytes()
                digests.setdefault(str(source), set()).add(hashlib.sha256(content).hexdigest())
            for path in folder.glob("out*"):
                path.unlink()
            if name in ("stand-in", "castalia") and not label.endswith("(slice)"):
                row["start"].append(timed(name, workers, one, prefix, tokenizer)[0])
            for path in folder.glob("out*"):
                path.unlink()
    if any(len(found) != 1 for found in digests.values()):
        raise SystemExit(f"the contenders wrote different ids: {digests}")
    ratios = {}
    for n in args.workers:
        ours, theirs = rows[f"castalia {n}"], rows[f"stand-in {n}"]
        mine = [ours["bytes"] / s for s in ours["seconds"]]
        whole = [theirs["bytes"] / s for s in theirs["seconds"]]
        pure = [
            [row["bytes"] / (s - b) for s, b in zip(row["seconds"], row["start"], strict=True)]
            for row in (ours, theirs)
        ]
        ratios[n] = {
            "start-up included": [a / b for a, b in zip(mine, whole, strict=True)],
            "start-up taken off of both": [a / b for a, b in zip(*pure, strict=True)],
            "MB per CPU second, start-up included": [
                ours["bytes"] / c / (theirs["bytes"] / d) for c, d in zip(ours["cpu"], theirs["cpu"], strict=True)
            ],
        }
    return {"rows": rows, "ratios": ratios, "compared": {str(k): sorted(v) for k, v in digests.items()}}


def show(report: dict[str, Any]) -> None:
    """Print what was measured."""
    for label, row in report["rows"].items():
        rates = [row["bytes"] / 1e6 / s for s in row["seconds"]]
        ids = f"{row['ids'] / statistics.median(row['seconds']) / 1e6:6.2f} M ids/s" if "ids" in row else " " * 14
        print(
            f"{label:20} {row['bytes'] / 1e6:6.1f} MB  {statistics.median(rates):7.2f} MB/s "
            f"({min(rates):.2f} to {max(rates):.2f})  {ids}  {statistics.median(row['cpu']):6.2f} CPU s"
        )
    for n, kinds in report["ratios"].items():
        for kind, values in kinds.items():
            print(
                f"castalia / stand-in, {n} workers, {kind}: {statistics.median(values):.1f} "
                f"({min(values):.1f} to {max(values):.1f})"
            )
    print("outputs compared: byte-identical")


def timed(name: str, workers: int, corpus: Path, prefix: Path, tokenizer: str) -> tuple[float, float]:
    """Seconds, and CPU seconds with those of children, of one contender in a process of its own."""
    if name == "castalia":
        command = [sys.executable, "-m", "castalia", "prepare", str(corpus), "--tokenizer", tokenizer]
        command += ["--no-append-eod", "--workers", str(workers), "--output", str(prefix)]
    else:
        command = [sys.executable, __file__, "--corpus", str(corpus), "--tokenizer", tokenizer, "--contender"]
        command += [name, str(workers), str(corpus), str(prefix)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def text_bytes(path: Path) -> int:
    """UTF-8 bytes of the texts of a .jsonl file."""
    with open(path, "rb") as file:
        return sum(len(json.loads(line)["text"].encode()) for line in file)


def start_worker(path: str) -> None:
    """Give a process of the pool its tokenizer."""
    import tokenizers

    WORKER["tokenizer"] = tokenizers.Tokenizer.from_file(path)


def encode_line(line: str) -> tuple[list[int], int]:
    """One document, as GPT-NeoX's worker does it."""
    text = json.loads(line)["text"]
    return WORKER["tokenizer"].encode(text, add_special_tokens=False).ids, len(line)


def stand_in(corpus: str, tokenizer: str, prefix: str, workers: int) -> None:
    """GPT-NeoX's preprocess_data, in its own manner; the .bin alone is written."""
    import multiprocessing

    import numpy as np

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sizes = []
    with (
        multiprocessing.get_context("fork").Pool(workers, start_worker, (tokenizer,)) as pool,
        open(corpus, encoding="utf-8") as source,
        open(f"{prefix}.bin", "wb") as target,
    ):
        for ids, _ in pool.imap(encode_line, source, 25):
            if ids:
                array = np.array(ids, np.uint16)
                target.write(array.tobytes(order="C"))
                sizes.append(array.size)


def tokenizers_alone(corpus: str, tokenizer: str, prefix: str, workers: int) -> None:
    """`encode_batch` on a megabyte of texts at a time, with its own threads."""
    import tokenizers

    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    encoder = tokenizers.Tokenizer.from_file(tokenizer)
    batch: list[str] = []
    size = 0
    with open(corpus, encoding="utf-8") as source:
        for line in source:
            batch.append(json.loads(line)["text"])
            size += len(batch[-1])
            if size >= 1 << 20:
                [e.ids for e in encoder.encode_batch(batch, add_special_tokens=False)]
                batch, size = [], 0
    [e.ids for e in encoder.encode_batch(batch, add_special_tokens=False)]


CONTENDERS = {"stand-in": stand_in, "tokenizers": tokenizers_alone}

if __name__ == "__main__":
    main()
