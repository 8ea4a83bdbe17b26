"""Hidden states and the output matrix -> summed cross-entropy, without ever holding all logits.

The logits exist for `chunk_size` tokens at a time, in one reused buffer. Where a gradient is
wanted it is computed at once, in the same pass, and backward only hands it over:

    chunk of hidden ─mm─> logits ─exp in place─> e ──┬─ mm(e, W) · 1/z        -> d hidden
                             │                       └─ mm(e^T, hidden · 1/z) -> d W
                             └─ max, z = sum e, e_target -> nll = log z + max - logit_target

The softmax is never normalised on the [tokens, V] side: the row factor 1/z goes on the small
[tokens, h] operands. Statistics are fp32 (fp64 for an fp64 matrix); products run in the dtype
of the matrix. In fp16, whose range z leaves, the rows are normalised after all. The z-loss
(Chowdhery et al. 2022) adds a multiple of (log sum exp logits)^2 to each token's loss, in the same pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from castalia.model.registry import LOSSES, register

IGNORED = -100
# Logits whose fp32 exponentials are in flight at once: a few rows, small enough to stay in a CPU's second-level
# cache from the search for the largest to the sum.
_SCRATCH_ELEMENTS = 1 << 18
# Chunks whose weight gradients are summed in 16 bits before the sum is moved to fp32.
_CHUNKS_IN_LOW = 4


class VocabularyShard(Protocol):
    """What the loss needs of other ranks where each holds some rows of the output matrix.

    Then each rank's gradient of the hidden states is its rows' contribution; the sum is for the caller to make.
    """

    first: int
    """Number of the first row that is held here."""

    def largest(self, x: Tensor) -> Tensor:
        """The elementwise maximum over the ranks."""
        ...

    def total(self, x: Tensor) -> Tensor:
        """The elementwise sum over the ranks."""
        ...


class WeightSink(Protocol):
    """Takes the gradient of the output matrix, chunk by chunk, where it is to be in the end."""

    def add(self, e: Tensor, h: Tensor) -> None:
        """Add e^T h; e `[t, V]`, h `[t, hidden]`."""
        ...


class Workspace:
    """The buffer of logits, kept from one micro-batch to the next: fresh memory costs a CPU as much as a pass."""

    _flat: Tensor | None = None

    def logits(self, rows: int, weight: Tensor) -> Tensor:
        """`[rows, V]`, of the matrix's dtype and device."""
        size = rows * weight.shape[0]
        flat = self._flat
        if flat is None or flat.numel() < size or flat.dtype != weight.dtype or flat.device != weight.device:
            self._flat = flat = torch.empty(size, dtype=weight.dtype, device=weight.device)
        return flat[:size].view(rows, weight.shape[0])


class LossSums(NamedTuple):
    """What a micro-batch's tokens lose.

    Attributes:
        scaled: scale x (negative log-likelihoods + z_loss x squares), summed; a fp32 scalar that can be
            differentiated once with respect to hidden states, weight and bias.
        nll: negative log-likelihoods in nats, unscaled sum, fp64, detached.
        z_squares: (log sum exp logits)^2, unscaled sum, fp64, detached.
    """

    scaled: Tensor
    nll: Tensor
    z_squares: Tensor


@register(LOSSES, "cross_entropy")
def loss_sums(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | Tensor = 1.0,
    z_loss: float = 0.0,
    chunk_size: int = 512,
    shard: VocabularyShard | None = None,
    workspace: Workspace | None = None,
    sink: WeightSink | None = None,
) -> LossSums:
    """Losses of next tokens, summed.

    Args:
        hidden: `[..., h]` hidden states.
        weight: `[V, h]` output matrix; its dtype is that of the products.
        labels: int64 `[...]`, already shifted; -100 is ignored.
        bias: `[V]`, added to the logits.
        scale: factor on the returned sum (and so on the gradients), for example 1 / tokens.
        z_loss: coefficient of the z-loss.
        chunk_size: tokens whose logits exist at once.
        shard: `weight` and `bias` are some rows of the matrix, others have the rest; None: they are the whole.
        workspace: where logits are; None: in memory of this call's own.
        sink: takes the gradient of `weight` (not of 16 bits) at once, instead of backward, in which the
            gradient of `scaled` must then be 1; None: backward hands it over.
    """
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    weight = weight if sink is None else weight.detach()
    more = workspace or Workspace(), sink
    return LossSums(*_LinearCrossEntropy.apply(flat, weight, bias, targets, scale, z_loss, chunk_size, shard, *more))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    scale: float | Tensor = 1.0,
    chunk_size: int = 512,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor]:
    """The scaled and the unscaled sum of negative log-likelihoods; see `loss_sums`."""
    sums = loss_sums(hidden, weight, labels, scale=scale, chunk_size=chunk_size, shard=shard)
    return sums.scaled, sums.nll


