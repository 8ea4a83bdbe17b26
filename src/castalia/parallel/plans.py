"""Where each parameter is cut for tensor parallelism: a table of patterns, and arithmetic on it.

    name ──pattern──> Cut(dim) or whole ──bounds(size, ranks, rank)──> the rectangle a rank holds

A pattern is the canonical name with `*` for a layer's number. Rows of `qkv` are grouped per
key/value head, so that a contiguous cut gives each rank whole heads. A parameter without an
entry has no plan, and the layout is refused rather than guessed at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from castalia.errors import UserError

ROWS, COLUMNS, WHOLE, WHOLE_PARTIAL = 0, 1, None, "partial"

# Of what stays whole, `partial` marks what each rank uses for its own heads alone: gradients are then summed.
TENSOR_PLAN: dict[str, int | str | None] = {
    "embedding.weight": ROWS,
    "head.*": ROWS,
    "position_embedding.weight": WHOLE,
    "embedding_norm.*": WHOLE,
    "position_embedding_norm.*": WHOLE,
    "soft_prompt.weight": WHOLE,
    "relative_bias.weight": WHOLE_PARTIAL,
    "layers.*.attention_norm.*": WHOLE,
    "layers.*.mlp_norm.*": WHOLE,
    "layers.*.attention.qkv.*": ROWS,
    "layers.*.attention.qk_norm.*": ROWS,
    "layers.*.attention.out.weight": COLUMNS,
    "layers.*.attention.out.bias": WHOLE,
    "layers.*.mlp.up.*": ROWS,
    "layers.*.mlp.gate.*": ROWS,
    "layers.*.mlp.down.weight": COLUMNS,
    "layers.*.mlp.down.bias": WHOLE,
    "layers.*.mlp.router.weight": WHOLE_PARTIAL,
    "layers.*.mlp.router.bias": WHOLE,
    "layers.*.mlp.experts.up.weight": 1,
    "layers.*.mlp.experts.gate.weight": 1,
    "layers.*.mlp.experts.down.weight": 2,
    "layers.*.mlp.shared.up.weight": ROWS,
    "layers.*.mlp.shared.gate.weight": ROWS,
    "layers.*.mlp.shared.down.weight": COLUMNS,
    "final_norm.*": WHOLE,
}


@dataclass(frozen=True)
class Place:
    """The rectangle of one parameter that this rank holds.

    Attributes:
        shape: of the whole parameter.
        offset, local: where the rectangle begins, and its own shape.
        copies: ranks of the world that hold the same rectangle.
        partial: its gradients are to be summed over the tensor ranks, each of which saw a part of the uses.
    """

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    local: tuple[int, ...]
    copies: int = 1
    partial: bool = False


def bounds(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """The rank's contiguous share of `size` things: first and one beyond the last; sizes differ by one at most."""
    each, more = divmod(size, ranks)
    first = rank * each + min(rank, more)
    return first, first + each + (rank < more)


def entry(name: str) -> int | str | None:
    """What the plan says of a parameter.

    Raises:
        UserError: nothing.
    """
    pattern = re.sub(r"^layers\.\d+\.", "layers.*.", name)
    for key in (pattern, re.sub(r"\.(weight|bias)$", ".*", pattern)):
        if key in TENSOR_PLAN:
            return TENSOR_PLAN[key]
    raise UserError(
        f"parallel.tensor: there is no plan for cutting {name} among ranks; set parallel.tensor=1 for this model"
    )


def tensor_places(
    shapes: Mapping[str, tuple[int, ...]], ranks: int, rank: int, sequence: bool, copies: int
) -> dict[str, Place]:
    """Each parameter's rectangle on one of the tensor-parallel ranks.

    Args:
        shapes: whole shapes by name.
        sequence: between matrices, each rank sees its share of the sequence alone.
        copies: ranks that hold the same where it is cut.
    """
    places = {}
    for name, shape in shapes.items():
        cut = entry(name) if ranks > 1 else WHOLE
        if isinstance(cut, int) and shape[cut] > 1:
            first, end = bounds(shape[cut], ranks, rank)
            offset = tuple(first if d == cut else 0 for d in range(len(shape)))
            local = tuple(end - first if d == cut else n for d, n in enumerate(shape))
            places[name] = Place(shape, offset, local, copies)
        else:
            among_parts = sequence and name.startswith(("layers.", "final_norm."))
            # A gain of one number for all heads (scalenorm of queries and keys) is used by each rank for its own.
            partial = ranks > 1 and (among_parts or cut is not WHOLE)
            places[name] = Place(shape, (0,) * len(shape), shape, copies * ranks, partial)
    return places
