"""A configuration and a number of processes -> one step of some of their ranks, without the processes.

    config ─check─> layout ─each rank─> assemble ─> forward, backward, norm, update ─> traffic, memory
                              (parallel/rehearsal.py: no data, no other process, no weights in memory)

What runs is what trains: the same assembly, engine, schedules and stores. So a layout that cannot be built says
so here, with the rank that could not, and the traffic is counted as it is issued, not reckoned. A step of many
micro-batches repeats itself: it is traced with a few and with some more, and the difference is one micro-batch's
share, times those left out (exactly so: tests compare it with real processes). Times are not known.
Memory is of tensors with a CPU's kernels; a device's attention may keep less.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from castalia.config import Config
from castalia.data.loader import Batch
from castalia.errors import UserError
from castalia.parallel.layout import AXES, Layout, layout_of
from castalia.parallel.parallelize import check_model, local_part
from castalia.parallel.rehearsal import Exchange, Rehearsal, Traffic, rehearsed
from castalia.parallel.stages import SCHEDULES
from castalia.train.assemble import Assembled, assemble

NAMES = {"pipeline": "pipeline", "replicate": "data", "shard": "data", "context": "context", "tensor": "tensor"}


@dataclass(frozen=True)
class Rehearsed:
    """What one rank did in its step.

    Attributes:
        rank: its number.
        where: its place along each axis of the layout.
        parameters: that it holds.
        state_bytes: alive between steps: weights, optimizer state, kept buffers.
        peak_bytes: the most that were alive within the step.
        traffic: what it exchanged.
        micro_batches, traced: of the step, and the most that were traced at once.
        seconds: that the rehearsal took.
    """

    rank: int
    where: dict[str, int]
    parameters: int
    state_bytes: int
    peak_bytes: int
    traffic: dict[Exchange, Traffic]
    micro_batches: int
    traced: int
    seconds: float


def rehearse(config: Config, world: int, ranks: Sequence[int] | None = None) -> tuple[Layout, list[Rehearsed]]:
    """Trace one step of some ranks of a job.

    Args:
        config: complete (derived), with the vocabulary.
        world: processes of the job.
        ranks: which; None: the first, the last, and the first of each stage of the pipeline.

    Raises:
        UserError: the job cannot have this layout; the sentence names the rank, if it is one's.
    """
    if world < 2:
        raise UserError("--rehearse: a single process speaks to nobody; give the processes of the job as --world 1024")
    if config.model.moe_num_experts:
        raise UserError(
            "--rehearse cannot follow model.moe_num_experts: which rank gets which token is decided by the "
            "router's numbers, and a rehearsal has none"
        )
    if config.parallel.layout == "auto":
        raise UserError("--rehearse: parallel.layout auto is chosen where the run starts: give the sizes of parallel:")
    layout = layout_of(config.parallel, world)
    check_model(config, layout)
    wanted = default_ranks(layout) if ranks is None else list(dict.fromkeys(ranks))
    for rank in wanted:
        if not 0 <= rank < world:
            raise UserError(f"--ranks: {rank} is none of the ranks 0 to {world - 1} of --world {world}")
    return layout, [_rehearse(config, layout, rank) for rank in wanted]


def default_ranks(layout: Layout) -> list[int]:
    """The first rank of each stage of the pipeline, and the last rank."""
    each = layout.world // layout.pipeline
    return list(dict.fromkeys([*range(0, layout.world, each), layout.world - 1]))


def _rehearse(config: Config, layout: Layout, rank: int) -> Rehearsed:
    began = time.perf_counter()
    shape = (config.micro_batch_size, config.data.seq_length, config.model.hidden_size)
    eager = config.performance.model_copy(update={"compile": False})  # a compiler changes no traffic
    config = config.model_copy(update={"performance": eager})
    where = layout.coordinate(rank)
    count = config.training.batch_size // (config.micro_batch_size * layout.data)
    sizes = traced_sizes(config, layout, count)
    try:
        with rehearsed(rank, layout, shape) as here:
            parts = assemble(config, here.mesh)
            seen = [step(config, parts, here, size) for size in sizes]
            parameters = sum(local_part(p).numel() for p in parts.model.parameters())
            del parts
    except UserError as error:
        raise UserError(f"rank {rank} of {layout.world} ({place_text(layout, where)}): {error}") from error
    except Exception as error:
        error.add_note(f"while rank {rank} of {layout.world} ({place_text(layout, where)}) was rehearsed")
        raise
    (few, low, _), (more, high, state) = seen[0], seen[-1]
    times = (count - sizes[-1]) / max(sizes[-1] - sizes[0], 1)
    grows = config.parallel.schedule == "gpipe" and layout.pipeline > 1  # the others keep only so many at a time
    peak = high + round((high - low) * times) if grows else high
    traffic = {what: extended(few.get(what, Traffic()), there, times) for what, there in more.items()}
    return Rehearsed(rank, where, parameters, state, peak, traffic, count, sizes[-1], time.perf_counter() - began)


def traced_sizes(config: Config, layout: Layout, count: int) -> list[int]:
    """Numbers of micro-batches that tell all of a step of `count`: from the last on, each more adds the same."""
    stages = layout.pipeline
    if stages == 1:
        few, more = 1, 2
    elif SCHEDULES[config.parallel.schedule][1]:  # several stages on a rank: rounds of as many as there are ranks
        few, more = stages, 2 * stages
    else:
        few, more = stages, stages + 1
    return [few, more] if count > more else [count]


def extended(few: Traffic, more: Traffic, times: float) -> Traffic:
    """`more`, and `times` what it has beyond `few`."""

    def end(name: str) -> float:
        low, high = getattr(few, name), getattr(more, name)
        return float(high + (high - low) * times)

    return Traffic(round(end("operations")), round(end("bytes")), end("sent"))


def step(
    config: Config, parts: Assembled, here: Rehearsal, micro_batches: int
) -> tuple[dict[Exchange, Traffic], int, int]:
    """One step of so many micro-batches: its traffic, the most bytes alive within it, and those before it."""
    batches = [empty_batch(config) for _ in range(micro_batches)]
    here.begin()
    state = here.alive
    parts.engine.forward_backward(batches, parts.count(sum(b.num_tokens for b in batches)), 0)
    norm = parts.store.gradient_norm()
    clip = config.optimizer.clip_grad
    parts.store.step(1e-3, (norm + 1e-6) / clip if clip else None)
    parts.engine.updated()
    return dict(here.traffic), here.peak, state


def empty_batch(config: Config) -> Batch:
    """A micro-batch of nothing in particular."""
    shape = (config.micro_batch_size, config.data.seq_length)
    tokens, labels, positions = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    return Batch(tokens, labels, positions, sample_ids=torch.zeros(shape[0], dtype=torch.int64))


def place_text(layout: Layout, where: dict[str, int]) -> str:
    """Where a rank stands, in words."""
    sizes = dict(zip(AXES, layout.sizes, strict=True))
    parts = [f"{axis} {where[axis]} of {size}" for axis, size in sizes.items() if size > 1]
    return ", ".join(parts) or "alone"


def group_name(layout: Layout, ranks: Sequence[int]) -> str:
    """Along which axes the ranks of a group differ: `data`, `tensor`, `data + context`, ..."""
    places = [layout.coordinate(rank) for rank in (ranks[0], ranks[-1])]
    axes = [axis for axis in AXES if any(place[axis] != places[0][axis] for place in places)]
    if len(ranks) == layout.world and len(axes) > 1:
        return "all"
    if axes == ["pipeline"] and len(ranks) == 2 < layout.pipeline:
        return "ends of the pipeline"
    return " + ".join(dict.fromkeys(NAMES[axis] for axis in axes)) or "alone"


def as_dict(layout: Layout, done: Sequence[Rehearsed]) -> dict[str, Any]:
    """For `--json`."""
    return {
        "world": layout.world,
        "layout": str(layout),
        "ranks": [
            {
                "rank": r.rank,
                "place": r.where,
                "parameters": r.parameters,
                "state_bytes": r.state_bytes,
                "peak_bytes": r.peak_bytes,
                "sent_bytes": round(sum(t.sent for t in r.traffic.values())),
                "micro_batches": r.micro_batches,
                "traced_micro_batches": r.traced,
                "seconds": round(r.seconds, 3),
                "collectives": [
                    {
                        "kind": e.kind,
                        "group": group_name(layout, e.ranks),
                        "size": len(e.ranks),
                        "dtype": e.dtype,
                        "operations": t.operations,
                        "bytes": t.bytes,
                        "sent_bytes": round(t.sent),
                    }
                    for e, t in r.traffic.items()
                ],
            }
            for r in done
        ],
    }


def lines(layout: Layout, done: Sequence[Rehearsed]) -> list[str]:
    """For the terminal."""
    out = [f"rehearsed on {layout.world:,} processes: {layout}"]
    head = ("operation", "among", "ranks", "dtype", "times", "GB each step", "sent")
    for r in done:
        sent = sum(t.sent for t in r.traffic.values())
        out += [
            "",
            f"rank {r.rank} ({place_text(layout, r.where)}): {r.parameters:,} parameters",
            f"  {r.state_bytes / 1e9:,.2f} GB between steps, {r.peak_bytes / 1e9:,.2f} GB at most within",
            f"  sends {sent / 1e9:,.3f} GB in a step of {r.micro_batches} micro-batches "
            f"(at most {r.traced} traced together, {r.seconds:.1f} s)",
            "  {:<15} {:<22} {:>6} {:<9} {:>7} {:>13} {:>10}".format(*head),
        ]
        for e, t in sorted(r.traffic.items(), key=lambda pair: -pair[1].sent):
            out.append(
                f"  {e.kind:<15} {group_name(layout, e.ranks):<22} {len(e.ranks):>6,} {e.dtype:<9} "
                f"{t.operations:>7,} {t.bytes / 1e9:>13,.6f} {t.sent / 1e9:>10,.6f}"
            )
    return out
