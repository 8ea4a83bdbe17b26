"""A configuration, a layout and a machine -> the seconds of a training step, by what they go into.

    each matrix product   max(FLOPs / rate, bytes / bandwidth)    roofline (Williams et al. 2009)
    attention             FLOPs / rate of a fused kernel
    everything else       bytes read and written / bandwidth
    exchanges             bytes / link + latency x hops
    pipeline              (M - 1) x slowest rank + one micro-batch through all, of which interleaving leaves a part

Assumed: on an accelerator FSDP2's gathers and scatters hide behind computing but for a tenth; sums of tensor and
context parallelism, of plain data parallelism and what a pipeline sends hide behind nothing, as Castalia waits for
them. On a CPU nothing hides. Starting an operation costs its time where kernels are shorter. Work is what a run
without compilation does, operation by operation (activation_memory.py); data loading, evaluation and saving are not
in it, nor what Muon, SOAP and their like compute in an update.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

from castalia.config import Config
from castalia.model.size import model_size
from castalia.parallel.activation_memory import Work
from castalia.parallel.layout import Layout, stages_of
from castalia.parallel.memory import MemoryModel, micro_batches, tokens
from castalia.parallel.state_memory import StateBytes
from castalia.tools.plan_machine import Machine

HIDDEN = 0.9
"""The share of a sharded exchange that may hide behind computing."""
PARTS = ("computing", "tensor", "context", "expert", "data", "pipeline", "bubble", "optimizer")


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step.

    Attributes:
        computing: forward and backward of the slowest rank, loss and recomputation included.
        tensor, context, expert, data, pipeline: waiting for exchanges along that axis; data is ZeRO's too.
        bubble: waiting for other stages.
        optimizer: the update, and offloading.
        tokens_per_second: over all devices.
        model_flops: FLOP/s of each device that count for the model: six for each weight and token, and attention.
    """

    computing: float
    tensor: float
    context: float
    expert: float
    data: float
    pipeline: float
    bubble: float
    optimizer: float
    tokens_per_second: float = 0.0
    model_flops: float = 0.0

    @property
    def total(self) -> float:
        """The whole step."""
        return sum(float(getattr(self, part)) for part in PARTS)


