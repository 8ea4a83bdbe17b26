"""A mixture of experts in place of an MLP: each token goes through k of E small MLPs, and none is dropped.

    x [T,h] ─router─> k experts and weights per token
       └─dispatcher: rows sorted by expert─> [T k, h] ─experts: grouped products─> [T k, h]
                                      y [T,h] <─weighted sum of each token's k rows─┘
    (+ shared experts, one MLP that all tokens pass)

Experts are stacked in one tensor per matrix, `[E, out, in]`: what grouped products read, and a
cut of the first dimension gives a rank whole experts. Sorting and fetching rows is the
dispatcher's part; expert parallelism puts another one in its place, which sends rows to the
ranks that hold their experts. Neither experts nor the router have biases in their products.

Routers: Shazeer et al. 2017 (top k), Clark et al. 2022 (Sinkhorn, by GPT-NeoX's arithmetic),
Wang et al. 2024 and DeepSeek-V3 (a bias that only chooses).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from castalia.config import ModelConfig
from castalia.model.collected import Routing, _counts
from castalia.model.dropout import jitter
from castalia.model.layers import MLP, Context
from castalia.model.norms import wide
from castalia.model.registry import ACTIVATIONS, look_up

ExpertMLPs = Callable[[Tensor, Tensor], Tensor]
"""(rows `[R, h]` sorted by expert, int64 counts `[E]`) -> `[R, h]`."""


class Dispatcher(Protocol):
    """Brings tokens to their experts and back."""

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor, experts: Experts) -> Tensor:
        """Weighted sums of what the chosen experts make of each token.

        Args:
            x: `[T, h]`.
            chosen: int64 `[T, k]`, numbers of experts among all E of the layer.
            weights: fp32 `[T, k]`.
            experts: those that are held here; called with rows sorted by expert, and how many each gets.

        Returns:
            fp32 `[T, h]`.
        """
        ...


class LocalDispatcher:
    """All experts are here: sort the rows by expert, and put them back."""

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor, experts: Experts) -> Tensor:
        """See Dispatcher."""
        tokens, k = chosen.shape
        order = chosen.flatten().argsort(stable=True)
        rows = experts(x[order // k], _counts(chosen.flatten(), experts.count))
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        # Each token's k rows are summed in its own order, so that the sum does not depend on other tokens.
        return (wide(rows[back]).view(tokens, k, -1) * weights.unsqueeze(-1)).sum(1)


class Stack(nn.Module):
    """One matrix of every expert: a parameter `weight` `[E, out, in]`."""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """`[R, in]`, the first counts[0] rows for expert 0 and so on, to `[R, out]` in the weight's dtype."""
        return grouped_linear(rows.to(self.weight.dtype), self.weight, counts)


