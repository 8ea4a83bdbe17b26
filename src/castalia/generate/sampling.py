"""Logits -> the next token: penalties, temperature, top-k, nucleus, min-p, and a draw that repeats by its seed.

    logits [B,V] ─repetition─ / temperature ─top-k─ softmax ─top-p─ min-p─> probabilities [B,V] ─u~U(0,1)─> ids [B]

Each sequence draws from its own generator, one uniform number per token, and the token is
where that number falls on the cumulative distribution. So what a sequence draws does not
depend on which others share its batch. Everything here is a pure function of its
arguments, apart from the generators' state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from castalia.errors import UserError

_BLOCK = 128
_HEAD = 1024  # of the most probable tokens, among which the end of a nucleus is looked for first


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the most probable token.
        top_k: only the k most probable tokens; 0 or None: all.
        top_p: only the smallest set of most probable tokens whose probability reaches p
            (Holtzman et al. 2020), at least one; 1 or None: all.
        min_p: only tokens at least so probable, relative to the most probable one (Nguyen et al. 2024);
            0 or None: all.
        repetition_penalty: logits of the tokens of prompt and continuation are divided by it where positive
            and multiplied where negative (Keskar et al. 2019); 1: no penalty.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; give 0 (greedy) or a positive number")
        if self.top_k is not None and self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; give a positive number of tokens, or 0 for all of them")
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; give a probability from 0 to 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"min_p is {self.min_p}; give a share of the largest probability, from 0 to 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(f"repetition_penalty is {self.repetition_penalty}; give a positive number, 1 for none")


def mask_padding(logits: Tensor, vocab_size: int) -> Tensor:
    """Rule out ids >= `vocab_size`: rows that exist only to round up the vocabulary mean nothing."""
    if logits.shape[-1] <= vocab_size:
        return logits
    padding = torch.arange(logits.shape[-1], device=logits.device) >= vocab_size
    return logits.masked_fill(padding, float("-inf"))


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens less likely that were there before: bool `seen` and logits `[B, V]`."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _first(values: Tensor, threshold: Tensor, count: Tensor | int) -> Tensor:
    """bool `[B, V]`: what exceeds a row's threshold `[B, 1]`, and what equals it, lowest ids first, `count` in all."""
    above, equal = values > threshold, values == threshold
    return above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Rule out all but the k largest logits of each row; of equal ones the lower id stays."""
    if k >= logits.shape[-1]:
        return logits
    threshold = logits.topk(k, -1).values[..., -1:]
    return logits.masked_fill(~_first(logits, threshold, k), float("-inf"))


def keep_top_p(probabilities: Tensor, p: float) -> Tensor:
    """Zero all but the nucleus of each row and rescale to sum 1.

    The nucleus is the shortest prefix, in order of decreasing probability, whose sum reaches p: a token
    stays if what precedes it has not reached p yet. The first token has nothing before it and stays.
    """
    if p >= 1:
        return probabilities
    # Sorting a whole vocabulary takes longer than a step of a small model, and the end is mostly near.
    ranked = probabilities.topk(min(_HEAD, probabilities.shape[-1]), -1).values
    if bool((ranked.sum(-1) <= p).any()):
        ranked = probabilities.sort(dim=-1, descending=True).values
    before = ranked.cumsum(-1) - ranked
    count = (before < p).sum(-1, keepdim=True).clamp(min=1)
    kept = probabilities * _first(probabilities, ranked.gather(-1, count - 1), count)
    return kept / kept.sum(-1, keepdim=True)


def keep_min_p(probabilities: Tensor, share: float) -> Tensor:
    """Zero what is less than `share` times the row's largest probability and rescale to sum 1."""
    kept = probabilities * (probabilities >= share * probabilities.amax(-1, keepdim=True))
    return kept / kept.sum(-1, keepdim=True)


