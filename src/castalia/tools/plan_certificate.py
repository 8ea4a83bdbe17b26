"""What `castalia plan` predicts against what really is: bytes of state, peak of activations, seconds of a step.

    eight layouts in worlds of 2, 4 and 8 ─every rank─> weights, gradients, optimizer ──must be equal──> table
    eight runs of this machine ─┬─ storages alive in a step, at most ──beside the prediction──> table of errors
                                └─ seconds of a step ─────────────────────^

Shapes of the first are chosen so that nothing divides evenly. Storages are counted as the second step makes them; what
FSDP2 gathers it keeps in storages that change their size, so that the runs of the second table are without ZeRO.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from castalia.config import Config
from castalia.config.derive import derive
from castalia.config.load import from_yaml
from castalia.errors import CheckFailed
from castalia.parallel.testing import run_in_processes
from castalia.parallel.world import World
from castalia.tools.plan_machine import Machine

STATES: dict[str, tuple[int, dict[str, Any], tuple[str, ...]]] = {
    "ZeRO 1": (2, {"zero": 1}, ()),
    "tensor 2, sequence, bf16": (2, {"tensor": 2, "sequence": True}, ("training.precision=bf16",)),
    "pipeline 2, tied embeddings": (2, {"pipeline": 2}, ("model.tie_embeddings=true",)),
    "ZeRO 3 over 2 of 4, AdamW of 8 bits": (4, {"zero": 3, "shard": 2}, ("optimizer.type=adamw_8bit",)),
    "ZeRO 2, context 2, mean of the weights": (4, {"zero": 2, "context": 2}, ("optimizer.average=0.9",)),
    "experts 2, tensor 2, Lion": (4, {"expert": 2, "tensor": 2}, ("model.moe_num_experts=3", "optimizer.type=lion")),
    "ZeRO 3, tensor 2, pipeline 2, bf16": (
        8,
        {"zero": 3, "tensor": 2, "pipeline": 2},
        ("training.precision=bf16",),
    ),
    "tensor 2, pipeline 2, data 2, SOAP": (8, {"tensor": 2, "pipeline": 2}, ("optimizer.type=soap",)),
}
"""Name -> processes, settings of `parallel:`, and of the run."""

_UNEVEN = {
    "data.seq_length": 32,
    "model.num_layers": 5,
    "model.hidden_size": 48,
    "model.num_attention_heads": 4,
    "model.num_kv_heads": 2,
    "model.intermediate_size": 101,
    "model.vocab_size": 259,
    "training.batch_size": 8,
    "training.micro_batch_size": 1,
    "training.steps": 3,
}
_MEASURED = {
    "data.seq_length": 256,
    "model.num_layers": 6,
    "model.hidden_size": 256,
    "model.num_attention_heads": 8,
    "model.vocab_size": 4096,
    "training.batch_size": 8,
    "training.micro_batch_size": 4,
    "training.steps": 3,
}
_BF16 = "training.precision=bf16"
_LLAMA = ("model.num_kv_heads=2", "model.activation=swiglu", "model.norm=rmsnorm", "model.attention_bias=false")
RUNS: dict[str, tuple[int, dict[str, Any], tuple[str, ...]]] = {
    "one process": (1, {}, ()),
    "one process, bf16, grouped keys, swiglu": (1, {}, (_BF16, *_LLAMA)),
    "recompute full": (1, {}, ("performance.recompute=full", "model.num_layers=12")),
    "recompute selective, sequences of 512": (1, {}, ("performance.recompute=selective", "data.seq_length=512")),
    "data 2": (2, {}, ()),
    "tensor 2, sequence": (2, {"tensor": 2, "sequence": True}, ()),
    "context 2": (2, {"context": 2}, _LLAMA),
    "pipeline 2, 1f1b": (2, {"pipeline": 2}, ("training.micro_batch_size=2",)),
}
MEMORY_AIM, TIME_AIM = 0.10, 0.25
_ENOUGH = 20.0  # seconds of steps


def small_config(values: dict[str, Any], parallel: dict[str, Any], overrides: tuple[str, ...] = ()) -> Config:
    """A complete configuration of keys and values."""
    from castalia.config.yaml12 import parse_value

    keys = values | {f"parallel.{k}": v for k, v in parallel.items()}
    keys |= {key: parse_value(value) for key, value in (text.split("=", 1) for text in overrides)}
    tree: dict[str, Any] = {}
    for key, value in keys.items():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = value
    return derive(from_yaml(json.dumps(tree), "<certificate>"))[0]


def batches_of(config: Config, mesh: Any) -> Any:
    """The rank's micro-batches of a step of invented text: step -> list."""
    from castalia.data.loader import Loader, Shard
    from castalia.data.plan import RunPlan
    from castalia.tools.verify import InventedText

    length, vocab = config.data.seq_length, config.model.vocab_size or 2
    plan = RunPlan(config.training.batch_size, length, 1 << 20)
    shard = Shard(mesh.data_rank, mesh.layout.data)
    text: Any = InventedText(length, vocab)
    loader = Loader(text, plan, shard, config.micro_batch_size, 0)
    return lambda step: loader.batch(plan.at(step))


