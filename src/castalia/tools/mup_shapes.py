"""A configuration -> GPT-NeoX's file of base shapes, as its `save_base_shapes` writes it.

    base model, and one twice as wide ──sizes that differ──> sequential.2.attention.dense.weight: [256, 256]
                                        sizes that do not ─> sequential.0.word_embeddings.weight: [null, 256]

For one rank without a pipeline, whose modules GPT-NeoX calls `sequential`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from castalia.config import ModelConfig
from castalia.convert.gptneox_table import table
from castalia.convert.table import to_theirs
from castalia.errors import UserError
from castalia.model.transformer import Transformer
from castalia.tools.mup import at_width


def base_shapes_text(cfg: ModelConfig) -> str:
    """The file's text.

    Raises:
        UserError: muP is off, or GPT-NeoX has no such model.
    """
    base = cfg.mup_base_hidden_size
    if not cfg.mup or base is None:
        raise UserError("model.mup is false: base shapes need model.mup_base_hidden_size; set both")
    small, delta = (_shapes(at_width(cfg, hidden, base)) for hidden in (base, 2 * base))
    lines = []
    for name, shape in small.items():
        sizes = ("null" if n == m else str(n) for n, m in zip(shape, delta[name], strict=True))
        lines.append(f"sequential.{name}: [{', '.join(sizes)}]")
    return "\n".join(lines) + "\n"


def _shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        weights: dict[str, Tensor] = {n: p.detach() for n, p in Transformer(cfg).named_parameters()}
        theirs = to_theirs(table(cfg), weights, "base shapes")
    return {name: tuple(tensor.shape) for name, tensor in theirs.items()}
