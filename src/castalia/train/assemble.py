"""Configuration and mesh -> model, store and engine: the same three whatever the layout.

On one process this is the plain model, the store that the configuration asks for, and the engine
around them; on several, each rank gets its part of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from castalia.config import Config
from castalia.model.float8 import use_float8
from castalia.model.kernels import use_matmul
from castalia.model.transformer import Transformer, build_model
from castalia.optim import WeightStore
from castalia.optim.offload import store_of
from castalia.optim.weights import working_dtype
from castalia.parallel.layout import check_layout
from castalia.parallel.mesh import Mesh
from castalia.parallel.parallelize import runner_of
from castalia.parallel.plans import Place
from castalia.train.engine import Engine, LocalEngine


@dataclass
class Assembled:
    """What trains.

    Attributes:
        mesh: the ranks.
        model, store, engine: of this rank.
        places: where each of its parameters lies; empty: they are whole.
    """

    mesh: Mesh
    model: Transformer
    store: WeightStore
    engine: Engine
    places: dict[str, Place]

    def count(self, tokens: int) -> int:
        """Tokens of the global batch, of which this rank has so many."""
        return int(self.mesh.sum([tokens], "replicate", "shard")[0])

    def part(self, name: str, tensor: Tensor) -> tuple[Any, tuple[int, ...]]:
        """A copy of what this rank holds of a parameter (or of its gradient) as a NumPy array, and where it begins."""
        offset = self.places[name].offset if name in self.places else (0,) * tensor.ndim
        return tensor.detach().float().cpu().numpy().copy(), offset


def assemble(config: Config, mesh: Mesh, matmul: str = "native") -> Assembled:
    """Build model, store and engine.

    Args:
        config: complete (derived).
        matmul: how products of 16-bit matrices are computed (castalia.model.kernels).

    Raises:
        UserError: they cannot be built so.
    """
    seed = config.training.seed
    if mesh.world.size == 1:
        check_layout(config, mesh.layout)
        model = build_model(config.model, seed, mesh.device)
        model.runner = runner_of(config, mesh.layout)
        if config.training.precision == "fp8":
            use_float8(model)
        use_matmul(model, matmul, working_dtype(config.training.precision))
        store = store_of(model, config, config.performance.arena)
        engine = LocalEngine(model, store, config.loss, config.performance.compile, seed)
        return Assembled(mesh, model, store, engine, {})
    from castalia.parallel.parallelize import parallelize, vocabulary_of

    parts = parallelize(config, mesh)
    use_matmul(parts.model, matmul, working_dtype(config.training.precision))
    vocabulary = vocabulary_of(config, mesh)
    if mesh.layout.pipeline > 1:
        from castalia.parallel.stages import Part
        from castalia.train.engine_pipeline import PipelineEngine

        pipeline = PipelineEngine(cast(Part, parts.model), parts.store, config, mesh, vocabulary)
        return Assembled(mesh, parts.model, parts.store, pipeline, parts.places)
    engine = LocalEngine(parts.model, parts.store, config.loss, config.performance.compile, seed, mesh, vocabulary)
    return Assembled(mesh, parts.model, parts.store, engine, parts.places)
