"""How long a data set takes to open, and how much memory: both orders against GPT-NeoX's three arrays.

    python benchmarks/open.py [--documents 10_000_000 100_000_000] [--rounds 3] [--folder DIR] [--json]

Random documents of lognormal length, about 120 tokens; the .bin is a sparse file, the .idx a
real one (20 bytes a document). Every measurement is a process of its own: it opens the store and builds
the order of one epoch, up to the ids of the first sample. CPU and wall seconds are those of the best
round; memory is the peak resident set above that after the imports.

    arrays         doc_idx, sample_idx, shuffle_idx as GPT-NeoX builds them, in numpy, of an index that is not checked
    gptneox        GPTNeoXOrder, index checked and sizes hashed, nothing in the cache, which is written
    gptneox again  the same, from the cache
    fingerprint    the same, and the fingerprint of the data set, which a run takes to know it again
    permutation    PermutationOrder, store opened lazily
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from castalia.data.order import GPTNeoXOrder
from castalia.data.order_permutation import PermutationOrder
from castalia.data.store import HEADER, MAGIC, TokenStore, data_fingerprint

SEQ_LENGTH, SEED, CHUNK = 2048, 1234, 1 << 20
KINDS = ("arrays", "gptneox", "gptneox again", "fingerprint", "permutation")


def make(prefix: Path, documents: int) -> int:
    """Write the index and a sparse .bin; returns the number of tokens."""
    random = np.random.default_rng(0)
    total = 0
    sizes_path = Path(f"{prefix}.sizes")
    with open(f"{prefix}.idx", "wb") as index, open(sizes_path, "wb") as sizes_file:
        index.write(HEADER.pack(MAGIC, 1, 8, documents, documents + 1))
        for start in range(0, documents, CHUNK):
            number = min(CHUNK, documents - start)
            sizes = np.clip(random.lognormal(4.3, 1.0, number), 1, 100_000).astype("<i4")
            sizes.tofile(index)
            sizes.tofile(sizes_file)
        for start in range(0, documents, CHUNK):
            number = min(CHUNK, documents - start)
            sizes = np.fromfile(sizes_path, "<i4", number, offset=4 * start)
            ends = np.cumsum(sizes, dtype=np.int64) + total
            ((ends - sizes) * 2).astype("<i8").tofile(index)
            total = int(ends[-1])
        for start in range(0, documents + 1, CHUNK):
            np.arange(start, min(start + CHUNK, documents + 1), dtype="<i8").tofile(index)
    sizes_path.unlink()
    with open(f"{prefix}.bin", "wb") as ids:
        ids.truncate(2 * total)
    return total


def arrays(prefix: Path) -> np.ndarray:
    """GPT-NeoX's three arrays of one epoch (its format and order as the documentation of ours describes them).

    sample_idx, which GPT-NeoX fills by a loop in C++, by a binary search for all samples at once.
    """
    index = np.memmap(f"{prefix}.idx", "u1", "r")
    documents = int(HEADER.unpack(index[: HEADER.size].tobytes())[3])
    sizes = index[HEADER.size : HEADER.size + 4 * documents].view("<i4")
    pointers = index[HEADER.size + 4 * documents : HEADER.size + 12 * documents].view("<i8")
    random = np.random.RandomState(SEED)
    doc_idx = np.arange(documents, dtype=np.int32)
    random.shuffle(doc_idx)
    starts = np.zeros(documents + 1, np.int64)
    np.cumsum(sizes[doc_idx], dtype=np.int64, out=starts[1:])
    samples = (int(starts[-1]) - 1) // SEQ_LENGTH
    at = np.arange(samples + 1, dtype=np.int64) * SEQ_LENGTH
    rows = np.searchsorted(starts, at, side="right") - 1
    sample_idx = np.stack([rows, at - starts[rows]], axis=1).astype(np.int32)
    shuffle_idx = np.arange(samples, dtype=np.uint32)
    random.shuffle(shuffle_idx)
    ids = np.memmap(f"{prefix}.bin", "<u2", "r")
    k = int(shuffle_idx[0])
    (first, offset), (last, end) = sample_idx[k].tolist(), sample_idx[k + 1].tolist()
    parts = []
    for j in range(first, last + 1):
        low = offset if j == first else 0
        high = end + 1 if j == last else int(sizes[doc_idx[j]])
        start = int(pointers[doc_idx[j]]) // 2
        parts.append(ids[start + low : start + high])
    return np.concatenate(parts)


def orders(prefix: Path, kind: str, samples: int) -> np.ndarray:
    """The first sample by one of our orders."""
    store = TokenStore(prefix, lazy=kind == "permutation")
    if kind == "fingerprint":
        data_fingerprint(store)
    make_order = PermutationOrder if kind == "permutation" else GPTNeoXOrder
    order = make_order(store, (0, len(store)), samples, SEQ_LENGTH, SEED)
    return np.concatenate([store.get(*piece) for piece in order.locate(0)])


def peak() -> float:
    """Peak resident set so far, MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measure(prefix: Path, kind: str, samples: int) -> dict[str, Any]:
    """In a fresh process: seconds and memory of one way."""
    np.random.RandomState(0).shuffle(np.arange(3))  # its import is no part of the work
    before = peak()
    wall, cpu = time.perf_counter(), time.process_time()
    ids = arrays(prefix) if kind == "arrays" else orders(prefix, kind, samples)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert len(ids) == SEQ_LENGTH + 1
    return {"wall": wall, "cpu": cpu, "mib": peak() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[10_000_000, 100_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where the data sets are written (default: the system's temporary folder)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", nargs=3, metavar=("PREFIX", "KIND", "SAMPLES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        prefix, kind, samples = args.measure
        print(json.dumps(measure(Path(prefix), kind, int(samples))))
        return
    results = []
    for documents in args.documents:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            if shutil.disk_usage(folder).free < max(10 << 30 if documents > 50_000_000 else 0, 40 * documents):
                print(f"{documents:,} documents: left out, the disk has too little room", file=sys.stderr)
                continue
            prefix = Path(folder, "tokens")
            tokens = make(prefix, documents)
            environment = {**os.environ, "XDG_CACHE_HOME": f"{folder}/cache"}
            best: dict[str, dict[str, float]] = {}
            for _ in range(args.rounds):
                for kind in KINDS:
                    if kind == "gptneox":
                        shutil.rmtree(f"{folder}/cache", ignore_errors=True)
                    command = [sys.executable, __file__, "--measure", str(prefix), kind, str(tokens // SEQ_LENGTH - 1)]
                    run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
                    found = json.loads(run.stdout)
                    known = best.setdefault(kind, found)
                    best[kind] = {name: min(found[name], known[name]) for name in found}
        results += [{"documents": documents, "tokens": tokens, "kind": k, **figures} for k, figures in best.items()]
        if not args.json:
            print(f"\n{documents:,} documents, {tokens:,} tokens, best of {args.rounds}")
            print(f"{'':16}{'wall s':>10}{'CPU s':>10}{'MiB':>10}")
            for kind, figures in best.items():
                print(f"{kind:16}{figures['wall']:10.3f}{figures['cpu']:10.3f}{figures['mib']:10.1f}")
    if args.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
