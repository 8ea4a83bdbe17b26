"""One step's forward and backward on one device: micro-batches -> summed loss, gradients in the store.

The engine is the only place that knows how the model is called: with the store's working
weights, compiled or not, and with the loss at the end. A pipelined or sharded engine offers
the same two methods, so the loop has no special cases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.func import functional_call

from castalia.config import LossConfig
from castalia.data.loader import Batch
from castalia.model.dropout import DropoutKey
from castalia.model.loss import linear_cross_entropy
from castalia.model.transformer import Transformer
from castalia.optim import WeightStore


@dataclass
class StepStats:
    """What a step, or an evaluation, saw.

    Attributes:
        nll_sum: negative log-likelihood in nats, summed over valid tokens.
        tokens: valid tokens.
        loss: what was minimised: nll_sum / tokens, or the mean of micro-batch means.
        aux: further losses by name.
    """

    nll_sum: float
    tokens: int
    loss: float
    aux: dict[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """What the loop needs."""

    def forward_backward(self, micro_batches: Sequence[Batch], global_tokens: int, step: int = 0) -> StepStats:
        """Accumulate the gradient of the global batch's loss into the store; dropout depends on `step`."""
        ...

    def evaluate(self, micro_batches: Iterable[Batch]) -> StepStats:
        """The loss of some batches, without gradients."""
        ...


class LocalEngine:
    """One process, one device.

    Args:
        model: the module whose forward is run.
        store: holder of its weights.
        loss: how losses are averaged and chunked.
        compiled: compile the model's forward and backward (one graph per shape).
        seed: of the dropout masks.
    """

    def __init__(
        self, model: Transformer, store: WeightStore, loss: LossConfig, compiled: bool = False, seed: int = 0
    ) -> None:
        self.model, self.store, self.loss, self.seed = model, store, loss, seed
        self.device = model.embedding.weight.device
        self.drops = model.cfg.hidden_dropout > 0 or model.cfg.attention_dropout > 0

        def hidden(
            weights: dict[str, Tensor], tokens: Tensor, positions: Tensor | None, dropout: DropoutKey | None
        ) -> Tensor:
            out: Tensor = functional_call(model, weights, (tokens, positions, None, dropout))
            return out

        self._hidden: Callable[..., Tensor] = torch.compile(hidden, dynamic=False) if compiled else hidden

    def forward_backward(self, micro_batches: Sequence[Batch], global_tokens: int, step: int = 0) -> StepStats:
        """See Engine. `global_tokens` are the valid labels of the whole batch over all ranks."""
        by_tokens = self.loss.normalisation == "tokens"
        nll = torch.zeros((), dtype=torch.float64, device=self.device)
        means = torch.zeros_like(nll)
        tokens = 0
        for batch in micro_batches:
            valid = batch.num_tokens
            # A micro-batch whose labels are all masked adds nothing; dividing by it would add NaN.
            scale = 1.0 / (max(global_tokens, 1) if by_tokens else len(micro_batches) * max(valid, 1))
            scaled, plain = self._loss(batch, scale, self._dropout(batch, step))
            scaled.backward()
            self.store.collect()
            nll += plain
            means += plain / max(valid, 1)
            tokens += valid
        loss = nll / max(tokens, 1) if by_tokens else means / len(micro_batches)
        return StepStats(nll_sum=nll.item(), tokens=tokens, loss=loss.item())

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[Batch]) -> StepStats:
        """See Engine."""
        nll, tokens = 0.0, 0
        for batch in micro_batches:
            nll += self._loss(batch, 1.0)[1].item()
            tokens += batch.num_tokens
        # Per token whatever was minimised: a measure must not depend on the size of micro-batches.
        return StepStats(nll, tokens, nll / max(tokens, 1))

    def _dropout(self, batch: Batch, step: int) -> DropoutKey | None:
        """Which masks a micro-batch gets; None where the model drops nothing."""
        if not self.drops:
            return None
        if batch.sample_ids is None:
            raise ValueError("dropout depends on the numbers of the samples, and this batch does not carry them")
        return DropoutKey(self.seed, step, batch.sample_ids.to(self.device))

    def _loss(self, batch: Batch, scale: float, dropout: DropoutKey | None = None) -> tuple[Tensor, Tensor]:
        weights = self.store.working()
        # Positions are the default 0 .. S-1 unless documents are kept apart.
        positions = None if batch.doc_ids is None else batch.positions.to(self.device)
        hidden = self._hidden(weights, batch.tokens.to(self.device), positions, dropout)
        head = weights[self.model.head_name]
        labels = batch.labels.to(self.device)
        return linear_cross_entropy(hidden, head, labels, scale=scale, chunk_size=self.loss.chunk_size)
