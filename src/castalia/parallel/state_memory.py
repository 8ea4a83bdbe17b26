"""A configuration, a layout and a rank -> the exact bytes of its weights, gradients and optimizer state.

    model on the meta device ─> shapes by name ─┬─ tensor_places, bounds, layer_stages ─┐   the rules that cut
                                                └─ FSDP2's rows: ceil(n / ranks) each ──┴─> local shapes
    local shapes ─> fp32 masters, fp32 gradients, OptimizerKind's states, 16-bit copies

Nothing is estimated: each number is a shape's, by the functions that cut the real model, so that uneven shares,
padding that FSDP2 leaves out and states of whole matrices come out as they are. Counters of one number each are
left out. Layers that are alike are reckoned once, so that a layout costs microseconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from castalia.config import Config
from castalia.model.transformer import Transformer
from castalia.optim.eight_bit import BLOCK, SMALL
from castalia.optim.optimizers import optimizer_kind
from castalia.optim.weights import low_precision_names, working_dtype
from castalia.parallel.experts import holds_experts
from castalia.parallel.layout import Layout, stages_of
from castalia.parallel.plans import bounds, tensor_places
from castalia.parallel.stages import layer_stages

Shape = tuple[int, ...]
_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class StateBytes:
    """What a rank keeps between two steps, and the same weights as others ask for them.

    Attributes:
        parameters: fp32 master weights, frozen ones too.
        gradients: fp32, of what is trained.
        optimizer: states of the optimizer and averages of weights.
        copies: 16-bit copies of this rank's matrices, where the store makes any.
        gathered: the rank's layers (and ends) as FSDP2 gathers them for products, over its shards.
        largest: the largest layer of these.
        ends: what is gathered of them throughout: embedding, final norm, output matrix.
        elements: weights before ZeRO spreads them.
        largest_elements: of the largest layer.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    copies: int = 0
    gathered: int = 0
    largest: int = 0
    ends: int = 0
    elements: int = 0
    largest_elements: int = 0

    @property
    def total(self) -> int:
        """Parameters, gradients and optimizer state."""
        return self.parameters + self.gradients + self.optimizer


