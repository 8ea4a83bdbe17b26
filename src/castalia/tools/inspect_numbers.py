"""Tensors -> the few numbers by which one judges them; two checkpoints -> where they differ.

Everything goes by in chunks, tensor by tensor, so that memory is bounded by the largest of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from castalia.tools.inspect import Contents, Entry

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Numbers:
    """Of the finite values: L2 norm, least, greatest (None where there are none); and counts of the others."""

    norm: float | None
    min: float | None
    max: float | None
    nan: int
    inf: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def numbers(tensor: Tensor) -> Numbers | None:
    """See `Numbers`; None for a kind of number that torch cannot convert."""
    square, least, greatest, nan, inf = 0.0, math.inf, -math.inf, 0, 0
    try:
        for chunk in _chunks(tensor):
            wrong = ~torch.isfinite(chunk)
            if wrong.any():
                nan += int(chunk.isnan().sum())
                inf += int(chunk.isinf().sum())
                chunk = chunk[~wrong]
            if chunk.numel():
                square += float(chunk.square().sum())
                least, greatest = min(least, float(chunk.min())), max(greatest, float(chunk.max()))
    except (RuntimeError, NotImplementedError):
        return None
    if least > greatest:
        return Numbers(None, None, None, nan, inf)
    return Numbers(math.sqrt(square), least, greatest, nan, inf)


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
    yield from (chunk.double() for chunk in flat.split(_CHUNK) if chunk.numel())


@dataclass(frozen=True)
class Difference:
    """One name on which two checkpoints disagree.

    Attributes:
        what: `only in A`, `only in B`, `shape`, `dtype`, `values`, `value` (of what is no tensor).
        a, b: what each has, as text.
        max_abs: the largest difference of two numbers; infinite where one is no finite number.
        max_rel: that, divided by the largest magnitude in either.
    """

    name: str
    what: str
    a: str | None = None
    b: str | None = None
    max_abs: float | None = None
    max_rel: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity."""
        return {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in asdict(self).items()}


def differences(first: Contents, second: Contents) -> Iterator[Difference]:
    """Where two checkpoints differ, in the order of the first one's names; nothing where they are equal."""
    mine, theirs = ({entry.name: entry for entry in side.tensors} for side in (first, second))
    for name in [*mine, *(name for name in theirs if name not in mine)]:
        if name not in theirs:
            yield Difference(name, "only in A", a=_about(mine[name]))
        elif name not in mine:
            yield Difference(name, "only in B", b=_about(theirs[name]))
        else:
            yield from _compared(mine[name], theirs[name])
    for name in [*first.values, *(name for name in second.values if name not in first.values)]:
        a, b = first.values.get(name), second.values.get(name)
        if a != b:
            what = "only in A" if b is None else "only in B" if a is None else "value"
            yield Difference(name, what, a, b)


def _about(entry: Entry) -> str:
    return f"{list(entry.shape)} {entry.dtype}"


def _compared(a: Entry, b: Entry) -> Iterator[Difference]:
    if a.shape != b.shape:
        yield Difference(a.name, "shape", str(list(a.shape)), str(list(b.shape)))
        return
    if a.dtype != b.dtype:
        yield Difference(a.name, "dtype", a.dtype, b.dtype)
    largest, magnitude = 0.0, 0.0
    for x, y in zip(_chunks(a.read()), _chunks(b.read()), strict=True):
        same = (x == y) | (x.isnan() & y.isnan())
        gap = torch.where(same, 0.0, (x - y).abs().nan_to_num(nan=math.inf))
        largest = max(largest, float(gap.max()))
        magnitude = max(magnitude, *(float(torch.where(t.isfinite(), t.abs(), 0.0).max()) for t in (x, y)))
    if largest:
        yield Difference(a.name, "values", max_abs=largest, max_rel=largest / magnitude if magnitude else math.inf)
