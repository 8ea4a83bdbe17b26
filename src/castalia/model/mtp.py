"""Multi-token prediction: small modules that look further ahead than the next token, in training only.

    hidden [B,S,h] ──norm─┐
    embedding of t(i+d) ─norm─┴─[2h]─join─> [h] ─block─> ... ──norm──> predicts label i + d

The d-th module (d = 1, 2, ...) takes what the one before left at place i and the embedding of the
token d places on, and predicts the label d places on, with the model's own embedding and output
matrix (DeepSeek-V3, 2024, equations 21 to 25). Its causal chain is kept, so the whole sequence is
trained at once. A model that generates never runs them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from castalia.config import ModelConfig
from castalia.model.layers import Context, Linear
from castalia.model.norms import make_norm, wide
from castalia.model.registry import BLOCKS, look_up


class AheadModule(nn.Module):
    """One module: a projection of two normed vectors, and a block of the last layer's kind."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.hidden_norm, self.embedding_norm, self.norm = make_norm(cfg), make_norm(cfg), make_norm(cfg)
        self.join = Linear(2 * cfg.hidden_size, cfg.hidden_size, bias=False)
        self.block = look_up(BLOCKS, cfg.block, "model.block")(cfg, (cfg.num_unique_layers or cfg.num_layers) - 1)

    def forward(self, x: Tensor, embedded: Tensor, layer: int, context: Context) -> Tensor:
        """fp32 `[B, S, h]` and embeddings `[B, S, h]` to fp32 `[B, S, h]`, not yet normed."""
        both = torch.cat([self.hidden_norm(x), self.embedding_norm(embedded)], -1)
        out: Tensor = self.block(wide(self.join(both)), layer, context)
        return out


def shifted(x: Tensor, count: int, fill: int) -> Tensor:
    """`[B, S]` with each value `count` places earlier, and `fill` at the end."""
    count = min(count, x.shape[1])
    return torch.cat([x[:, count:], x.new_full((len(x), count), fill)], 1)
