"""Hidden states and the output matrix -> summed cross-entropy, without ever holding all logits.

The logits exist for `chunk_size` tokens at a time, in one reused buffer. Where a gradient is
wanted it is computed at once, in the same pass, and backward only hands it over:

    chunk of hidden ─mm─> logits ─exp in place─> e ──┬─ mm(e, W) · 1/z        -> d hidden
                             │                       └─ mm(e^T, hidden · 1/z) -> d W
                             └─ max, z = sum e, e_target -> nll = log z + max - logit_target

The softmax is never normalised on the [tokens, V] side: the row factor 1/z goes on the small
[tokens, h] operands. Statistics are fp32; products run in the dtype of the matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100
# Rows of logits whose fp32 exponentials are in flight at once: small enough to stay in a CPU's cache.
_SCRATCH_ELEMENTS = 1 << 21
# Chunks whose weight gradients are summed in bf16 before the sum is moved to fp32.
_CHUNKS_IN_LOW = 4


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, scale: float | Tensor = 1.0, chunk_size: int = 512
) -> tuple[Tensor, Tensor]:
    """Sum of negative log-likelihoods of next tokens.

    Args:
        hidden: `[..., h]` hidden states.
        weight: `[V, h]` output matrix; its dtype is that of the products.
        labels: int64 `[...]`, already shifted; -100 is ignored.
        scale: factor on the returned sum (and so on the gradients), for example 1 / tokens.
        chunk_size: tokens whose logits exist at once.

    Returns:
        The scaled sum, a fp32 scalar that can be differentiated once with respect to `hidden` and `weight`,
        and the unscaled sum as fp64, detached.
    """
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    scaled, plain = _LinearCrossEntropy.apply(flat, weight, targets, scale, chunk_size)
    return scaled, plain


def token_nll(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int = 512) -> Tensor:
    """Negative log-likelihood of each label, fp32, shaped as `labels`; 0 where ignored. No gradient."""
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    nll = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
    with torch.no_grad():
        for rows in _chunks(len(targets), chunk_size):
            logits = (flat[rows].to(weight.dtype) @ weight.T).float()
            at = targets[rows].clamp(min=0)
            chosen = logits.gather(1, at[:, None]).squeeze(1)
            nll[rows] = (logits.logsumexp(1) - chosen).masked_fill_(targets[rows] == IGNORED, 0.0)
    return nll.view(labels.shape)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, scale: float | Tensor, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        tokens, wants = len(labels), any(ctx.needs_input_grad[:2])
        d_hidden = torch.empty_like(hidden, dtype=torch.float32) if wants else None
        d_weight = _WeightGradient(weight) if wants else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        buffer = torch.empty(min(chunk_size, tokens), weight.shape[0], dtype=weight.dtype, device=weight.device)
        for rows in _chunks(tokens, chunk_size):
            h, targets = hidden[rows].to(weight.dtype), labels[rows]
            logits = torch.mm(h, weight.T, out=buffer[: len(targets)])
            valid = targets != IGNORED
            at = torch.arange(len(targets), device=targets.device) * logits.shape[1] + targets.clamp(min=0)
            chosen = logits.view(-1)[at].float()
            peak = logits.amax(1, keepdim=True)
            z = _exponentiate(logits, peak)
            nll = z.log() + peak.squeeze(1).float() - chosen
            total += nll.masked_fill(~valid, 0.0).sum(dtype=torch.float64)
            if d_hidden is None or d_weight is None:
                continue
            # Gradient of a row's nll is (e - z at the target) / z; the division is on the small side.
            target_e = logits.view(-1)[at].float()
            logits.view(-1).index_copy_(0, at, (target_e - z).to(logits.dtype))
            factor = ((valid / z) * scale).unsqueeze(1)
            torch.mul(torch.mm(logits, weight), factor, out=d_hidden[rows])
            d_weight.add(logits, (hidden[rows] * factor).to(weight.dtype))
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.result())
        ctx.hidden_dtype = hidden.dtype
        ctx.mark_non_differentiable(total)
        return (total * scale).to(torch.float32), total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        if grad.device.type != "cpu" or grad.item() != 1.0:  # the usual 1.0 saves a pass where looking is free
            d_hidden, d_weight = d_hidden * grad, d_weight * grad
        return d_hidden.to(ctx.hidden_dtype), d_weight, None, None, None


class _WeightGradient:
    """Sum over chunks of e^T h, in the dtype of the matrix but for long sums.

    A sum in bf16 loses more the more chunks it has, so after every few it is moved to fp32: the error
    stays that of a few roundings, and a short micro-batch pays nothing.
    """

    def __init__(self, weight: Tensor) -> None:
        self._part = torch.empty_like(weight)
        self._total: Tensor | None = None
        self._chunks = 0
        self._low = weight.dtype != torch.float32

    def add(self, e: Tensor, h: Tensor) -> None:
        """Add e^T h; e `[t, V]`, h `[t, hidden]`."""
        if self._low and self._chunks == _CHUNKS_IN_LOW:
            self._flush()
        torch.addmm(self._part, e.T, h, beta=min(self._chunks, 1), out=self._part)
        self._chunks += 1

    def result(self) -> Tensor:
        """The sum, in the dtype of the matrix."""
        if self._total is None:
            return self._part
        self._flush()
        return self._part.copy_(self._total)

    def _flush(self) -> None:
        self._total = self._part.float() if self._total is None else self._total.add_(self._part)
        self._chunks = 0


def _chunks(tokens: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _exponentiate(logits: Tensor, peak: Tensor) -> Tensor:
    """exp(logits - peak) in place; returns the fp32 row sums of what was stored.

    The sum is taken of the rounded values, so that each row of probabilities adds up to one
    whatever the dtype. fp32 scratch is small, not the size of the logits.
    """
    if logits.device.type != "cpu":
        logits.copy_((logits.float() - peak.float()).exp_())
        return logits.sum(1, dtype=torch.float32)
    z = torch.empty(len(logits), dtype=torch.float32)
    step = max(1, _SCRATCH_ELEMENTS // logits.shape[1])
    scratch = None if logits.dtype == torch.float32 else torch.empty(min(step, len(logits)), logits.shape[1])
    for rows in _chunks(len(logits), step):
        part = logits[rows]
        e = part if scratch is None else scratch[: len(part)].copy_(part)
        e.sub_(peak[rows].float()).exp_()
        if scratch is not None:
            e.copy_(part.copy_(e))
        torch.sum(e, 1, out=z[rows])
    return z
