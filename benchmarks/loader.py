"""How many tokens a second the loader gives, and how long the order takes to build.

    python benchmarks/loader.py [--tokens 20_000_000] [--seq-length 2048] [--steps 200] [--json]

Random documents of 1 to 2000 ids; the batches are read and thrown away.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from castalia.data.loader import Loader, Shard
from castalia.data.plan import RunPlan
from castalia.data.sample import PackedDataset
from castalia.data.store import StoreWriter, TokenStore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    random = np.random.default_rng(0)
    result: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with StoreWriter(Path(folder, "ds"), np.uint16) as writer:
            while writer.num_tokens < args.tokens:
                writer.add_document(random.integers(0, 50000, random.integers(1, 2000), dtype=np.uint16))
            writer.finish()
        result["write_tokens_per_second"] = args.tokens / (time.perf_counter() - start)
        start = time.perf_counter()
        store = TokenStore(Path(folder, "ds"))
        result["open_seconds"] = time.perf_counter() - start
        plan = RunPlan(args.batch_size, args.seq_length, args.steps)
        start = time.perf_counter()
        dataset = PackedDataset(store, (0, len(store)), plan.num_samples, args.seq_length, 1234)
        result["order_seconds"] = time.perf_counter() - start
        result["epochs"] = dataset.order.num_epochs
        for prefetch in (0, 2):
            loader = Loader(dataset, plan, Shard(), args.batch_size, prefetch=prefetch)
            start = time.perf_counter()
            tokens = sum(batch.tokens.numel() for batches in loader.stream(0, args.steps) for batch in batches)
            result[f"tokens_per_second_prefetch_{prefetch}"] = tokens / (time.perf_counter() - start)
    if args.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:32} {value:,.4g}")


if __name__ == "__main__":
    main()
