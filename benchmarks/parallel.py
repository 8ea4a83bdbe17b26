"""What a layout costs: bytes that each rank sends per step, and with --pairs its time beside the bare model's.

    python benchmarks/parallel.py [--layouts dp2,zero1,zero3,tp2,tp2sp,cp2,pp2] [--json]
    python benchmarks/parallel.py --pairs 30 [--hidden 256] [--json]

    one training step in gloo processes ──every operation of torch.distributed──> bytes sent by rank 0
    bare step | wrapped step | wrapped | bare | ...  ──ratios of neighbours──> median, bootstrap interval

Counted are the operations as they are issued, each with the bytes that a ring sends: 2 (n-1)/n of the
tensor for an all-reduce, (n-1)/n for an all-gather, a reduce-scatter or an all-to-all, all of it for a
send. The least is that of gradients
and weights (data parallelism, ZeRO) or of activations (the others), in fp32; what is beyond it are losses,
norms, counts of tokens, and of tensor parallelism the embedding and the vocabulary's loss.

Timed are whole steps, each wrapper in turns with the bare model in the same processes (forward, chunked loss,
backward, clipping, torch's fused AdamW, nothing else), one thread each. On two processes the bare model does half
of the batch in each, both at once: 1.00 would be a layout whose exchange costs nothing. Memory's bandwidth and
the exchange by gloo through this machine's memory are in it; a network's speed is not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from castalia.config import Config, load
from castalia.parallel.rehearsal import Counted
from castalia.parallel.testing import run_in_processes
from castalia.parallel.world import World

LAYERS, HIDDEN, VOCABULARY, LENGTH, BATCH, MICRO_BATCH = 4, 128, 512, 128, 8, 2


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
        with Counted() as counted:
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


ALONE = ("engine", "dp1", "zero1", "zero2", "zero3")
"""Wrappers that do something on one process too: the engine and the arena alone, with a mesh, and ZeRO by FSDP2."""


def bare_step(config: Config, share: int) -> Callable[[], None]:
    """A step of the model by itself on `1 / share` of the batch, in micro-batches as the configuration says."""
    from castalia.model.loss import loss_sums
    from castalia.model.transformer import build_model

    model = build_model(config.model, 1, "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batches = invented(config)[: config.training.batch_size // config.micro_batch_size // share]
    tokens = sum(labels.numel() for _, labels in batches)

    def step() -> None:
        for inputs, labels in batches:
            sums = loss_sums(model(inputs), model.head_weight, labels, scale=1 / tokens)
            sums.scaled.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def invented(config: Config) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Micro-batches of random tokens and labels."""
    draw = torch.Generator().manual_seed(0)
    shape = (config.training.batch_size, config.data.seq_length + 1)
    ids = torch.randint(0, VOCABULARY, shape, generator=draw).split(config.micro_batch_size)
    return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in ids]


def wrapped_step(world: World, config: Config, forced: bool) -> Callable[[], None]:
    """The same step as `castalia train` makes it in a layout, without reading and logging.

    Args:
        forced: on one process, wrap the model for several all the same.
    """
    from castalia.data.loader import Batch
    from castalia.parallel.layout import AXES, layout_of
    from castalia.parallel.mesh import Mesh
    from castalia.parallel.parallelize import parallelize
    from castalia.train.assemble import Assembled, assemble
    from castalia.train.engine import LocalEngine

    mesh = Mesh(layout_of(config.parallel, world.size), world)
    if forced:
        mesh._all = torch.distributed.init_device_mesh("cpu", (1,) * len(AXES), mesh_dim_names=AXES)
        inner = parallelize(config, mesh)
        engine = LocalEngine(inner.model, inner.store, config.loss, mesh=mesh)
        mesh._all = None
        parts = Assembled(mesh, inner.model, inner.store, engine, inner.places)
    else:
        parts = assemble(config, mesh)
    rows = []
    for first, (x, y) in enumerate(invented(config)):
        positions = torch.arange(config.data.seq_length).expand(len(x), -1)
        numbers = first * config.micro_batch_size + torch.arange(len(x))
        rows.append(Batch(x, y, positions, sample_ids=numbers))
    each = len(rows) // mesh.layout.data
    mine = rows[mesh.data_rank * each : (mesh.data_rank + 1) * each]
    number = 0

    def step() -> None:
        nonlocal number
        tokens = parts.count(sum(batch.num_tokens for batch in mine))
        parts.engine.forward_backward(mine, tokens, number)
        norm = parts.store.gradient_norm()
        parts.store.step(1e-3, norm + 1e-6 if norm > 1 else None)
        number += 1

    return step


def pair_times(world: World, config: Config, forced: bool, pairs: int) -> list[tuple[float, float]]:
    """In each process: seconds of bare and wrapped steps in turns, from when all begin to when all have ended."""
    import torch.distributed as dist

    if forced:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    steps = bare_step(config, world.size), wrapped_step(world, config, forced)

    def timed(step: Callable[[], None]) -> float:
        if world.size > 1:
            dist.barrier()
        began = time.perf_counter()
        step()
        if world.size > 1:
            dist.barrier()
        return time.perf_counter() - began

    out = []
    for number in range(pairs + 2):
        order = (0, 1) if number % 2 else (1, 0)  # whoever is first may have it easier
        seconds = {which: timed(steps[which]) for which in order}
        out.append((seconds[0], seconds[1]))
    return out[2:]  # the first steps make what later ones use again


def overheads(config: Config, layouts: list[str], pairs: int) -> list[dict[str, Any]]:
    """Each wrapper's time over the bare model's, on one process and on two."""
    from train import bootstrap

    from castalia.tools.verify import layout_named, with_settings

    wanted = [(name, 1, {"zero": int(name[-1])} if name.startswith("zero") else {}) for name in ALONE]
    wanted += [(name, *layout_named(name)) for name in layouts]
    rows = []
    for name, processes, settings in wanted:
        forced = processes == 1 and name != "engine"
        spread = with_settings(config, settings)
        times = run_in_processes(processes, pair_times, spread, forced, pairs, timeout=3600, joined=processes > 1)[0]
        ratio, low, high = bootstrap([wrapped / bare for bare, wrapped in times])
        bare = statistics.median(bare for bare, _ in times)
        rows.append({"layout": name, "processes": processes, "ratio": ratio, "low": low, "high": high, "bare": bare})
    return rows


def main() -> None:
    """Count and print."""
    from castalia.config.derive import derive
    from castalia.model.size import model_size
    from castalia.tools.verify import layout_named, with_settings

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layouts", default="dp2,zero1,zero2,zero3,tp2,tp2sp,cp2,pp2")
    parser.add_argument("--pairs", type=int, help="time so many pairs of steps for each wrapper, instead of counting")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size of the model that is timed (default 256)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    values = {
        "version": 1,
        "data": {"seq_length": LENGTH},
        "model": {
            "num_layers": LAYERS,
            "hidden_size": args.hidden if args.pairs else HIDDEN,
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
    if args.pairs:
        timed = overheads(config, args.layouts.split(","), args.pairs)
        if args.json:
            print(json.dumps({"parameters": parameters, "pairs": args.pairs, "rows": timed}))
            return
        print(f"{parameters:,} parameters, {BATCH} x {LENGTH} tokens, {args.pairs} pairs, one thread a process\n")
        print("| layout | processes | bare step, ms | time / bare | 95 % |\n|---|---|---|---|---|")
        for r in timed:
            what = f"{1000 * r['bare']:.0f} | {r['ratio']:.2f} | {r['low']:.2f} to {r['high']:.2f}"
            print(f"| {r['layout']} | {r['processes']} | {what} |")
        return
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
