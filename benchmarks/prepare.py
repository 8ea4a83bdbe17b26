"""How fast `prepare` is beside the tokenizer alone: the same text, the same process, in turns.

    python benchmarks/prepare.py [--megabytes 8] [--vocab-size 16384] [--rounds 5] [--json]

The peers are `tokenizers`' own calls with its own threads, which read and write nothing:
`encode_batch` and `encode_batch_fast` on all texts at once, and `batched`, which is
`encode_batch_fast` on a megabyte at a time and mostly the quickest. `prepare` also reads .jsonl
and writes and syncs the data set. Each measurement has a fresh tokenizer, since a used one
remembers words, and the order turns from round to round. Ratios above 1 mean that `prepare`
is quicker; the one to quote is against the best peer. CPU seconds are less disturbed by
neighbours than MB/s.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from castalia.data.corpora import stdlib_corpus
from castalia.data.prepare import prepare
from castalia.data.tokenizer import HFTokenizer, train_bpe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=8)
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    texts: list[str] = []
    size = 0
    for _, text in stdlib_corpus():
        if size < args.megabytes * 1e6:
            texts.append(text)
            size += len(text.encode())
    content = train_bpe(texts, args.vocab_size).to_str().encode()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "text.jsonl")
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

        def peer(method: str, batch_size: float) -> int:
            encode = getattr(HFTokenizer(content).tokenizer, method)
            tokens, batch = 0, []
            for n, text in enumerate(texts, start=1):
                batch.append(text)
                if sum(map(len, batch)) >= batch_size or n == len(texts):
                    tokens += sum(len(e.ids) for e in encode(batch, add_special_tokens=False))
                    batch = []
            return tokens

        def ours() -> int:
            summary = prepare(
                [source], Path(folder, "out"), HFTokenizer(content), append_eod=False, workers=args.workers,
                overwrite=True,
            )  # fmt: skip
            return int(summary["tokens"])

        ways: dict[str, Callable[[], int]] = {
            "encode_batch": lambda: peer("encode_batch", float("inf")),
            "encode_batch_fast": lambda: peer("encode_batch_fast", float("inf")),
            "batched": lambda: peer("encode_batch_fast", 2**20),
            "prepare": ours,
        }
        wall: dict[str, list[float]] = {name: [] for name in ways}
        cpu: dict[str, list[float]] = {name: [] for name in ways}
        counts = set()
        for turn in range(args.rounds):
            names = list(ways)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                start, used = time.perf_counter(), time.process_time()
                counts.add(ways[name]())
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - used)
    if len(counts) != 1:
        raise SystemExit(f"the ways give different numbers of tokens: {counts}")
    speed = {name: size / 1e6 / statistics.median(values) for name, values in wall.items()}
    best = max((name for name in speed if name != "prepare"), key=lambda name: speed[name])
    result: dict[str, Any] = {
        "megabytes": size / 1e6,
        "tokens": counts.pop(),
        "workers": args.workers,
        "megabytes_per_second": speed,
        "cpu_seconds": {name: statistics.median(values) for name, values in cpu.items()},
        "best_peer": best,
        "prepare_over": {name: speed["prepare"] / speed[name] for name in speed if name != "prepare"},
    }
    if args.json:
        print(json.dumps(result))
        return
    print(f"{size / 1e6:.1f} MB, {result['tokens']} tokens, {args.workers} workers, {args.rounds} rounds")
    for name in speed:
        low, high = size / 1e6 / max(wall[name]), size / 1e6 / min(wall[name])
        used_seconds = result["cpu_seconds"][name]
        print(f"{name:18} {speed[name]:5.2f} MB/s ({low:.2f} to {high:.2f}), {used_seconds:.2f} CPU s")
    print(f"prepare / {best} (the best peer): {result['prepare_over'][best]:.2f}")


if __name__ == "__main__":
    main()
