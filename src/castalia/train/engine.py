"""One step's forward and backward: micro-batches -> summed loss, gradients in the store.

The engine is the only place that knows how the model is called: with the store's working
weights, compiled or not, and with the loss at the end. Other ranks are reached through the mesh
alone, which on one process is empty. A pipeline offers the same two methods, so the loop has no
special cases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from inspect import unwrap
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.func import functional_call

from castalia.config import LossConfig
from castalia.data.loader import Batch
from castalia.model.collected import Collected
from castalia.model.dropout import DropoutKey
from castalia.model.kernels import head_matrix
from castalia.model.loss import LossSums, VocabularyShard, Workspace, loss_sums
from castalia.model.moe import MoE
from castalia.model.registry import LOSSES, look_up
from castalia.model.transformer import Transformer
from castalia.optim import WeightStore
from castalia.optim.weights import ArenaStore
from castalia.parallel.context import rows_held, stretch
from castalia.parallel.experts import rebalance
from castalia.parallel.mesh import GRADIENT_AXES, Mesh, local_mesh
from castalia.train.auxiliary import Auxiliary
from castalia.train.profile_timers import Timers


@dataclass
class StepStats:
    """What a step, or an evaluation, saw.

    Attributes:
        nll_sum: negative log-likelihood in nats, summed over valid tokens.
        tokens: valid tokens.
        loss: what was minimised: nll_sum / tokens, or the mean of micro-batch means.
        aux: further losses and measures by name.
        experts: tokens of each expert, by executed layer.
        small: squared norm, by parameter, of the mean gradient of a part of the batch (a mean over such parts), and
            its tokens.
    """

    nll_sum: float
    tokens: int
    loss: float
    aux: dict[str, float] = field(default_factory=dict)
    experts: dict[int, list[int]] = field(default_factory=dict)
    small: tuple[dict[str, float], float] | None = None


class Engine(Protocol):
    """What the loop needs.

    Attributes:
        loss_scale: what the loss, so also the gradient in the store, is multiplied by; 1 but in fp16.
        timers: told of the phases of a step.
    """

    loss_scale: float
    timers: Timers

    def forward_backward(self, micro_batches: Sequence[Batch], global_tokens: int, step: int = 0) -> StepStats:
        """Accumulate the gradient of the global batch's loss into the store; dropout depends on `step`."""
        ...

    def evaluate(self, micro_batches: Iterable[Batch]) -> StepStats:
        """The loss of some batches, without gradients."""
        ...

    measures_noise: bool

    def updated(self) -> None:
        """Told after the weights were updated with the step's gradients: what follows from them moves now."""
        ...


def small_part(store: WeightStore, mesh: Mesh, tokens: int, factor: float) -> tuple[dict[str, float], float]:
    """What the accumulated gradients, of a part of the batch, say for StepStats.small.

    Args:
        tokens: valid labels that this rank has seen.
        factor: makes this rank's gradient the mean one of its tokens.
    """
    squares, data = store.squares_so_far(), mesh.layout.data
    if mesh.layout.zero:  # of all ranks' tokens together, whichever rank has how many
        ours, together = tokens * factor, mesh.sum([tokens], "replicate", "shard")[0]
        return {name: square * (ours / max(together, 1)) ** 2 for name, square in squares.items()}, together
    *sums, seen = mesh.sum([*(square * factor**2 for square in squares.values()), tokens], "replicate", "shard")
    return dict(zip(squares, (total / data for total in sums), strict=True)), seen / data


def total_of_sequences(mesh: Mesh) -> Callable[[Tensor], Tensor] | None:
    """Sums a tensor over the ranks that share sequences; None where each has whole ones."""
    return None if mesh.layout.context == 1 else lambda value: mesh.sum_tensor(value.contiguous(), "context")