def token_nll(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int = 512, bias: Tensor | None = None
) -> Tensor:
    """Negative log-likelihood of each label, fp32, shaped as `labels`; 0 where ignored. No gradient."""
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    nll = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
    with torch.no_grad():
        for rows in _chunks(len(targets), chunk_size):
            logits = (flat[rows].to(weight.dtype) @ weight.T).float()
            if bias is not None:
                logits += bias
            at = targets[rows].clamp(min=0)
            chosen = logits.gather(1, at[:, None]).squeeze(1)
            nll[rows] = (logits.logsumexp(1) - chosen).masked_fill_(targets[rows] == IGNORED, 0.0)
    return nll.view(labels.shape)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        scale: float | Tensor,
        z_loss: float,
        chunk_size: int,
        shard: VocabularyShard | None,
        workspace: Workspace,
        sink: WeightSink | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, wants = len(labels), any(ctx.needs_input_grad[:3])
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        d_hidden = torch.empty_like(hidden, dtype=wide) if wants else None
        d_weight = None if not wants or sink is not None else _WeightGradient(weight)
        into: WeightSink | None = sink if wants and sink is not None else d_weight
        d_bias = torch.zeros_like(bias, dtype=wide) if wants and bias is not None else None
        half = weight.dtype == torch.float16
        outside = scale if half else 1.0
        total, squares = torch.zeros(2, dtype=torch.float64, device=hidden.device).unbind()
        buffer = workspace.logits(min(chunk_size, tokens), weight)
        for rows in _chunks(tokens, chunk_size):
            h, targets = hidden[rows].to(weight.dtype), labels[rows]
            logits = torch.mm(h, weight.T, out=buffer[: len(targets)])
            if bias is not None:
                logits += bias.to(logits.dtype)
            valid = targets != IGNORED
            here, column = _columns(targets, logits.shape[1], shard)
            at = torch.arange(len(targets), device=targets.device) * logits.shape[1] + column
            chosen = logits.view(-1)[at].to(wide)
            peak = None if shard is None else shard.largest(logits.amax(1, keepdim=True).contiguous())
            z, peak = _exponentiate(logits, peak, wide)
            if shard is not None:
                z, chosen = shard.total(torch.stack([z, chosen.masked_fill(~here, 0.0)])).unbind()
            log_z = z.log() + peak
            total += (log_z - chosen).masked_fill(~valid, 0.0).sum(dtype=torch.float64)
            squares += log_z.square().masked_fill(~valid, 0.0).sum(dtype=torch.float64)
            if d_hidden is None or into is None:
                continue
            # Gradient of a row's nll is (e - z at the target) / z; the division is on the small side. The square
            # of log z adds 2 log z e / z.
            if z_loss > 0:
                logits.mul_((1 + 2 * z_loss * log_z).unsqueeze(1).to(logits.dtype))
            if half:
                # z goes beyond fp16's largest number and scale / z below its smallest: the rows are made
                # probabilities, and the scale waits for the wide sums.
                logits.mul_((valid / z).unsqueeze(1))
                z, factor = valid.to(wide), torch.ones_like(z).unsqueeze(1)
            else:
                factor = ((valid / z) * scale).unsqueeze(1)
            target_e = logits.view(-1)[at].to(wide)
            logits.view(-1).index_copy_(0, at, torch.where(here, target_e - z, target_e).to(logits.dtype))
            torch.mul(torch.mm(logits, weight), factor * outside, out=d_hidden[rows])
            into.add(logits, (hidden[rows] * factor).to(weight.dtype))
            if d_bias is not None:
                d_bias += torch.mm(logits.T, factor.to(logits.dtype)).squeeze(1) * outside
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.result(outside), d_bias)
        ctx.hidden_dtype, ctx.sunk = hidden.dtype, sink is not None
        ctx.mark_non_differentiable(total, squares)
        scaled = total + z_loss * squares if z_loss > 0 else total
        return (scaled * scale).to(wide), total, squares

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        if grad.device.type != "cpu" or grad.item() != 1.0:  # the usual 1.0 saves a pass where looking is free
            if ctx.sunk:
                raise RuntimeError("the gradient of the output matrix is summed already: the loss cannot be scaled now")
            d_hidden = d_hidden * grad
            d_weight, d_bias = (None if t is None else t * grad for t in (d_weight, d_bias))
        return d_hidden.to(ctx.hidden_dtype), d_weight, d_bias, *[None] * 7


