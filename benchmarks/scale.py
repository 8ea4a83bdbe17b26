"""What of a 15-trillion-token run can be measured on one machine, with the code that would run (docs/scale.md).

python benchmarks/scale.py [--shards 1000] [--folder FOLDER] [--json]

one shard of 15e9 tokens (its index is real, its ids a hole in a sparse file), linked under 1,000 names
    ──open_data──> a blend of 15e12 tokens ──> seconds to open, memory, seconds for a sample anywhere
Permutation of 1.8e9 samples ──> seconds a sample; forth and back again
one matrix of the model      ──> seconds to draw its initial weights
one rank's share of a checkpoint of 70e9 parameters, spread over 4,096 ──> seconds to write, sync and hash it
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from castalia.config import load
from castalia.config.derive import derive
from castalia.data.store import HEADER, MAGIC, VERSION

SHARD_TOKENS, DOCUMENT, LENGTH, BATCH = 15_000_000_000, 1000, 8192, 2048
PARAMETERS, RANKS = 70_553_706_496, 4096


def peak() -> float:
    """Peak resident memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def write_shard(prefix: Path) -> None:
    """An index of documents of one size, and ids that take no room on a disk that knows holes."""
    documents = SHARD_TOKENS // DOCUMENT
    with open(f"{prefix}.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, 4, documents, documents + 1))
        np.full(documents, DOCUMENT, np.int32).tofile(file)
        (np.arange(documents, dtype=np.int64) * (4 * DOCUMENT)).tofile(file)
        np.arange(documents + 1, dtype=np.int64).tofile(file)
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(4 * SHARD_TOKENS)


def data(folder: Path, shards: int) -> dict[str, Any]:
    """Open the blend as a run does, and read samples from anywhere in it."""
    from castalia.train.data import open_data

    names = [folder / f"shard-{number:04}" for number in range(shards)]
    write_shard(names[0])
    for name in names[1:]:
        for ending in (".idx", ".bin"):
            os.link(f"{names[0]}{ending}", f"{name}{ending}")
    tokens = shards * SHARD_TOKENS
    values = {
        "version": 1,
        "data": {"train_paths": [str(n) for n in names], "seq_length": LENGTH, "order": "permutation"},
        "model": {"vocab_size": 128256, "max_position_embeddings": LENGTH},
        "training": {"tokens": tokens, "batch_size": BATCH},
        "evaluation": {"interval": 10**9},
    }
    path = folder / "run.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    config = derive(load([path]))[0]
    before, began = peak(), time.perf_counter()
    found = open_data(config, config.training.steps or 0, None)
    opened = time.perf_counter() - began
    train = found.datasets["train"]
    began = time.perf_counter()
    train[0]
    first = time.perf_counter() - began
    draw = np.random.default_rng(0)
    numbers = [int(n) for n in draw.integers(0, len(train), 300)]
    began = time.perf_counter()
    for number in numbers:
        train[number]
    each = (time.perf_counter() - began) / len(numbers)
    index = os.path.getsize(f"{names[0]}.idx")
    return {
        "shards": shards,
        "tokens": tokens,
        "samples": len(train),
        "index_bytes": shards * index,
        "ids_bytes": shards * 4 * SHARD_TOKENS,
        "open_seconds": opened,
        "first_sample_seconds": first,
        "sample_seconds": each,
        "memory_mb": peak() - before,
    }


def permutation(tokens: int) -> dict[str, Any]:
    """The order of all samples of an epoch: what a number costs, and that it comes back."""
    from castalia.data.order_permutation import Permutation

    samples = tokens // LENGTH
    order = Permutation(samples, "seed 1234, epoch 0")
    x = np.random.default_rng(0).integers(0, samples, 1_000_000)
    before, began = peak(), time.perf_counter()
    y = order.map(x)
    together = (time.perf_counter() - began) / len(x)
    began = time.perf_counter()
    for number in x[:20_000]:
        order(int(number))
    alone = (time.perf_counter() - began) / 20_000
    assert (order.inverse_map(y) == x).all(), "a number does not come back"
    return {"samples": samples, "alone_us": 1e6 * alone, "together_us": 1e6 * together, "memory_mb": peak() - before}


def initial_weights() -> dict[str, Any]:
    """Draw 2^26 of the numbers that every rank draws at the start."""
    from castalia.model.initial import normal_rows

    out = torch.empty(8192, 8192)
    began = time.perf_counter()
    normal_rows("layers.0.attention.out.weight", out, 1234, 0.02)
    seconds = time.perf_counter() - began
    return {"numbers_per_second": out.numel() / seconds, "threads": torch.get_num_threads()}


def checkpoint(folder: Path) -> dict[str, Any]:
    """Save one rank's share of weights and two moments."""
    from castalia.checkpoint import save_checkpoint

    each = PARAMETERS // RANKS
    tensors = {f"{name}.x": torch.ones(each) for name in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")}
    began = time.perf_counter()
    {name: tensor.clone() for name, tensor in tensors.items()}
    copied = time.perf_counter() - began
    began = time.perf_counter()
    save_checkpoint(folder / "checkpoints", 1, tensors, {})
    return {"bytes": 12 * each, "copy_seconds": copied, "save_seconds": time.perf_counter() - began}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--folder", help="where the files go (default: a temporary one)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        answer = {
            "data": data(folder, args.shards),
            "permutation": permutation(args.shards * SHARD_TOKENS),
            "initial_weights": initial_weights(),
            "checkpoint": checkpoint(folder),
        }
    if args.json:
        print(json.dumps(answer))
        return
    for part, numbers in answer.items():
        print(part)
        for what, number in numbers.items():
            print(f"  {what:<22} {number:,.6g}")


if __name__ == "__main__":
    main()