class LocalEngine:
    """Every layout but a pipeline: each rank runs the whole model, or its part of every layer.

    Args:
        model: the module whose forward is run.
        store: holder of its weights.
        loss: how losses are averaged and chunked.
        compiled: compile the model's forward and backward (one graph per shape).
        seed: of the dropout masks.
        mesh: the ranks that train together; None: this one alone.
        vocabulary: how the loss reaches the rows of the output matrix that other ranks hold.
    """

    def __init__(
        self,
        model: Transformer,
        store: WeightStore,
        loss: LossConfig,
        compiled: bool = False,
        seed: int = 0,
        mesh: Mesh | None = None,
        vocabulary: VocabularyShard | None = None,
    ) -> None:
        self.model, self.store, self.loss, self.seed = model, store, loss, seed
        self.mesh, self.vocabulary = mesh or local_mesh(), vocabulary
        self.device = model.embedding.weight.device if mesh is None else mesh.device  # the host may hold the weights
        cfg = model.cfg
        self.drops = cfg.hidden_dropout > 0 or cfg.attention_dropout > 0 or cfg.moe_jitter > 0
        self.collects = cfg.moe_num_experts > 0 or cfg.mtp_depth > 0
        self.loss_sums = look_up(LOSSES, loss.function, "loss.function")
        self._workspace = Workspace()
        self._experts: dict[int, list[int]] = {}
        self.loss_scale, self.timers = 1.0, Timers(self.device)
        self.measures_noise = False

        def hidden(
            weights: dict[str, Tensor],
            tokens: Tensor,
            positions: Tensor | None,
            dropout: DropoutKey | None,
            collects: bool,
            doc_ids: Tensor | None,
        ) -> tuple[Tensor, Collected]:
            collected = Collected()
            given = (tokens, positions, None, dropout, collected if collects else None, doc_ids)
            out: Tensor = functional_call(model, weights, given)
            return out, collected

        # The compiler knows no gradients of some rows.
        self._rows = isinstance(store, ArenaStore) and store.takes_rows and not compiled
        self._hidden: Callable[..., Any] = torch.compile(hidden, dynamic=False) if compiled else hidden

    def forward_backward(self, micro_batches: Sequence[Batch], global_tokens: int, step: int = 0) -> StepStats:
        """See Engine. `global_tokens` are the valid labels of the whole batch over all ranks."""
        by_tokens = self.loss.normalisation == "tokens"
        nll = torch.zeros((), dtype=torch.float64, device=self.device)
        means = torch.zeros_like(nll)
        tokens = 0
        all_micro_batches = len(micro_batches) * self.mesh.layout.data
        small: tuple[dict[str, float], float] | None = None
        auxiliary = Auxiliary(self.loss, self.model.cfg, self.loss_scale, total_of_sequences(self.mesh))
        all_rows = sum(len(batch.tokens) for batch in micro_batches) * self.mesh.layout.data * self.mesh.layout.context
        for number, batch in enumerate(micro_batches):
            self.store.prepare(number == 0, number == len(micro_batches) - 1)
            batch = stretch(batch, self.mesh)
            valid = batch.num_tokens
            # A micro-batch whose labels are all masked adds nothing; dividing by it would add NaN.
            scale = self.loss_scale / (max(global_tokens, 1) if by_tokens else all_micro_batches * max(valid, 1))
            with self.timers("forward"):
                sums, collected, head = self._loss(batch, scale, self._dropout(batch, step), self.collects)
                labels = batch.labels.to(self.device)
                doc_ids = None if batch.doc_ids is None else batch.doc_ids.to(self.device)
                loss = auxiliary.add(sums, collected, labels, len(labels) / all_rows, head, doc_ids)
            with self.timers("backward"):
                loss.backward()
                self.store.collect()
            if number == 0 and self.measures_noise:
                small = small_part(self.store, self.mesh, valid, 1 / (scale * max(valid, 1)))
            nll += sums.nll
            means += sums.nll / max(valid, 1)
            tokens += valid
        with self.timers("reduce"):
            self.store.reduce()
        nll_sum, mean_sum, count = self.mesh.sum([nll.item(), means.item(), tokens], *GRADIENT_AXES)
        mean = nll_sum / max(count, 1) if by_tokens else mean_sum / all_micro_batches
        auxiliary.reduce(lambda values: self.mesh.sum(values, *GRADIENT_AXES))
        self._experts = auxiliary.experts
        return StepStats(nll_sum, int(count), mean, auxiliary.aux(int(count)), auxiliary.experts, small)

    def updated(self) -> None:
        """See Engine: the routers' biases move by the use of experts in the step's batch."""
        layers: dict[MoE, Tensor] = {}
        for layer, counts in self._experts.items():
            moe = self.model.experts_of(layer)
            # A layer that is executed several times has one router.
            layers[moe] = layers.get(moe, 0) + torch.tensor(counts, device=self.device)
        for moe, used in layers.items():
            rebalance(moe.router, used)

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[Batch]) -> StepStats:
        """See Engine."""
        nll, tokens = 0.0, 0
        for batch in (stretch(batch, self.mesh) for batch in micro_batches):
            nll += self._loss(batch, 1.0)[0].nll.item()
            tokens += batch.num_tokens
        nll, count = self.mesh.sum([nll, tokens], *GRADIENT_AXES)
        tokens = int(count)
        # Per token whatever was minimised: a measure must not depend on the size of micro-batches.
        return StepStats(nll, tokens, nll / max(tokens, 1))

    def _dropout(self, batch: Batch, step: int) -> DropoutKey | None:
        """Which masks a micro-batch gets; None where the model drops nothing."""
        if not self.drops:
            return None
        if batch.sample_ids is None:
            raise ValueError("dropout depends on the numbers of the samples, and this batch does not carry them")
        rows = rows_held(batch.tokens.shape[1] * self.mesh.layout.context, self.mesh)
        return DropoutKey(self.seed, step, batch.sample_ids.to(self.device), rows)

    def _loss(
        self, batch: Batch, scale: float, dropout: DropoutKey | None = None, collects: bool = False
    ) -> tuple[LossSums, Collected, Callable[[Tensor, Tensor], LossSums]]:
        """The losses of a micro-batch, what its forward pass collected, and what made losses of hidden states."""
        weights = self.store.working()
        # Positions are the default 0 .. S-1 unless documents are kept apart, or ranks share sequences.
        default = batch.doc_ids is None and self.mesh.layout.context == 1
        positions = None if default else batch.positions.to(self.device)
        # Documents stay where the loader made them: kernels plan by them without waiting for the device.
        tokens = batch.tokens.to(self.device)
        cfg, model = self.loss, self.model
        if self._rows:
            model.embedding.sparse = torch.is_grad_enabled()
        hidden, collected = self._hidden(weights, tokens, positions, dropout, collects, batch.doc_ids)
        if self._rows:
            model.embedding.sparse = False
        matrix = head_matrix(model, weights[model.head_name] if weights else model.head_weight)
        bias = weights.get("head.bias") if weights else model.head_bias

        def head(hidden: Tensor, labels: Tensor, **more: Any) -> LossSums:
            return self.loss_sums(
                hidden,
                matrix,
                labels,
                bias=bias,
                scale=scale,
                z_loss=cfg.z_loss,
                chunk_size=cfg.chunk_size,
                shard=self.vocabulary,
                **more,
            )

        more: dict[str, Any] = {}
        if unwrap(self.loss_sums) is loss_sums:  # a loss of somebody's own knows nothing of these
            sink = self.store.sink(model.head_name) if torch.is_grad_enabled() else None
            more = {"workspace": self._workspace, "sink": sink}
        return head(hidden, batch.labels.to(self.device), **more), collected, head
