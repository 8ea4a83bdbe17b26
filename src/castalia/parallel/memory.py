"""A configuration and a layout -> the bytes that the fullest rank needs, by what they are for.

    state_memory ──exact──> weights, gradients, optimizer, copies ─┐
    activation_memory ──layers in flight, recomputation, loss──────┼─> Memory of each stage's rank ─> the largest
    what FSDP2, a pipeline and sums over ranks allocate ───────────┘

Looked at are the loss of the last micro-batch in flight, the backward pass of the last layer with all activations
alive, that of the first with nearly all fresh gradients alive, and the end, when only these are. Allocators' rounding
and fragmentation, the libraries' workspaces and the first step's learning of shapes are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

from castalia.config import Config
from castalia.model.loss import _SCRATCH_ELEMENTS
from castalia.optim.optimizers import optimizer_kind
from castalia.optim.weights import working_dtype
from castalia.parallel.activation_memory import Pieces
from castalia.parallel.layout import Layout, stages_of
from castalia.parallel.state_memory import StateBytes, StateRules
from castalia.parallel.store import BUCKET

KINDS = ("parameters", "gradients", "optimizer", "copies", "gathered", "activations", "buffers")


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank's device at the fullest moment of a step, and of its host.

    Attributes:
        parameters, gradients, optimizer: exact, where they live on the device.
        copies: 16-bit copies of matrices.
        gathered: weights and gradients that ZeRO holds whole for a while.
        activations: what is kept for backward passes, and the most that a pass needs besides.
        buffers: of exchanges between ranks.
        host: what offloading puts into the host's memory.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    copies: int = 0
    gathered: int = 0
    activations: int = 0
    buffers: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """On the device."""
        return sum(int(getattr(self, kind)) for kind in KINDS)


class MemoryModel:
    """Reckons the memory of any layout of one model.

    Args:
        config: complete (derived), with the vocabulary; of `parallel:`, `performance:` and
            training.micro_batch_size nothing is kept.
        accelerator: the device is one, with a memory beside the host's; else a CPU.
    """

    def __init__(self, config: Config, accelerator: bool) -> None:
        self.rules, self.pieces = StateRules(config), Pieces(config, accelerator)
        self.accelerator = accelerator
        self._elementwise = optimizer_kind(config.optimizer).elementwise
        self._low = working_dtype(config.training.precision) is not None
        self._sums: dict[Any, tuple[float, float, float]] = {}
        self._places: dict[Any, dict[int, int]] = {}
        self.order = config.model.layer_order

    def worst(self, config: Config, layout: Layout) -> Memory:
        """The memory of the rank that needs most; `config` has the settings of the layout."""
        return max((self.of_stage(config, layout, p) for p in self.places(config, layout)), key=lambda m: m.total)

    def places(self, config: Config, layout: Layout) -> dict[int, int]:
        """Places of the pipeline that differ by their layers, the earliest of each kind -> how many there are."""
        key = (stages_of(config), config.parallel.partition, layout.pipeline)
        if key not in self._places:
            kinds: dict[Any, int] = {}
            found: dict[int, int] = {}
            for place in range(layout.pipeline):
                held = self.rules.held(config, layout, place)
                alike = tuple(tuple(self.rules.alike[layer] for layer in stage) for stage in held)
                again = config.performance.recompute_every
                numbers = held if again > 1 else None
                kind = (place == 0, place == layout.pipeline - 1, alike, str(numbers))
                first = kinds.setdefault(kind, place)
                found[first] = found.get(first, 0) + 1
            self._places[key] = found
        return self._places[key]

    def least(self, config: Config, layout: Layout) -> int:
        """Bytes that the layout needs whatever its micro-batches are: weights, gradients, optimizer state."""
        if self.offloads(config) == "parameters":
            return 0
        states = [self.rules.worst(config, layout, p) for p in self.places(config, layout)]
        if self.offloads(config) == "optimizer":
            return max(s.parameters + s.gradients for s in states)
        return max(s.total for s in states)

    def offloads(self, config: Config) -> str:
        """What lives in the host's memory; nothing where that is the device's."""
        return config.parallel.offload if self.accelerator else "none"

    def in_flight(self, config: Config, layout: Layout, stage_rank: int) -> int:
        """Forward passes of a stage (one of those that a rank holds) whose backward is still to come, at most."""
        ranks, cfg = layout.pipeline, config.parallel
        count = micro_batches(config, layout)
        if ranks == 1:
            return 1
        if cfg.schedule == "gpipe":
            return count
        if cfg.schedule == "1f1b":
            return min(count, ranks - stage_rank)
        # torch's warm-up of interleaved schedules, and the one that comes before the first backward.
        each = count // max(1, count // ranks)
        hops = 2 if cfg.schedule == "interleaved" else 1
        warm = (cfg.virtual_stages - 1) * each + hops * (ranks - 1 - stage_rank)
        more = ranks if cfg.schedule == "zero_bubble" else 0  # backward passes of weights are put off
        return min(count * cfg.virtual_stages, warm + 1 + more)

    def arena(self, config: Config, layout: Layout) -> bool:
        """Whether the weights are in flat buffers, as castalia.parallel.parallelize decides."""
        together = layout.pipeline == 1 or config.training.precision == "fp32"
        return (
            config.performance.arena
            and together
            and self._elementwise
            and not layout.zero
            and (self.offloads(config) == "none")
        )

    def layers(self, config: Config, layout: Layout, held: list[int]) -> tuple[float, float, float]:
        """Of some layers one after the other, for a micro-batch: bytes saved; the most of a forward, of a backward."""
        cfg, model = config.performance, config.model
        sequence = layout.sequence
        kinds: dict[tuple[int, str], int] = {}
        for layer in held:
            again: str = cfg.recompute if layer % cfg.recompute_every == 0 else "none"
            kind = (self.rules.alike[layer], again)
            kinds[kind] = kinds.get(kind, 0) + 1
        key = (tuple(kinds.items()), layout.tensor, sequence, layout.context, config.micro_batch_size)
        if key not in self._sums:
            saved = forward = backward = 0.0
            for (layer, word), count in kinds.items():
                piece = self.pieces.layer(layer, word, layout.tensor, sequence).at(
                    config.micro_batch_size / layout.context
                )
                each = piece.saved
                if layout.context > 1 and word != "full":
                    each += self._gathered_keys(config, layout)
                saved += count * each
                forward = max(forward, piece.forward_peak - piece.saved)
                backward = max(backward, piece.backward_peak)
            if layout.context > 1:
                backward += 2 * self._gathered_keys(config, layout)
            self._sums[key] = saved, forward, backward
        saved, forward, backward = self._sums[key]
        if cfg.offload_activations and cfg.recompute == "full" and self.accelerator:
            share = layout.tensor if sequence else 1
            saved -= 4 * tokens(config, layout) // share * model.hidden_size * len(held)
        return saved, forward, backward

    def _gathered_keys(self, config: Config, layout: Layout) -> float:
        """Keys and values of the other context ranks' tokens, which attention saves."""
        model = config.model
        heads = ceil(model.kv_heads / layout.tensor)
        width = 2 if self._low else 4
        whole = 2 * config.micro_batch_size * config.data.seq_length * heads * model.head_size * width
        return whole * (1 - 1 / layout.context)

    def of_stage(self, config: Config, layout: Layout, stage_rank: int) -> Memory:
        """The fullest rank at one place of the pipeline."""
        model, ranks = config.model, layout.pipeline
        state = self.rules.worst(config, layout, stage_rank)
        first, last = stage_rank == 0, stage_rank == ranks - 1
        flying = self.in_flight(config, layout, stage_rank)
        held = self.rules.held(config, layout, stage_rank)
        order = self.order
        # Layers that are shared run several times; a pipeline has none of these.
        executed = [list(order)] if ranks == 1 else held
        if model.mtp_depth:
            executed = [[*executed[0], *([order[-1]] * model.mtp_depth)]]
        passes = [self.layers(config, layout, stage) for stage in executed]
        here, hidden = tokens(config, layout), model.hidden_size
        residual = 4 * here * hidden // (layout.tensor if layout.sequence else 1)
        saved = max(one for one, _, _ in passes)
        transient = max(max(forward, backward) for _, forward, backward in passes)
        embedded = residual if first else 0
        arena = self.arena(config, layout)
        casts = state.copies if self._low and not arena and not layout.zero else 0
        # A cast of the weights is made for each forward pass, and its backward needs it.
        together = flying * (saved + embedded) + (flying - 1) * casts / len(held)
        # Gradients of working weights live until they are collected: after each micro-batch, of a pipeline once.
        fresh = (state.copies or state.gradients) if arena else 0
        loss, matrix = self._loss(config, layout) if last else (0, 0)
        before = fresh if layout.pipeline > 1 else matrix
        largest = max(one / max(len(stage), 1) for (one, _, _), stage in zip(passes, executed, strict=True))
        embedding = 4 * ceil((model.vocab_size or 0) / layout.tensor) * hidden * (first and not model.tie_embeddings)
        begin = together + max(loss, transient + 4 * here * hidden * last) + before
        end = together - saved + largest + transient
        end += fresh if layout.pipeline > 1 else max(fresh - state.largest - embedding, 0)
        over = together - saved + fresh
        micro = micro_batches(config, layout)
        copies = state.copies if not layout.zero and self._low else 0
        memory = {
            "parameters": state.parameters,
            "gradients": state.gradients,
            "optimizer": state.optimizer,
            "copies": copies,
            "gathered": self._zero_buffers(layout, state, micro),
            "activations": int(max(begin, end, over)),
            "buffers": self._exchanges(config, layout, state, arena, residual, (first, last), len(held), micro),
        }
        return self._placed(config, memory)

    def _placed(self, config: Config, memory: dict[str, int]) -> Memory:
        """With what offloading moves to the host."""
        kind = self.offloads(config)
        if kind == "none":
            return Memory(**memory)
        host = sum(memory[n] for n in ("parameters", "gradients", "optimizer"))
        memory["optimizer"] = 0
        if kind == "parameters":
            memory["parameters"] = memory["gradients"] = 0
        return Memory(**memory, host=host)

    def _loss(self, config: Config, layout: Layout) -> tuple[int, int]:
        """Bytes alive in the chunked loss above the last hidden states, and the gradient of the output matrix."""
        model, here = config.model, tokens(config, layout)
        rows = ceil((model.vocab_size or 0) / layout.tensor)
        width, chunk = 2 if self._low else 4, min(config.loss.chunk_size, here)
        matrix = rows * model.hidden_size
        logits = chunk * rows * (width + (8 if self.accelerator else 0))
        if self._low and not self.accelerator:
            logits += 4 * min(_SCRATCH_ELEMENTS, chunk * rows)
        chunks = -(-here // chunk)
        total = 4 * matrix if self._low and chunks > 4 else 0  # long sums are moved to fp32
        hidden = 2 * 4 * here * model.hidden_size + 2 * chunk * model.hidden_size * 4
        return logits + total + hidden, width * matrix

    def _zero_buffers(self, layout: Layout, state: StateBytes, micro: int) -> int:
        """Weights gathered for products, and gradients before they are scattered."""
        if not layout.zero:
            return 0
        scattered = 2 * state.largest + 4 * state.largest_elements  # of two layers, and what is summed in fp32
        if layout.zero == 3:
            return state.ends + 2 * state.largest + scattered
        if layout.zero == 1 and micro > 1 and layout.pipeline == 1:
            return state.gathered + 4 * state.elements  # whole gradients add up
        return state.gathered + scattered

    def _exchanges(
        self,
        config: Config,
        layout: Layout,
        state: StateBytes,
        arena: bool,
        residual: int,
        ends: tuple[bool, bool],
        stages: int,
        micro: int,
    ) -> int:
        """What sums over ranks and a pipeline allocate."""
        out = 0
        if layout.tensor > 1:  # a sum is made in a copy
            out += 4 * tokens(config, layout) * config.model.hidden_size
        if layout.pipeline > 1:  # torch keeps one for what each micro-batch receives, forward and backward
            first, last = ends
            received = (stages - first) + (stages - last)
            out += residual * micro * received
        if not arena and not layout.zero and layout.data * layout.context > 1:
            out += min(state.gradients, 2 * 4 * BUCKET)
        return out


def tokens(config: Config, layout: Layout) -> int:
    """Tokens of a micro-batch that a rank holds outside of sequence parallelism."""
    return config.micro_batch_size * config.data.seq_length // layout.context


def micro_batches(config: Config, layout: Layout) -> int:
    """Micro-batches of a step on each data-parallel rank."""
    return max(config.training.batch_size // (config.micro_batch_size * layout.data), 1)
