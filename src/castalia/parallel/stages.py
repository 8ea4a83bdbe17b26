"""Layers -> stages of a pipeline: which layers each holds, and a model that is one rank's stages.

    costs of the layers ──partition──> contiguous stages, the dearest as cheap as can be
    stage s is held by rank s mod P:   rank 0: stages 0, P, ...   the last rank: the last stage

A stage keeps its layers' names and global numbers; the first has the embedding, the last the final norm
and the output matrix. Where these are one matrix, both ends hold it and their gradients are summed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from castalia.config import Config
from castalia.errors import UserError
from castalia.model.attention_mask import Documents
from castalia.model.collected import Collected
from castalia.model.dropout import DropoutKey
from castalia.model.moe import MoE
from castalia.model.transformer import Transformer
from castalia.parallel.layout import stages_of
from castalia.parallel.mesh import Mesh


def partition(costs: Sequence[float], stages: int) -> list[range]:
    """Cut a row of layers into contiguous stages, none empty, so that the largest sum of costs is smallest.

    Among equals the earlier stages take more, as GPT-NeoX's `uniform` does.
    """
    n = len(costs)
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[k][i]: the least possible maximum with the last n - i layers in k stages; and where the first of these ends.
    best = [[(float("inf"), 0)] * (n + 1) for _ in range(stages + 1)]
    best[0][n] = (0.0, n)
    for k in range(1, stages + 1):
        for i in range(n - k, -1, -1):
            options = ((max(sums[j] - sums[i], best[k - 1][j][0]), -j) for j in range(i + 1, n - k + 2))
            worst, end = min(options, default=(float("inf"), 0))
            best[k][i] = (worst, -end)
    out, start = [], 0
    for k in range(stages, 0, -1):
        end = best[k][start][1]
        out.append(range(start, end))
        start = end
    return out


def layer_stages(model: Transformer, config: Config) -> list[range]:
    """The layers of each stage by `parallel.partition`.

    Raises:
        UserError: its pattern matches no layer.
    """
    method, layers = config.parallel.partition, list(model.layers)
    if method == "uniform":
        costs = [1.0] * len(layers)
    elif method == "parameters":
        costs = [float(sum(p.numel() for p in layer.parameters())) for layer in layers]
        costs[0] += model.embedding.weight.numel()
        costs[-1] += model.embedding.weight.numel()
    else:
        pattern = method.removeprefix("type:")
        names = [(type(layer).__name__, "transformer") for layer in layers]
        costs = [float(any(re.search(pattern, name, re.IGNORECASE) for name in both)) for both in names]
        if not any(costs):
            raise UserError(f"parallel.partition {method!r} matches no layer: these are {names[0][0]}")
    return partition(costs, stages_of(config))


class Part(Transformer):
    """The stages of a model that one rank holds.

    Args:
        model: the whole one, on the meta device; its modules are taken over.
        stages: the layers of every stage.
        mine: numbers of the stages held here.
    """

    def __init__(self, model: Transformer, stages: Sequence[range], mine: Sequence[int]) -> None:
        nn.Module.__init__(self)
        self.cfg, self.order, self.masks, self.runner = model.cfg, model.order, model.masks, model.runner
        first, last = 0 in mine, len(stages) - 1 in mine
        tied = model.head is None
        empty = cast(Any, None)
        self.embedding = model.embedding if first or (last and tied) else empty
        self.position_embedding = model.position_embedding if first else None
        self.embedding_norm = model.embedding_norm if first else None
        self.position_embedding_norm = model.position_embedding_norm if first else None
        self.relative_bias, self.soft_prompt = model.relative_bias, None
        held = [i for stage in mine for i in stages[stage]]
        self.layers = cast(Any, nn.ModuleDict({str(i): model.layers[i] for i in held}))
        self.final_norm = model.final_norm if last else empty
        self.head = model.head if last else None
        self.mtp = nn.ModuleList()
        self.stages, self.mine = list(stages), list(mine)
        self.seed = self.step = 0
        self.drops = False
        self.rows: Tensor | None = None
        self.routed: Callable[[int, Collected], Tensor] | None = None
        """(stage, what its layers noted) -> a loss of the routing to add; None: nothing looks at it."""

    def experts_of(self, layer: int) -> MoE:
        """The mixture of a layer that is held here."""
        return cast("MoE", cast(Any, self.layers)[str(layer)].mlp)

    def forward(  # type: ignore[override]
        self,
        stage: int,
        x: Tensor,
        positions: Tensor,
        sample_ids: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        """One stage: token ids `[B, S]` for the first, hidden states else; hidden states come out.

        Args:
            stage: its number.
            positions: int64 `[B, S]`.
            sample_ids: int64 `[B]`, on which dropout depends; needed while `drops`.
            doc_ids: `[B, S]` of the whole sequence; None: each row is one document.
        """
        key = None
        if self.drops and sample_ids is not None:
            key = DropoutKey(self.seed, self.step, sample_ids, self.rows)
        if stage == 0:
            x = self._embed(x, positions, key)
        documents = None if doc_ids is None else Documents.of(doc_ids, x.device)
        # Without documents all rows have the same positions: one row is enough, and masks are described once.
        context = self._context(positions[0] if documents is None else positions, 0, None, key, documents)
        collected = None if self.routed is None else Collected()
        context = context._replace(collected=collected)
        for layer in self.stages[stage]:
            x = self.runner(self.layers[cast(Any, str(layer))], x, layer, context)
        if self.routed is not None and collected is not None and collected.routing:
            x = cast(Tensor, _Attach.apply(x, self.routed(stage, collected)))
        return self.final_norm(x) if stage == len(self.stages) - 1 else x


class Stage(nn.Module):
    """One stage as torch's pipelining wants it: a module with the stage's parameters.

    Args:
        part: which holds it.
        number: of the stage.
        run: calls the part, with its working weights.
    """

    def __init__(self, part: Part, number: int, run: Any) -> None:
        super().__init__()
        self.number, self._run = number, run
        held = [part.layers[cast(Any, str(i))] for i in part.stages[number]]
        first, last = number == 0, number == len(part.stages) - 1
        ends: list[nn.Module | None] = [part.embedding, part.position_embedding] if first else []
        ends += [part.embedding_norm, part.position_embedding_norm] if first else []
        ends += [part.final_norm, part.head or part.embedding] if last else []
        self.held = nn.ModuleList([*held, *(module for module in ends if module is not None)])

    def forward(self, x: Tensor, positions: Tensor, sample_ids: Tensor, doc_ids: Tensor | None = None) -> Tensor:
        """See Part."""
        return self._run(self.number, x, positions, sample_ids, doc_ids)


class _Attach(torch.autograd.Function):
    """Hidden states as they are; backward also goes into a loss that was made on the way, as if it were added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)


SCHEDULES: dict[str, tuple[str, bool]] = {
    "gpipe": ("ScheduleGPipe", False),
    "1f1b": ("Schedule1F1B", False),
    "interleaved": ("ScheduleInterleaved1F1B", True),
    "zero_bubble": ("ScheduleInterleavedZeroBubble", True),
}
"""torch's class for each word of parallel.schedule, and whether a rank holds several stages."""


def make_schedule(
    word: str, stages: Sequence[Stage], total: int, micro_batches: int, loss: Callable[..., Tensor], mesh: Mesh
) -> Any:
    """torch's schedule for so many micro-batches of one shape.

    Args:
        word: parallel.schedule.
        stages: held here, of `total`.
        loss: of the last stage's hidden states and the labels of a micro-batch; its gradients are not averaged.
    """
    from torch.distributed import pipelining

    name, several = SCHEDULES[word]
    group = mesh.group("pipeline")
    held = [pipelining.PipelineStage(stage, stage.number, total, mesh.device, group=group) for stage in stages]
    make: Any = getattr(pipelining, name)
    return make(held if several else held[0], micro_batches, loss_fn=loss, scale_grads=False)