class TimeModel:
    """Predicts steps of one model on one machine.

    Args:
        config: complete.
        machine: a device is one rank's.
        memory: of the same configuration.
    """

    def __init__(self, config: Config, machine: Machine, memory: MemoryModel) -> None:
        self._machine, self._memory = machine, memory
        self._flops_per_token = model_size(config).flops_per_token
        self._layers: dict[Any, float] = {}
        self._passes: dict[Any, tuple[float, ...]] = {}
        self._experts = {layer: config.model.has_experts(layer) for layer in config.model.layer_order}

    def step(self, config: Config, layout: Layout) -> StepTime:
        """The step of a configuration with the settings of the layout."""
        count = micro_batches(config, layout)
        places = self._memory.places(config, layout)
        passes = {place: self._rank(config, layout, place) for place in places}
        slowest = max(passes, key=lambda place: sum(passes[place]))
        computing, tensor, context, expert, send = (count * part for part in passes[slowest])
        through = sum(alike * sum(passes[place]) for place, alike in places.items())
        cfg = config.parallel
        several = cfg.virtual_stages if cfg.schedule in ("interleaved", "zero_bubble") else 1
        waiting = (through - sum(passes[slowest])) / several
        bubble = waiting / 3 if cfg.schedule == "zero_bubble" else waiting
        state = self._memory.rules.worst(config, layout, slowest)
        data = self._data(config, layout, state, count, computing)
        update = self._update(config, layout, state, count)
        total = computing + tensor + context + expert + data + send + bubble + update
        seen = config.training.batch_size * config.data.seq_length / total
        return StepTime(
            computing,
            tensor,
            context,
            expert,
            data,
            send,
            bubble,
            update,
            seen,
            seen * self._flops_per_token / layout.world,
        )

    def _rank(self, config: Config, layout: Layout, stage_rank: int) -> tuple[float, ...]:
        """Of one rank and micro-batch: computing; tensor, context and expert exchanges; what it sends."""
        order = self._memory.order
        held = self._memory.rules.held(config, layout, stage_rank)
        layers = list(order) if layout.pipeline == 1 else [layer for stage in held for layer in stage]
        layers += [order[-1]] * config.model.mtp_depth
        first, last = stage_rank == 0, stage_rank == layout.pipeline - 1
        key = (
            *((self._memory.rules.alike[n], n % config.performance.recompute_every == 0) for n in layers),
            (config.performance.recompute, config.micro_batch_size, layout, first, last, stages_of(config)),
        )
        if key not in self._passes:
            self._passes[key] = self._pass(config, layout, layers, first, last, len(held))
        return self._passes[key]

    def _pass(
        self, config: Config, layout: Layout, layers: list[int], first: bool, last: bool, stages: int
    ) -> tuple[float, ...]:
        machine, cfg, t = self._machine, config.performance, layout.tensor
        here, hidden = tokens(config, layout), config.model.hidden_size
        computing = tensor = context = expert = 0.0
        low = 4 if config.training.precision == "fp32" else 2
        kv = 2 * config.micro_batch_size * config.data.seq_length * ceil(config.model.kv_heads / t)
        keys = kv * config.model.head_size * low
        routed = here * config.model.moe_top_k * hidden * low if config.model.moe_num_experts else 0
        for layer in layers:
            again = cfg.recompute if layer % cfg.recompute_every == 0 else "none"
            computing += self._layer(config, layout, layer, again)
            # Two sums out of matrices forward, two into them backward; forward's again where it is computed again.
            more = again != "none"
            tensor += (4 + 2 * more) * machine.exchange("all_reduce", t, 1, 4 * here * hidden)
            context += (2 + more) * machine.exchange("gather", layout.context, t, keys)
            if self._experts[layer] and layout.expert > 1:
                expert += (4 + 2 * more) * machine.exchange("gather", layout.expert, t * layout.context, routed)
        if first:
            computing += 3 * 4 * here * hidden / machine.bandwidth
            tensor += machine.exchange("all_reduce", t, 1, 4 * here * hidden)
        if last:
            losses = 1 + config.model.mtp_depth
            computing += losses * self._loss(config, layout)
            chunks = -(-here // config.loss.chunk_size)
            tensor += losses * machine.exchange("all_reduce", t, 1, 4 * here * hidden)
            tensor += losses * machine.exchange("all_reduce", t, 1, 12 * here, 2 * chunks)
        share = t if layout.sequence else 1
        apart = layout.world // layout.pipeline
        crossings = (stages - first) + (stages - last)
        send = crossings * machine.exchange("send", layout.pipeline, apart, 4 * here * hidden / share)
        return computing, tensor, context, expert, send

    def _layer(self, config: Config, layout: Layout, layer: int, again: str) -> float:
        kind = self._memory.rules.alike[layer]
        key = (kind, again, layout.tensor, layout.sequence, config.micro_batch_size, layout.context)
        if key not in self._layers:
            pair = self._memory.pieces.layer(kind, again, layout.tensor, layout.sequence)
            piece = pair.at(config.micro_batch_size / layout.context)
            precision = config.training.precision
            self._layers[key] = self.seconds(piece.forward, precision) + self.seconds(piece.backward, precision)
        return self._layers[key]

    def seconds(self, work: Work, precision: str) -> float:
        """Of some operations, one after the other."""
        machine = self._machine
        rate, bandwidth = machine.rate(precision), machine.bandwidth
        products = sum(max(flops / rate, (w + x) / bandwidth) for flops, w, x in work.products)
        attention = machine.rate("bf16" if precision == "fp8" else precision) / machine.achieved.matmul
        total = products + work.attention / (attention * machine.achieved.attention) + work.moved / bandwidth
        started = work.operations * machine.operation_seconds
        return max(total, started) if machine.kind == "accelerator" else total + started

    def _loss(self, config: Config, layout: Layout) -> float:
        """Three products of the output matrix's size, and passes over the logits."""
        machine, here = self._machine, tokens(config, layout)
        rows = (config.model.vocab_size or 0) / layout.tensor
        precision = "bf16" if config.training.precision == "fp8" else config.training.precision
        width = 4 if precision == "fp32" else 2
        # On an accelerator their largest, difference, exponential and sum are passes over memory, in fp32.
        passes = 6 * width + (20 if machine.kind == "accelerator" else 8)
        return 6 * here * rows * config.model.hidden_size / machine.rate(precision) + (
            here * rows * passes / machine.bandwidth
        )

    def _data(self, config: Config, layout: Layout, state: StateBytes, count: int, computing: float) -> float:
        """Waiting for sums of gradients and for gathered weights."""
        machine, stride = self._machine, layout.tensor
        together = layout.shard * layout.context
        layers = config.model.num_layers // layout.pipeline + 2
        if not layout.zero:
            return machine.exchange("all_reduce", layout.data * layout.context, stride, state.gradients)
        gathers, sums = {1: (1, 1), 2: (1, count), 3: (2 * count, count)}[layout.zero]
        if layout.pipeline > 1:  # each micro-batch gathers and scatters by itself
            gathers, sums = max(gathers, count), count
        gathered = gathers * machine.exchange("gather", together, stride, state.gathered, layers)
        summed = machine.exchange("gather", together, stride, 4 * state.elements, layers)
        if layout.replicate > 1:
            summed += machine.exchange(
                "all_reduce", layout.replicate, stride * together, 4 * state.elements / together, layers
            )
        waiting = gathered + sums * summed
        if machine.kind == "cpu":
            return waiting
        return max(waiting - HIDDEN * computing, (1 - HIDDEN) * waiting)

    def _update(self, config: Config, layout: Layout, state: StateBytes, count: int) -> float:
        """The optimizer's passes over its state, and what offloading moves over the host's link."""
        machine, kind = self._machine, self._memory.offloads(config)
        passes = 2 * state.parameters + 3 * state.gradients + 2 * state.optimizer + state.copies
        if kind == "none":
            return passes / machine.bandwidth
        shared = machine.host.memory_bandwidth / machine.devices_per_node
        moved = state.parameters + state.gradients
        if kind == "parameters":  # fetched for forward and for backward, gradients sent, of each micro-batch
            moved = count * (2 * state.parameters + state.gradients)
        return passes / shared + moved / machine.host.link