def held_states(world: World, configs: Sequence[Config]) -> list[tuple[int, int, int]]:
    """In each process, one configuration after the other; see held_state."""
    return [held_state(world, config) for config in configs]


def held_state(world: World, config: Config) -> tuple[int, int, int]:
    """In each process: bytes of weights, of gradients before an update, of optimizer state after it."""
    import torch

    from castalia.parallel.layout import layout_of
    from castalia.parallel.mesh import Mesh
    from castalia.parallel.parallelize import local_part
    from castalia.train.assemble import assemble

    mesh = Mesh(layout_of(config.parallel, world.size), world)
    parts = assemble(config, mesh)
    batches = batches_of(config, mesh)(0)
    parts.engine.forward_backward(batches, parts.count(sum(b.num_tokens for b in batches)), 0)
    gradients = _bytes(parts.store.gradients().values())
    parts.store.step(1e-3)
    states = [
        value for state in parts.store.optimizer.state.values() for name, value in state.items() if name != "step"
    ]
    tensors = [t for value in states for t in (value if isinstance(value, tuple) else (value,))]
    weights = [local_part(p) for p in parts.model.parameters()]
    return _bytes(weights), gradients, _bytes(t for t in tensors if isinstance(t, torch.Tensor) and t.numel() > 1)


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def compare_states(names: Sequence[str]) -> dict[str, list[tuple[tuple[int, int, int], tuple[int, int, int]]]]:
    """(predicted, held) of weights, gradients and optimizer state, of every rank of some of STATES of one world."""
    from castalia.parallel.layout import layout_of
    from castalia.parallel.state_memory import StateRules

    processes = STATES[names[0]][0]
    configs = [small_config(_UNEVEN, *STATES[name][1:]) for name in names]
    held = run_in_processes(processes, held_states, configs, timeout=300.0)
    out = {}
    for number, (name, config) in enumerate(zip(names, configs, strict=True)):
        layout, rules = layout_of(config.parallel, processes), StateRules(config)
        states = [rules.of_rank(config, layout, layout.coordinate(rank)) for rank in range(processes)]
        predicted = [(state.parameters, state.gradients, state.optimizer) for state in states]
        out[name] = list(zip(predicted, [one[number] for one in held], strict=True))
    return out


def run_watched(world: World, config: Config, threads: int, steps: int) -> tuple[int, float]:
    """In each process: the most bytes that a step makes alive beside the state, and its median seconds."""
    import torch

    from castalia.parallel.activation_memory import Watch
    from castalia.parallel.layout import layout_of
    from castalia.parallel.mesh import Mesh
    from castalia.train.assemble import assemble

    torch.set_num_threads(threads)
    mesh = Mesh(layout_of(config.parallel, world.size), world)
    parts = assemble(config, mesh)
    batches = batches_of(config, mesh)
    mine = batches(0)
    tokens = parts.count(sum(b.num_tokens for b in mine))

    def step(number: int) -> None:
        parts.engine.forward_backward(mine, tokens, number)
        parts.store.gradient_norm()
        parts.store.step(1e-4)

    step(0)
    outside = [*parts.model.parameters(), *parts.store.gradient_buffers(), *parts.store.working().values()]
    arena = _arena(parts.store)
    with Watch([t for t in (*outside, *arena) if t is not None]) as watch:
        parts.engine.forward_backward(mine, tokens, 1)
        parts.store.discard()
        watch.peak = watch.now  # what exchanges keep for good is alive now
        parts.engine.forward_backward(mine, tokens, 1)
        peak = watch.peak
        parts.store.discard()
    seconds = []
    for number in range(steps):
        start = time.perf_counter()
        step(number + 2)
        seconds.append(time.perf_counter() - start)
        # Every rank leaves after the same step.
        if number >= 4 and mesh.from_first(sum(seconds) > _ENOUGH):
            break
    return peak, statistics.median(seconds) if seconds else 0.0


