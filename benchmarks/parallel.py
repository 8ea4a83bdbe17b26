"""Bytes that each rank sends per step, counted, against the least that the layout can do with.

    python benchmarks/parallel.py [--layouts dp2,zero1,zero3,tp2,tp2sp,cp2,pp2] [--json]

    one training step in gloo processes ──every operation of torch.distributed──> bytes sent by rank 0

Counted are the operations as they are issued, each with the bytes that a ring sends: 2 (n-1)/n of the
tensor for an all-reduce, (n-1)/n for an all-gather, a reduce-scatter or an all-to-all, all of it for a
send. Nothing is timed: on a small machine the processes share its cores. The least is that of gradients
and weights (data parallelism, ZeRO) or of activations (the others), in fp32; what is beyond it are losses,
norms, counts of tokens, and of tensor parallelism the embedding and the vocabulary's loss.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from castalia.config import Config, load
from castalia.parallel.testing import run_in_processes
from castalia.parallel.world import World

LAYERS, HIDDEN, VOCABULARY, LENGTH, BATCH, MICRO_BATCH = 4, 128, 512, 128, 8, 2
# Operation -> share of the bytes that travels, for n ranks.
SHARES = {
    "allreduce_": lambda n: 2 * (n - 1) / n,
    "_allgather_base_": lambda n: (n - 1) / n,
    "_reduce_scatter_base_": lambda n: (n - 1) / n,
    "alltoall_base_": lambda n: (n - 1) / n,
    "send": lambda n: 1.0,
}


class Counted(TorchDispatchMode):
    """Adds up what the operations of torch.distributed send."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks, self.sent, self.operations = ranks, 0.0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            share = SHARES.get(func.__name__.split(".")[0])
            if share is not None:
                tensors = [
                    t for a in args[:2] for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)
                ]
                self.sent += share(self.ranks) * max((t.numel() * t.element_size() for t in tensors), default=0)
                self.operations += 1
        return func(*args, **(kwargs or {}))


def count(world: World, config: Config) -> tuple[float, int]:
    """In each process: bytes and operations of the second step."""
    from castalia.data.loader import Loader, Shard
    from castalia.data.plan import RunPlan
    from castalia.parallel.layout import layout_of
    from castalia.parallel.mesh import Mesh
    from castalia.tools.verify import InventedText
    from castalia.train.assemble import assemble

    mesh = Mesh(layout_of(config.parallel, world.size), world)
    parts = assemble(config, mesh)
    plan, shard = RunPlan(BATCH, LENGTH, 2), Shard(mesh.data_rank, mesh.layout.data)
    loader = Loader(InventedText(LENGTH, VOCABULARY), plan, shard, MICRO_BATCH, 0)  # type: ignore[arg-type]
    for step in range(2):
        with Counted(world.size) as counted:
            batches = loader.batch(plan.at(step))
            parts.engine.forward_backward(batches, parts.count(sum(b.num_tokens for b in batches)), step)
            parts.store.gradient_norm()
            parts.store.step(1e-3)
    return counted.sent, counted.operations


def least(settings: dict[str, Any], ranks: int, parameters: int) -> float:
    """Bytes that a rank must send in one step."""
    ring, weights = (ranks - 1) / ranks, 4.0 * parameters
    micro_batches = BATCH // MICRO_BATCH
    activations = 4.0 * MICRO_BATCH * LENGTH * HIDDEN * micro_batches
    if settings.get("tensor", 1) > 1:  # one sum into and one out of attention and MLP, forward and backward
        return LAYERS * 4 * 2 * ring * activations
    if settings.get("context", 1) > 1:  # keys and values gathered, their gradients scattered; and all gradients summed
        return LAYERS * 2 * 2 * ring * activations + 2 * ring * weights
    if settings.get("pipeline", 1) > 1:  # the first stage sends forward, the last back
        return activations
    micro_batches //= ranks
    gathers = {0: 1, 1: 1, 2: 1, 3: 2 * micro_batches}[settings.get("zero", 0)]
    sums = {0: 1, 1: 1, 2: micro_batches, 3: micro_batches}[settings.get("zero", 0)]
    return ring * weights * (gathers + sums)


def main() -> None:
    """Count and print."""
    from castalia.config.derive import derive
    from castalia.model.size import model_size
    from castalia.tools.verify import layout_named, with_settings

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layouts", default="dp2,zero1,zero2,zero3,tp2,tp2sp,cp2,pp2")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    values = {
        "version": 1,
        "data": {"seq_length": LENGTH},
        "model": {
            "num_layers": LAYERS,
            "hidden_size": HIDDEN,
            "num_attention_heads": 4,
            "vocab_size": VOCABULARY,
        },
        "training": {"steps": 2, "batch_size": BATCH, "micro_batch_size": MICRO_BATCH},
    }
    with TemporaryDirectory() as folder:
        path = Path(folder) / "run.yml"
        path.write_text(json.dumps(values), encoding="utf-8")
        config = derive(load([path]))[0]
    parameters = model_size(config).total_parameters
    rows = []
    for name in args.layouts.split(","):
        processes, settings = layout_named(name)
        sent, operations = run_in_processes(processes, count, with_settings(config, settings))[0]
        minimum = least(settings, processes, parameters)
        rows.append(
            {"layout": name, "operations": operations, "bytes": sent, "least": minimum, "ratio": sent / minimum}
        )
    if args.json:
        print(json.dumps({"parameters": parameters, "rows": rows}))
        return
    print(f"{parameters:,} parameters, {BATCH // MICRO_BATCH} micro-batches of {MICRO_BATCH} x {LENGTH} tokens\n")
    print("| layout | operations | MB sent | least | ratio |\n|---|---|---|---|---|")
    for r in rows:
        megabytes = f"{r['bytes'] / 1e6:.2f} | {r['least'] / 1e6:.2f}"
        print(f"| {r['layout']} | {r['operations']} | {megabytes} | {r['ratio']:.3f} |")


if __name__ == "__main__":
    main()