@torch.library.custom_op("castalia::grouped_linear", mutates_args=())
def grouped_linear(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Each group of rows times the transpose of its matrix, in one kernel where torch has one.

    An operator of our own, as torch.compile takes torch's kernel for one of bf16 alone.

    Args:
        rows: `[R, in]`, sorted by group.
        weight: `[E, out, in]`, same dtype.
        counts: int64 `[E]`, rows of each group; their sum is R.

    Returns:
        `[R, out]`.
    """
    if _has_kernel(weight):
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=_ends(counts))
    groups = rows.split(counts.tolist())
    return torch.cat([F.linear(group, matrix) for group, matrix in zip(groups, weight, strict=True)])


@torch.library.custom_op("castalia::grouped_linear_backward", mutates_args=())
def _grouped_linear_backward(grad: Tensor, rows: Tensor, weight: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous()  # the kernel reads no expanded tensor
    if _has_kernel(weight):
        ends = _ends(counts)
        return F.grouped_mm(grad, weight, offs=ends), F.grouped_mm(grad.T, rows, offs=ends)
    sizes = counts.tolist()
    groups = list(zip(grad.split(sizes), rows.split(sizes), weight, strict=True))
    return torch.cat([g @ matrix for g, _, matrix in groups]), torch.stack([g.T @ x for g, x, _ in groups])


def _has_kernel(weight: Tensor) -> bool:
    """It wants fp32 or less, and rows that begin at multiples of 16 bytes."""
    aligned = all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])
    return weight.dtype != torch.float64 and aligned


def _ends(counts: Tensor) -> Tensor:
    return counts.cumsum(0).to(torch.int32)


@grouped_linear.register_fake
def _(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@_grouped_linear_backward.register_fake
def _(grad: Tensor, rows: Tensor, weight: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_grouped_linear_backward(grad, *ctx.saved_tensors), None


grouped_linear.register_autograd(_backward, setup_context=_save)


class Experts(nn.Module):
    """E MLPs without biases: down(act(up x)), or down(act(gate x) * up x)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        E, h, f = cfg.moe_num_experts, cfg.hidden_size, cfg.expert_size
        self.activation = look_up(ACTIVATIONS, cfg.activation, "model.activation")
        self.gate = Stack(E, h, f) if cfg.gated else None
        self.up, self.down = Stack(E, h, f), Stack(E, f, h)

    @property
    def count(self) -> int:
        """Experts held here."""
        return len(self.up.weight)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """`[R, h]` sorted by expert, int64 counts `[E]`, to `[R, h]`."""
        up = self.up(rows, counts)
        inner = self.activation(up) if self.gate is None else self.activation(self.gate(rows, counts)) * up
        return self.down(inner.contiguous(), counts)


class Router(nn.Module):
    """Hidden states -> which k experts a token goes to, and with which weights; always in fp32.

    `bias` moves only the choice, not the weights. It is no weight that is trained: `rebalance` moves it.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.k, self.kind, self.score = cfg.moe_top_k, cfg.moe_router, cfg.moe_score
        self.normalise, self.jitter, self.rate = cfg.moe_normalise, cfg.moe_jitter, cfg.moe_bias_rate
        self.weight = nn.Parameter(torch.empty(cfg.moe_num_experts, cfg.hidden_size))
        self.bias = nn.Parameter(torch.zeros(cfg.moe_num_experts), requires_grad=False) if self.rate else None

    def forward(self, x: Tensor, layer: int, context: Context) -> tuple[Tensor, Routing]:
        """`[B, S, h]` to fp32 weights `[B, S, k]` and the routing."""
        x = jitter(wide(x), self.jitter, context.dropout, layer)
        logits = F.linear(x, wide(self.weight).to(x.dtype))
        scores = logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()
        with torch.no_grad():
            preference = scores if self.bias is None else scores + self.bias
            # Sinkhorn looks at all tokens at once, later ones too: it is for training alone.
            if self.kind == "sinkhorn" and context.collected is not None:
                preference = sinkhorn(logits.flatten(0, -2)).view_as(logits)
            chosen = preference.topk(self.k, -1).indices
        weights = scores.gather(-1, chosen)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
        return weights, Routing(logits, scores, chosen)

    @torch.no_grad()
    def rebalance(self, counts: Tensor, local: Tensor | None = None, first: int = 0) -> None:
        """Move the biases by the counts `[E]` of the global batch (Wang et al. 2024, algorithm 1).

        Args:
            local, first: the biases that are held here, and the number of the first; None: all.
        """
        if self.bias is not None:
            held = self.bias if local is None else local
            counts = counts.to(held.device, held.dtype)
            held.add_((counts.mean() - counts).sign()[first : first + len(held)], alpha=self.rate)


class MoE(nn.Module):
    """The mixture; stands where an MLP would.

    Attributes:
        dispatcher: brings tokens to experts; a parallel run puts its own here.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.router, self.experts = Router(cfg), Experts(cfg)
        size = cfg.moe_shared_experts * cfg.expert_size
        self.shared = MLP(cfg, size, bias=False) if size else None

    def forward(self, x: Tensor, layer: int, context: Context) -> Tensor:
        """`[B, S, h]` to fp32 `[B, S, h]`; `layer` is the number of the executed layer."""
        weights, routing = self.router(x, layer, context)
        if context.collected is not None:
            context.collected.routing[layer] = routing
        flat = x.to(self.experts.up.weight.dtype).flatten(0, -2)
        y = self.dispatcher(flat, routing.chosen.flatten(0, -2), weights.flatten(0, -2), self.experts).view(x.shape)
        return y if self.shared is None else y + self.shared(x)


def sinkhorn(logits: Tensor, rounds: int = 3, tolerance: float = 1e-4) -> Tensor:
    """exp(logits) with rows and columns scaled towards equal sums: `[T, E]` to the same, as GPT-NeoX does it.

    It ends after `rounds`, or once the column factors move by less than the tolerance on average, which
    for long micro-batches is after the first round.
    """
    cost = wide(logits).exp()
    T, E = cost.shape
    columns = 1 / (E * cost.sum(0))
    rows = torch.zeros(T, dtype=cost.dtype, device=cost.device)
    going = torch.ones((), dtype=torch.bool, device=cost.device)
    for _ in range(rounds):
        new_rows = 1 / (T * ((columns * cost).sum(1) + 1e-8))
        new_columns = 1 / (E * ((new_rows.unsqueeze(1) * cost).sum(0) + 1e-8))
        moved = (columns - new_columns).abs().mean()
        rows, columns = torch.where(going, new_rows, rows), torch.where(going, new_columns, columns)
        going = going & (moved > tolerance)
    return columns * cost * rows.unsqueeze(1)
