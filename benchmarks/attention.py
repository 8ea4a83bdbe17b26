"""Attention by kind and length: CPU seconds and peak memory of a forward and backward pass, against dense SDPA.

    python benchmarks/attention.py
    python benchmarks/attention.py --lengths 1024 4096 --kinds causal window-256 --json results.json

    (kind, length) ──a process each, one thread──> seconds, bytes ──> tables, and ratios to `causal`

`causal` is torch's own attention with is_causal, which skips the upper triangle; `mask` is the same kernel
given the window of 1024 as a matrix: what a model without the tiles would compute. Time is the processor
time of the process, so that other programs on the machine do not count; memory is the peak resident size
beyond that of the process with its queries, keys and values.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

KINDS = ("causal", "mask", "window-256", "window-1024", "local", "bslongformer", "bigbird", "sparse_fixed", "documents")
LENGTHS = (1024, 2048, 4096, 8192, 16384)
MOST_FOR_A_MATRIX = 8192
HEADS, SIZE, BLOCK, DOCUMENT = 8, 64, 64, 512


def measure(kind: str, length: int, repeats: int) -> dict[str, float]:
    """Run one case in this process."""
    import torch

    from castalia.config import ModelConfig
    from castalia.model.attention import attend
    from castalia.model.attention_layouts import LAYOUTS, BlockLayout
    from castalia.model.attention_mask import Documents, MaskSpec

    torch.set_num_threads(1)
    mask = MaskSpec()
    if kind.startswith("window") or kind == "mask":
        mask.window = 1024 if kind == "mask" else int(kind.partition("-")[2])
    elif kind in LAYOUTS:
        mask.layout = BlockLayout(ModelConfig(attention=kind, attention_block=BLOCK), kind, 0)
    elif kind == "documents":
        mask.documents = Documents.of(torch.arange(length).unsqueeze(0) // DOCUMENT, "cpu")

    def step(tokens: int) -> None:
        q, k, v = (t[:, :, :tokens].detach().requires_grad_() for t in inputs)
        out = attend(q, k, v, mask)
        out.backward(torch.ones_like(out))

    inputs = [torch.randn(1, HEADS, length, SIZE) for _ in range(3)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if kind == "mask":
        mask.dense = mask.matrix(length, length, "cpu")
    start = time.process_time()
    step(length)
    best = time.process_time() - start
    for _ in range(repeats - 1):
        start = time.process_time()
        step(length)
        best = min(best, time.process_time() - start)
    # Linux counts kilobytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return {"seconds": best, "bytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit}


def table(title: str, results: dict[str, dict[int, dict[str, float]]], key: str, lengths: list[int]) -> str:
    """A Markdown table of values with their ratios to `causal`."""
    lines = [
        f"{title}",
        "",
        "| kind | " + " | ".join(f"{n}" for n in lengths) + " |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    for kind, row in results.items():
        cells = []
        for length in lengths:
            if length not in row:
                cells.append("")
                continue
            value, base = row[length][key], results.get("causal", {}).get(length, {}).get(key)
            shown = f"{value:.3f}" if key == "seconds" else f"{value / 2**20:.0f}"
            cells.append(shown if not base or kind == "causal" else f"{shown} ({value / base:.2f})")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--repeats", type=int, default=2, help="the quickest counts")
    parser.add_argument("--json", help="file for all that was measured")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]), args.repeats)))
        return
    results: dict[str, dict[int, dict[str, float]]] = {}
    for kind in args.kinds:
        for length in args.lengths:
            if kind == "mask" and length > MOST_FOR_A_MATRIX:
                continue
            command = [sys.executable, __file__, "--one", kind, str(length), "--repeats", str(args.repeats)]
            run = subprocess.run(command, check=True, capture_output=True, text=True)
            results.setdefault(kind, {})[length] = json.loads(run.stdout)
            print(kind, length, results[kind][length], file=sys.stderr)
    print(table("CPU seconds, forward and backward (ratio to causal)", results, "seconds", args.lengths), end="\n\n")
    print(table("peak memory beyond the inputs, MiB (ratio to causal)", results, "bytes", args.lengths))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
