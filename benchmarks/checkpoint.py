"""How long a save holds up training: written meanwhile against written at once, the same model, in turns.

    python benchmarks/checkpoint.py [--layers 6 --hidden 512 --vocabulary 16384] [--saves 8] [--json out.json]

    round: some steps alone | a step, save, the steps during which it is written | a step, save at once

The state is copied into buffers that exist, as `castalia train` does it. What a save costs is the time
by which the steps around it are longer than steps without: the stall itself and, while a thread writes,
what it takes from the steps that follow (on a CPU, which computes and hashes with the same cores).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from castalia.checkpoint import Background, save_checkpoint
from castalia.config import Config
from castalia.config.derive import derive
from castalia.data.loader import Batch
from castalia.model.transformer import build_model
from castalia.optim import make_store
from castalia.train.engine import LocalEngine

MINUTE = 60.0


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--saves", type=int, default=8, help="of each kind")
    parser.add_argument("--folder", type=Path, default=None, help="where to save (default: a temporary folder)")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    values = {
        "model": {
            "num_layers": args.layers,
            "hidden_size": args.hidden,
            "num_attention_heads": args.hidden // 64,
            "vocab_size": args.vocabulary,
        },
        "data": {"seq_length": args.length},
        "training": {"steps": 1000, "batch_size": args.rows},
    }
    config = derive(Config.model_validate(values))[0]
    model = build_model(config.model, 1, torch.device("cpu"))
    store = make_store(model, config.optimizer, "fp32", arena=True)
    engine = LocalEngine(model, store, config.loss)
    ids = torch.randint(0, args.vocabulary, (args.rows, args.length + 1), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(args.length).expand(args.rows, args.length)
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), positions)

    def step() -> float:
        began = time.perf_counter()
        engine.forward_backward([batch], batch.num_tokens)
        store.gradient_norm()
        store.step(1e-3)
        return time.perf_counter() - began

    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        background: Background[Path] = Background()
        background.copied(store.tensors())
        size = sum(4 * t.numel() for t in store.tensors().values())
        for _ in range(3):
            step()
        alone, stalls, during, at_once, numbers = [], [], [], [], iter(range(10**6))

        def write(tensors: object) -> Path:
            return save_checkpoint(folder, next(numbers), tensors, {}, keep_last=1)  # type: ignore[arg-type]

        for turn in range(args.saves):
            alone += [step() for _ in range(4)]
            usual = statistics.median(alone[-4:])
            began = time.perf_counter()
            background.start(store.tensors(), write)
            stalls.append(time.perf_counter() - began)
            longer = 0.0
            while background.busy:
                longer += max(step() - usual, 0.0)
            background.wait()
            during.append(longer)
            began = time.perf_counter()
            write(store.tensors())
            at_once.append(time.perf_counter() - began)
            print(f"  {turn}: {stalls[-1]:.3f} s + {longer:.3f} s, at once {at_once[-1]:.3f} s", file=sys.stderr)
        background.close()
    one = statistics.median(alone)
    rows = {
        "in the background: stall": statistics.median(stalls),
        "in the background: stall and what later steps lose": statistics.median(
            a + b for a, b in zip(stalls, during, strict=True)
        ),
        "at once": statistics.median(at_once),
    }
    print(f"state {size / 1e6:,.0f} MB, a step {one:.3f} s, {torch.get_num_threads()} threads, medians of {args.saves}")
    print("| a save | seconds | steps | share of the time at one save a minute |\n|---|---|---|---|")
    for what, seconds in rows.items():
        print(f"| {what} | {seconds:.3f} | {seconds / one:.2f} | {seconds / (MINUTE + seconds):.2%} |")
    if args.json:
        raw = {"step": alone, "stall": stalls, "later": during, "at_once": at_once, "bytes": size}
        args.json.write_text(json.dumps(raw, indent=1))


if __name__ == "__main__":
    main()