def _arena(store: Any) -> list[Any]:
    """The flat buffers of an arena, which no list of parameters names."""
    inner = getattr(store, "inner", store)
    segments = getattr(inner, "_segments", [])
    return [t for s in segments for t in (s.master, s.gradient, s.copy)]


def predicted_run(name: str, machine: Machine | None) -> tuple[int, float]:
    """Bytes beside the state, and seconds, as `castalia plan` predicts one of RUNS."""
    from castalia.parallel.layout import layout_of
    from castalia.parallel.memory import MemoryModel
    from castalia.tools.plan_time import TimeModel

    processes, parallel, overrides = RUNS[name]
    config = small_config(_MEASURED, parallel, overrides)
    layout, model = layout_of(config.parallel, processes), MemoryModel(config, accelerator=False)
    memory = model.worst(config, layout)
    beside = memory.activations + memory.buffers
    if not model.arena(config, layout):  # gradients come and go, and casts of the weights too
        beside += memory.gradients + memory.copies
    if machine is None:
        return beside, 0.0
    return beside, TimeModel(config, machine.shared(processes), model).step(config, layout).total


def measured_run(name: str, threads: int, steps: int) -> tuple[int, float]:
    """The same, measured: the largest of the ranks."""
    processes, parallel, overrides = RUNS[name]
    config = small_config(_MEASURED, parallel, overrides)
    each = max(threads // processes, 1)
    found = run_in_processes(processes, run_watched, config, each, steps, joined=processes > 1, timeout=300.0)
    return max(peak for peak, _ in found), max(seconds for _, seconds in found)


def certify_plan(folder: Path, steps: int = 15) -> str:
    """Predicted bytes of weights, gradients and optimizer state are those held; activations and time within aims.

    Raises:
        CheckFailed: a byte of the state differs.
    """
    from castalia.tools.certify import table
    from castalia.tools.plan_measure import measure

    rows: list[tuple[str, ...]] = []
    for name, (processes, _, _) in STATES.items():
        pairs = compare_states([name])[name]
        for rank, (predicted, held) in enumerate(pairs):
            if predicted != held:
                raise CheckFailed(
                    f"{name}, rank {rank}: predicted {predicted}, held {held} (weights, gradients, moments)"
                )
        worst = max((held for _, held in pairs), key=sum)
        least = min((held for _, held in pairs), key=sum)
        rows.append((name, str(processes), *(f"{n:,}" for n in worst), f"{sum(least):,}"))
        print(name, worst, file=sys.stderr, flush=True)
    head = ("layout", "processes", "weights", "gradients", "optimizer", "in all, on the rank with least")
    said = "Bytes of the fullest rank; on every rank the predicted and the held ones are equal.\n\n" + table(head, rows)
    machine = Machine.model_validate(measure())
    lines: list[tuple[str, ...]] = []
    for name in RUNS:
        bytes_predicted, time_predicted = predicted_run(name, machine)
        bytes_measured, time_measured = measured_run(name, machine.devices_per_node, steps)
        errors = (bytes_predicted / bytes_measured - 1, time_predicted / time_measured - 1)
        mib = (f"{n / 2**20:,.1f}" for n in (bytes_predicted, bytes_measured))
        ms = (f"{1000 * t:,.0f}" for t in (time_predicted, time_measured))
        lines.append((name, *mib, f"{100 * errors[0]:+.1f} %", *ms, f"{100 * errors[1]:+.1f} %"))
        print(*lines[-1], file=sys.stderr, flush=True)
    heads = ("run", "MiB predicted", "measured", "error", "ms predicted", "measured", "error")
    aims = f"Aims: {MEMORY_AIM:.0%} of memory, {TIME_AIM:.0%} of time, on a machine that does nothing else.\n\n"
    said += (
        "\nPeak of what a step allocates beside its state, and its time, on this machine. " + aims + table(heads, lines)
    )
    return f"{said}\n{machine.name}: {json.dumps(machine.model_dump(exclude={'version', 'name'}))}\n"
