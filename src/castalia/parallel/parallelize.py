"""Configuration and mesh -> this rank's part of the model, wrapped in the one order that works.

    meta model ─recomputation─> ─tensor, sequence─> ─context─> ─pipeline─> ─ZeRO (FSDP2)─> memory ─> initial weights

The model is built on the meta device, where it weighs nothing, so that a rank only ever holds its
part. Initial weights are functions of a parameter's name: each rank draws a parameter whole,
keeps its rectangle, and every layout begins with the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from castalia.config import Config
from castalia.errors import UserError
from castalia.model.float8 import use_float8
from castalia.model.initial import initial_value
from castalia.model.loss import VocabularyShard
from castalia.model.recompute import LayerRunner, Recompute, run_layer
from castalia.model.transformer import Transformer
from castalia.optim import WeightStore
from castalia.optim.offload import HOST, offloads, store_of
from castalia.parallel.layout import Layout, check_layout
from castalia.parallel.mesh import Mesh
from castalia.parallel.plans import Place, bounds, tensor_places
from castalia.parallel.store import SpreadStore


@dataclass(frozen=True)
class Parts:
    """What a rank trains with.

    Attributes:
        model: its part of the model, with initial weights.
        store: of the part's weights.
        places: where each of its parameters lies in the whole one.
    """

    model: Transformer
    store: WeightStore
    places: dict[str, Place]


def parallelize(config: Config, mesh: Mesh) -> Parts:
    """Build this rank's part of the model.

    Args:
        config: complete (derived).

    Raises:
        UserError: the model or the run cannot have this layout.
    """
    check_model(config, mesh.layout)
    with torch.device("meta"):
        model = Transformer(config.model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    model.runner = runner_of(config, mesh.layout)
    if config.training.precision == "fp8":
        use_float8(model)
    model, places = wrap(model, config, mesh)
    model.to_empty(device=HOST if config.parallel.offload == "parameters" else mesh.device)
    fill(model, places, config)
    if mesh.layout.zero:
        from castalia.parallel.shards import HostShardedStore, ShardedStore

        kind = HostShardedStore if offloads(config, mesh.device) else ShardedStore
        inner: WeightStore = kind(model, config.optimizer, mesh.layout.zero)
    else:
        # Several micro-batches pass a pipeline before bf16 gradients could be moved to fp32: masters take them at once.
        arena = config.performance.arena and (mesh.layout.pipeline == 1 or config.training.precision == "fp32")
        inner = store_of(model, config, arena)
    return Parts(model, SpreadStore(inner, places, mesh, shapes, config.optimizer), places)


def check_model(config: Config, layout: Layout) -> None:
    """As `check_layout`, and look at the model's parameters too: each needs a plan where matrices are cut.

    Raises:
        UserError: the model or the run cannot have this layout.
    """
    check_layout(config, layout)
    if layout.tensor == 1:
        return
    cfg = config.model
    if cfg.qk_norm is True and cfg.norm in ("layernorm", "non_parametric_layernorm"):
        raise UserError(
            f"model.qk_norm with model.norm {cfg.norm} takes all heads together, which parallel.tensor spreads: "
            "set parallel.tensor=1 or model.norm=rmsnorm"
        )
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Transformer(cfg).named_parameters()}
    tensor_places(shapes, layout.tensor, 0, layout.sequence, 1)


def wrap(model: Transformer, config: Config, mesh: Mesh) -> tuple[Transformer, dict[str, Place]]:
    """Cut a model on the meta device: this rank's part, and where each of its parameters lies in the whole one."""
    layout = mesh.layout
    stages = []
    if layout.pipeline > 1:
        from castalia.parallel.stages import Part, layer_stages

        stages = layer_stages(model, config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    copies = mesh.size("replicate", "shard", "context")
    places = tensor_places(shapes, layout.tensor, mesh.index("tensor"), layout.sequence, copies)
    if layout.tensor > 1:
        from castalia.parallel.tensor import spread

        spread(model, places, mesh.group("tensor"), mesh.index("tensor"), layout.sequence)
    if layout.context > 1:
        from castalia.parallel.context import spread_sequence

        spread_sequence(model, mesh)
    if layout.expert > 1:
        from castalia.parallel.experts import spread_experts

        places = spread_experts(model, places, mesh)
    if stages:
        ends = {"embedding.weight"} if model.head is None else set()
        model = Part(model, stages, range(mesh.index("pipeline"), len(stages), layout.pipeline))
        held = [name for name, _ in model.named_parameters()]
        times = dict.fromkeys(ends, 2) | {"relative_bias.weight": layout.pipeline}
        places = {n: replace(places[n], copies=places[n].copies * times.get(n, 1)) for n in held}
    if layout.zero:
        from castalia.parallel.shards import shard

        places = shard(model, places, config, mesh)
    return model, places


@torch.no_grad()
def fill(model: nn.Module, places: dict[str, Place], config: Config) -> None:
    """Give every parameter its rectangle of the initial weights."""
    for name, parameter in model.named_parameters():
        place, local = places[name], local_part(parameter)
        if place.local == place.shape:
            initial_value(name, local, config.model, config.training.seed)
            continue
        whole = torch.empty(place.shape, dtype=torch.float32)
        initial_value(name, whole, config.model, config.training.seed)
        region = tuple(slice(o, o + n) for o, n in zip(place.offset, place.local, strict=True))
        local.copy_(whole[region])


def local_part(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter, as a plain tensor that shares its memory."""
    to_local = getattr(parameter, "to_local", None)
    return parameter.detach() if to_local is None else to_local().detach()


def moved(place: Place, offset: int, rows: int, ranks: int) -> Place:
    """The place of some rows of what a place describes, where `ranks` ranks share these out."""
    return replace(
        place,
        offset=(place.offset[0] + offset, *place.offset[1:]),
        local=(rows, *place.local[1:]),
        copies=place.copies // ranks,
    )


def runner_of(config: Config, layout: Layout) -> LayerRunner:
    """How layers are called: activations kept, or computed again as `performance.recompute` says."""
    cfg = config.performance
    if cfg.recompute == "none":
        return run_layer
    return Recompute(cfg.recompute == "selective", cfg.recompute_every, layout.zero > 0, cfg.offload_activations)


def vocabulary_of(config: Config, mesh: Mesh) -> VocabularyShard | None:
    """How the loss reaches the rows of the output matrix that other ranks hold; None where it is whole."""
    if mesh.layout.tensor == 1:
        return None
    from castalia.parallel.tensor import Vocabulary

    first, _ = bounds(config.model.vocab_size or 0, mesh.layout.tensor, mesh.index("tensor"))
    return Vocabulary(first, mesh.group("tensor"))