def next_token_probabilities(logits: Tensor, settings: SamplingSettings, vocab_size: int | None = None) -> Tensor:
    """The distribution that the next token is drawn from.

    Args:
        logits: `[B, V]`.
        settings: temperature, then top-k, then top-p, then min-p, in this order (the penalty is `sample`'s).
        vocab_size: ids from here on are padding and get probability 0; None: there is none.

    Returns:
        float64 `[B, V]`, each row summing to 1. With temperature 0 the most probable token has
        probability 1 (of equal ones the lowest id).
    """
    # In double precision, so that a nucleus' edge and the cumulative sum over 50,000 tokens are not
    # decided by rounding.
    logits = logits.double()
    if vocab_size is not None:
        logits = mask_padding(logits, vocab_size)
    if settings.temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    # Subtract the maximum first: a tiny temperature must not overflow to inf - inf.
    logits = (logits - logits.amax(-1, keepdim=True)) / settings.temperature
    if settings.top_k:
        logits = keep_top_k(logits, settings.top_k)
    probabilities = logits.softmax(-1)
    if settings.top_p is not None:
        probabilities = keep_top_p(probabilities, settings.top_p)
    return keep_min_p(probabilities, settings.min_p) if settings.min_p else probabilities


def largest(values: Tensor) -> Tensor:
    """As `argmax(-1)` of `[B, V]`, the lowest id of equal ones; on CPUs ten times as quick.

    argmax goes number by number there, the maximum of a block does not: so it is the first block with the largest
    maximum, and the first of its values that equals it.
    """
    width, whole = values.shape[-1], values.shape[-1] // _BLOCK * _BLOCK
    if values.device.type != "cpu" or not whole:
        return values.argmax(-1)
    tops = values[:, :whole].unflatten(-1, (-1, _BLOCK)).amax(-1)
    if whole < width:
        tops = torch.cat([tops, values[:, whole:].amax(-1, keepdim=True)], -1)
    ids = (tops.argmax(-1, keepdim=True) * _BLOCK + torch.arange(_BLOCK)).clamp_(max=width - 1)
    return ids.gather(-1, values.gather(-1, ids).argmax(-1, keepdim=True)).squeeze(-1)


def logprobs_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Natural log-probabilities `[B]` of ids `[B]` under logits `[B, V]`."""
    # Row by row where that keeps what it needs besides in a CPU's cache, and the memory's allocator out of it.
    rows = [row.logsumexp(-1) for row in logits] if logits.device.type == "cpu" else None
    total = logits.logsumexp(-1) if rows is None else torch.stack(rows)
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - total


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The id at which the cumulative distribution passes a uniform number.

    Args:
        probabilities: float64 `[B, V]`; rows need not sum to exactly 1.
        uniforms: float64 `[B]` in [0, 1).

    Returns:
        int64 `[B]`; never an id of probability 0.
    """
    cumulative = probabilities.cumsum(-1)
    # Scaled by the row's own total, so that rounding cannot leave a gap at the end. `right` skips ids of
    # probability 0, whose cumulative value equals their predecessor's.
    target = uniforms.unsqueeze(-1).to(cumulative.device) * cumulative[..., -1:]
    ids = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    # A number that rounds up to the whole total passes nothing: then it is the last id that can be drawn.
    beyond = ids >= probabilities.shape[-1]
    if bool(beyond.any()):
        last = probabilities.shape[-1] - 1 - (probabilities.flip(-1) > 0).int().argmax(-1)
        ids = torch.where(beyond, last, ids)
    return ids


def sample(
    logits: Tensor,
    settings: SamplingSettings,
    generators: Sequence[torch.Generator],
    vocab_size: int | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """Choose the next token of each sequence.

    Args:
        logits: `[B, V]`.
        settings: how to choose.
        generators: one per sequence, on the CPU; each gives one number (none when greedy).
        vocab_size: ids from here on are never chosen.
        seen: bool `[B, V]`, needed for a repetition penalty: the tokens that were there before.

    Returns:
        int64 `[B]`.
    """
    if seen is not None:
        logits = penalise(logits, seen, settings.repetition_penalty)
    if settings.temperature == 0:
        return largest(logits[:, :vocab_size])
    uniforms = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
    return draw(next_token_probabilities(logits, settings, vocab_size), uniforms)


def make_generator(seed: int, index: int) -> torch.Generator:
    """The generator of sequence number `index` under `seed`.

    Hashed, because generators seeded with neighbouring numbers need not be independent and because
    (seed 0, index 1) must differ from (seed 1, index 0).
    """
    digest = hashlib.sha256(f"castalia sample {seed} {index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
