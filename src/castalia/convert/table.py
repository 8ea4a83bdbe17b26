"""Names and shapes of one state dict <-> those of another, from one table read in both directions.

A `Row` says which tensors on one side are which on the other, and how to transform them:

    ours: layers.3.attention.qkv.weight  <──one row──>  theirs: ...q_proj, ...k_proj, ...v_proj

so that what an export writes, an import reads, and a test can hold the one to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from castalia.errors import UserError

Transform = Callable[[Sequence[Tensor]], Sequence[Tensor]]

_NAMED_AT_MOST = 3


def unchanged(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The same tensors."""
    return tensors


@dataclass(frozen=True)
class Row:
    """Tensors of ours that are tensors of theirs.

    Attributes:
        ours, theirs: names.
        to_theirs, to_ours: one takes tensors in the order of `ours` and returns them in that of
            `theirs`; the other is its inverse.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_theirs: Transform = unchanged
    to_ours: Transform = unchanged


def to_theirs(rows: Iterable[Row], weights: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Translate our tensors to their names.

    Args:
        what: names the tensors in messages.

    Raises:
        UserError: a tensor is missing or left over.
    """
    return _translate([(r.ours, r.theirs, r.to_theirs) for r in rows], weights, what)


def to_ours(rows: Iterable[Row], weights: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Translate their tensors to our names; see `to_theirs`."""
    return _translate([(r.theirs, r.ours, r.to_ours) for r in rows], weights, what)


def _translate(
    rows: Sequence[tuple[tuple[str, ...], tuple[str, ...], Transform]],
    weights: Mapping[str, Tensor],
    what: str,
) -> dict[str, Tensor]:
    expected = [name for source, _, _ in rows for name in source]
    check_names(expected, weights, what)
    done: dict[str, Tensor] = {}
    for source, target, transform in rows:
        done |= zip(target, _applied(transform, {name: weights[name] for name in source}, what), strict=True)
    return done


def row_to_theirs(row: Row, weights: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """One row's tensors under their names; `weights` is asked for these alone, and may read them from a file."""
    tensors = _applied(row.to_theirs, {name: weights[name] for name in row.ours}, what)
    return dict(zip(row.theirs, tensors, strict=True))


def row_to_ours(row: Row, weights: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """One row's tensors under our names; see `row_to_theirs`."""
    tensors = _applied(row.to_ours, {name: weights[name] for name in row.theirs}, what)
    return dict(zip(row.ours, tensors, strict=True))


def _applied(transform: Transform, weights: Mapping[str, Tensor], what: str) -> Sequence[Tensor]:
    try:
        return transform(list(weights.values()))
    except RuntimeError as error:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in weights.items())
        raise UserError(f"{what}: {shapes} does not fit the configuration: use the one it was trained with") from error


def check_names(expected: Collection[str], found: Collection[str], what: str) -> None:
    """Refuse missing and left-over names.

    Raises:
        UserError: naming the first few.
    """
    for text, names in (
        ("does not hold", [n for n in expected if n not in found]),
        ("holds what the configuration has no place for:", sorted(set(found) - set(expected))),
    ):
        if names:
            more = len(names) - _NAMED_AT_MOST
            listed = ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")
            raise UserError(f"{what}: {text} {listed}: use the configuration that it was trained with")


def join_qkv(query: Tensor, key: Tensor, value: Tensor, kv_heads: int, head_size: int) -> Tensor:
    """Separate projections -> our rows, grouped per key/value head: its query heads, its key, its value.

    Args:
        query: [n d, ...], heads in order (head a reads key/value head a // (n / k)).
        key, value: [k d, ...].

    Returns:
        [(n + 2k) d, ...].
    """
    parts = [t.reshape(kv_heads, -1, head_size, *t.shape[1:]) for t in (query, key, value)]
    return torch.cat(parts, dim=1).reshape(-1, *query.shape[1:])


def split_qkv(qkv: Tensor, heads: int, kv_heads: int, head_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `join_qkv`: [(n + 2k) d, ...] -> [n d, ...], [k d, ...], [k d, ...]."""
    grouped = qkv.reshape(kv_heads, heads // kv_heads + 2, head_size, *qkv.shape[1:])
    query, key, value = grouped.split([heads // kv_heads, 1, 1], dim=1)
    rest = qkv.shape[1:]
    return query.reshape(-1, *rest), key.reshape(-1, *rest), value.reshape(-1, *rest)