def sharded_rows(rows: int, ranks: int, rank: int) -> int:
    """Rows of a parameter that FSDP2 leaves on a rank: torch's chunks, ceil(rows / ranks) but for the last ones."""
    each = -(-rows // ranks)
    return max(0, min(each, rows - rank * each))


class StateRules:
    """Reckons any rank's state under any layout of one model.

    Args:
        config: complete (derived); of `parallel:` nothing is read here.
    """

    def __init__(self, config: Config) -> None:
        with torch.device("meta"):
            self.model = Transformer(config.model)
        self._config, self._kind = config, optimizer_kind(config.optimizer)
        named = dict(self.model.named_parameters())
        self._trained = {n for n, p in named.items() if p.requires_grad}
        self._low = set(low_precision_names(self.model)) if working_dtype(config.training.precision) else set()
        self._is_matrix = {n: self._kind.matrices(n, p) for n, p in named.items()}
        self.shapes: dict[str, Shape] = {n: tuple(p.shape) for n, p in named.items()}
        # Layers that are alike: the parameters of one stand for all.
        self._ends = [n for n in self.shapes if not _LAYER.match(n)]
        by_layer: dict[int, list[str]] = {}
        for name in self.shapes:
            if found := _LAYER.match(name):
                by_layer.setdefault(int(found[1]), []).append(name)
        first: dict[Any, int] = {}
        self.alike = [
            first.setdefault(tuple((n.split(".", 2)[2], self.shapes[n]) for n in by_layer[layer]), layer)
            for layer in sorted(by_layer)
        ]
        self._names = {layer: by_layer[layer] for layer in set(self.alike)}
        self._parts: dict[Any, StateBytes] = {}
        self._stages: dict[Any, list[range]] = {}

    def stages(self, config: Config) -> list[range]:
        """The layers of each stage of the pipeline that `parallel:` of the configuration describes."""
        key = (stages_of(config), config.parallel.partition)
        if key not in self._stages:
            everything = [range(len(self.alike))]
            self._stages[key] = everything if key[0] == 1 else layer_stages(self.model, config)
        return self._stages[key]

    def held(self, config: Config, layout: Layout, stage_rank: int) -> list[list[int]]:
        """The layers of each stage that a rank of the pipeline holds."""
        stages = self.stages(config)
        return [list(stages[s]) for s in range(stage_rank, len(stages), layout.pipeline)]

    def of_rank(self, config: Config, layout: Layout, where: Mapping[str, int]) -> StateBytes:
        """What the rank at these coordinates (Layout.coordinate) holds.

        Args:
            config: complete, with the `parallel:` of the layout.
        """
        place = (
            layout.tensor,
            where["tensor"],
            layout.expert,
            layout.shard * layout.context if layout.zero else 1,
            where["shard"] * layout.context + where["context"] if layout.zero else where["shard"],
        )
        # The stages that a rank holds are the only thing that differs along the pipeline: sums are kept.
        key = (place, stages_of(config), config.parallel.partition, layout.pipeline, where["pipeline"])
        if key not in self._parts:
            last, stage = layout.pipeline - 1, where["pipeline"]
            layers = [layer for held in self.held(config, layout, stage) for layer in held]
            parts = {kind: self._part(place, self._names[kind]) for kind in set(self.alike)}
            ends = self._part(place, self._ends_of(stage == 0, stage == last))
            self._parts[key] = _together(ends, [parts[self.alike[layer]] for layer in layers])
        return self._parts[key]

    def worst(self, config: Config, layout: Layout, stage_rank: int) -> StateBytes:
        """The largest of the ranks of one place in the pipeline: the first of each axis, which no share is less for.

        Eight-bit states of a small rest are larger than those of a share that is packed: there the last is asked too.
        """
        first = dict.fromkeys(("replicate", "shard", "context", "tensor"), 0) | {"pipeline": stage_rank}
        choices = [first]
        if self._config.optimizer.type == "adamw_8bit":
            choices.append(first | {"shard": layout.shard - 1, "context": layout.context - 1})
        return max((self.of_rank(config, layout, where) for where in choices), key=lambda s: s.total)

    def _ends_of(self, first: bool, last: bool) -> tuple[str, ...]:
        """Names outside the layers that the first, the last or another stage holds."""
        everything = first and last
        tied = self.model.head is None

        def here(name: str) -> bool:
            top = name.split(".")[0]
            if top == "embedding":
                return first or (last and tied)
            return (
                everything
                or top == "relative_bias"
                or (top in ("position_embedding", "embedding_norm", "position_embedding_norm") and first)
                or (top in ("final_norm", "head") and last)
            )

        return tuple(name for name in self._ends if here(name))

    def _part(self, place: tuple[int, ...], names: Iterable[str]) -> StateBytes:
        names = tuple(names)
        key = (place, names)
        if key not in self._parts:
            parts = [self._of_parameter(place, name) for name in names]
            self._parts[key] = (
                StateBytes(*(sum(column) for column in zip(*parts, strict=True))) if parts else StateBytes()
            )
        return self._parts[key]

    def _of_parameter(self, place: tuple[int, ...], name: str) -> tuple[int, ...]:
        """In the order of StateBytes' fields."""
        tensor, tensor_rank, expert, spread, rank = place
        whole = self.shapes[name]
        local = tensor_places({name: whole}, tensor, tensor_rank, False, 1)[name].local
        if expert > 1 and holds_experts(name):
            first, end = bounds(local[0], expert, rank)
            local = (end - first, *local[1:])
        before = prod(local)
        local = (sharded_rows(local[0], spread, rank), *local[1:]) if spread > 1 else local
        n, width = prod(local), 2 if name in self._low else 4
        trained = name in self._trained
        state = self._state(name, whole, n) if trained else 0
        copies = 2 * n if name in self._low else 0
        gathered = width * before
        return 4 * n, 4 * n * trained, state, copies, gathered, gathered, gathered, before, before

    def _state(self, name: str, whole: Shape, n: int) -> int:
        cfg, is_matrix = self._config.optimizer, self._is_matrix[name]
        average = 4 * n if cfg.average is not None else 0
        if cfg.type == "adamw_8bit" and is_matrix and n >= SMALL:
            return average + 2 * -(-n // BLOCK) * (BLOCK + 4)
        whole_states = (prod(shape) for state, shape in self._kind.whole(whole, is_matrix).items() if prod(shape) > 1)
        return average + 4 * n * len(self._kind.moments_of(is_matrix)) + 4 * sum(whole_states)


def _together(ends: StateBytes, layers: list[StateBytes]) -> StateBytes:
    """A rank's ends and layers."""

    def total(field: str) -> int:
        return int(getattr(ends, field)) + sum(int(getattr(layer, field)) for layer in layers)

    return StateBytes(
        total("parameters"),
        total("gradients"),
        total("optimizer"),
        total("copies"),
        total("gathered"),
        max((layer.gathered for layer in layers), default=0),
        ends.gathered,
        total("elements"),
        max((layer.elements for layer in layers), default=0),
    )
