"""The chunked loss beside plain cross-entropy: peak memory and CPU time for small and large vocabularies.

    python benchmarks/loss.py [--vocabulary 50304 262144] [--tokens 2048] [--chunk 512] [--rounds 3]

    plain     logits = hidden W^T in one piece, torch's cross_entropy, backward
    chunked   castalia.model.loss: logits of --chunk tokens at a time, gradients in the same pass

Each turn is a process of its own, so that its largest resident set is the turn's; turns alternate,
and the ratios are taken within a round. One thread, and the process's CPU time, so that a busy
machine disturbs little. The first turn of each also says its loss, which must be the same.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

KINDS = ("plain", "chunked")


def turn(kind: str, vocabulary: int, tokens: int, hidden_size: int, dtype_name: str, chunk: int) -> dict[str, float]:
    """One forward and backward pass after a small one to warm up; what it took."""
    import torch
    import torch.nn.functional as F

    from castalia.model.loss import linear_cross_entropy

    torch.set_num_threads(1)
    dtype = getattr(torch, dtype_name)

    def one(count: int) -> float:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(count, hidden_size, generator=generator, requires_grad=True)
        labels = torch.randint(0, vocabulary, (count,), generator=generator)
        if kind == "plain":
            loss = F.cross_entropy((hidden.to(dtype) @ weight.T).float(), labels)
        else:
            loss, _ = linear_cross_entropy(hidden, weight, labels, scale=1 / count, chunk_size=chunk)
        loss.backward()
        return float(loss)

    weight = (0.02 * torch.randn(vocabulary, hidden_size, generator=torch.Generator().manual_seed(1))).to(dtype)
    weight.requires_grad_()
    one(64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    loss = one(tokens)
    seconds = time.process_time() - started
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"loss": loss, "seconds": seconds, "peak_mib": after / 1024, "more_mib": (after - before) / 1024}


def main() -> int:
    """Alternate the turns, print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[50304, 262144])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--chunk", type=int, default=512, help="tokens whose logits exist at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--turn", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn:
        print(json.dumps(turn(args.turn, args.vocabulary[0], args.tokens, args.hidden, args.dtype[0], args.chunk)))
        return 0
    found: list[dict[str, Any]] = []
    print(f"{args.tokens} tokens, hidden size {args.hidden}, chunks of {args.chunk}, 1 thread, {args.rounds} rounds\n")
    print("| vocabulary | dtype | plain: s, peak MiB | chunked: s, peak MiB | time ratio | peak ratio | loss |")
    print("|---|---|---|---|---|---|---|")
    for vocabulary in args.vocabulary:
        for dtype in args.dtype:
            rounds: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
            for number in range(args.rounds):
                for kind in KINDS if number % 2 == 0 else reversed(KINDS):
                    command = [sys.executable, __file__, "--turn", kind, "--vocabulary", str(vocabulary)]
                    command += [
                        "--tokens",
                        str(args.tokens),
                        "--hidden",
                        str(args.hidden),
                        "--dtype",
                        dtype,
                        "--chunk",
                        str(args.chunk),
                    ]
                    done = subprocess.run(command, check=True, capture_output=True, text=True)
                    rounds[kind].append(json.loads(done.stdout))
            middle = {k: {m: statistics.median(r[m] for r in rs) for m in rs[0]} for k, rs in rounds.items()}
            ratios = {
                m: statistics.median(p[m] / c[m] for p, c in zip(rounds["plain"], rounds["chunked"], strict=True))
                for m in ("seconds", "peak_mib")
            }
            cells = [f"{middle[k]['seconds']:.2f}, {middle[k]['peak_mib']:,.0f}" for k in KINDS]
            losses = " = ".join(f"{middle[k]['loss']:.4f}" for k in KINDS)
            print(
                f"| {vocabulary:,} | {dtype} | {cells[0]} | {cells[1]} | {ratios['seconds']:.2f} | "
                f"{ratios['peak_mib']:.2f} | {losses} |",
                flush=True,
            )
            found.append({"vocabulary": vocabulary, "dtype": dtype, "rounds": rounds, "ratios": ratios})
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