class _WeightGradient:
    """Sum over chunks of e^T h, in the dtype of the matrix but for long sums.

    A sum in 16 bits loses more the more chunks it has, so after every few it is moved to fp32: the error
    stays that of a few roundings, and a short micro-batch pays nothing.
    """

    def __init__(self, weight: Tensor) -> None:
        self._part = torch.empty_like(weight)
        self._total: Tensor | None = None
        self._chunks = 0
        self._low = weight.dtype.itemsize < 4

    def add(self, e: Tensor, h: Tensor) -> None:
        """Add e^T h; e `[t, V]`, h `[t, hidden]`."""
        if self._low and self._chunks == _CHUNKS_IN_LOW:
            self._flush()
        torch.addmm(self._part, e.T, h, beta=min(self._chunks, 1), out=self._part)
        self._chunks += 1

    def result(self, factor: float | Tensor = 1.0) -> Tensor:
        """The sum times a factor, in the dtype of the matrix."""
        if self._total is None and isinstance(factor, float) and factor == 1.0:
            return self._part
        self._flush()
        assert self._total is not None
        return self._part.copy_(self._total.mul_(factor))

    def _flush(self) -> None:
        self._total = self._part.float() if self._total is None else self._total.add_(self._part)
        self._chunks = 0


def _columns(targets: Tensor, width: int, shard: VocabularyShard | None) -> tuple[Tensor, Tensor]:
    """For each target whether its column is held here, and which one (any, where it is not)."""
    column = targets if shard is None else targets - shard.first
    here = (column >= 0) & (column < width) if shard is not None else torch.ones_like(targets, dtype=torch.bool)
    return here, column.clamp(0, width - 1)


def _chunks(tokens: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _exponentiate(logits: Tensor, peak: Tensor | None, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """exp(logits - peak) in place.

    The sum is taken of the rounded values, so that each row of probabilities adds up to one
    whatever the dtype. On a CPU a few rows at a time go through all of it while they are in the
    cache, and the wide scratch is of that size.

    Args:
        peak: `[t, 1]`, what to subtract; None: each row's largest.
        wide: dtype of the statistics.

    Returns:
        The row sums of what was stored and what was subtracted, both wide `[t]`.
    """
    if logits.device.type != "cpu":
        peak = logits.amax(1, keepdim=True) if peak is None else peak
        logits.copy_((logits.to(wide) - peak.to(wide)).exp_())
        return logits.sum(1, dtype=wide), peak.squeeze(1).to(wide)
    z = torch.empty(len(logits), dtype=wide)
    peaks = torch.empty(len(logits), 1, dtype=wide) if peak is None else peak.to(wide)
    step = max(1, _SCRATCH_ELEMENTS // logits.shape[1])
    scratch = None if logits.dtype == wide else torch.empty(min(step, len(logits)), logits.shape[1], dtype=wide)
    for rows in _chunks(len(logits), step):
        part = logits[rows]
        e = part if scratch is None else scratch[: len(part)].copy_(part)
        if peak is None:
            torch.amax(e, 1, keepdim=True, out=peaks[rows])
        e.sub_(peaks[rows]).exp_()
        if scratch is not None:
            e.copy_(part.copy_(e))
        torch.sum(e, 1, out=z[rows])
    return z, peaks.squeeze(1)
