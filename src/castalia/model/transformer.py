"""Token ids -> hidden states -> logits: the decoder-only transformer.

    tokens [B,S] ─embedding─> x [B,S,h] ─block─> ... ─block─> x ─final norm─> hidden [B,S,h]
                                                                 hidden · head^T = logits [B,S,V]

The model stops at the hidden states. Whoever trains hands them, with the output matrix, to
the chunked loss, so that all logits never exist at once; whoever generates asks `logits`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from castalia.config import ModelConfig
from castalia.errors import UserError
from castalia.model.initial import initialise
from castalia.model.layers import MLP, Attention, Cache, make_norm, rotary_angles
from castalia.model.registry import BLOCKS, look_up, register


@register(BLOCKS, "transformer")
class Block(nn.Module):
    """Pre-norm attention and MLP, one after the other or side by side.

    sequential: a = x + attention(n1(x)); y = a + mlp(n2(a))
    parallel:   y = x + attention(n1(x)) + mlp(n2(x))        (GPT-J's and GPT-NeoX-20B's form)
    """

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.parallel = cfg.residual == "parallel"
        self.attention_norm = make_norm(cfg)
        self.attention = Attention(cfg, layer)
        self.mlp_norm = make_norm(cfg)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, cache: Cache | None = None) -> Tensor:
        """fp32 `[B, S, h]` to fp32 `[B, S, h]`."""
        attention = self.attention(self.attention_norm(x), rotary, cache)
        if self.parallel:
            return x + attention + self.mlp(self.mlp_norm(x))
        x = x + attention
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """A decoder-only language model.

    Args:
        cfg: its configuration, with `vocab_size` filled in.

    Raises:
        UserError: `vocab_size` is missing, or a registered name is not known.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        if cfg.vocab_size is None:
            raise UserError("model.vocab_size is not set and no tokenizer says it: give model.vocab_size")
        self.cfg = cfg
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        block = look_up(BLOCKS, cfg.block, "model.block")
        self.layers = nn.ModuleList(block(cfg, i) for i in range(cfg.num_layers))
        self.final_norm = make_norm(cfg)
        self.head = None if cfg.tie_embeddings else nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)

    @property
    def head_name(self) -> str:
        """Canonical name of the output matrix."""
        return "embedding.weight" if self.head is None else "head.weight"

    @property
    def head_weight(self) -> Tensor:
        """The output matrix `[V, h]`."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(self, tokens: Tensor, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Hidden states after the final norm.

        Args:
            tokens: int64 `[B, S]`.
            positions: int64 `[B, S]` or `[S]`; None: 0 .. S-1, after what the cache holds.
            cache: keys and values of earlier tokens.

        Returns:
            fp32 `[B, S, h]`.
        """
        x = self.embedding(tokens).float()
        rotary = self._rotary(tokens, positions, cache)
        for layer in self.layers:
            x = layer(x, rotary, cache)
        hidden: Tensor = self.final_norm(x)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits `[..., V]` of hidden states `[..., h]`, the product in the head's dtype."""
        weight = self.head_weight
        return (hidden.to(weight.dtype) @ weight.T).float()

    def _rotary(self, tokens: Tensor, positions: Tensor | None, cache: Cache | None) -> tuple[Tensor, Tensor] | None:
        if self.cfg.position != "rotary":
            return None
        if positions is None:
            past = 0 if cache is None else cache.length
            positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)
        cos, sin = rotary_angles(positions, self.cfg.rotary_dim, self.cfg.rotary_base)
        return cos.unsqueeze(-2), sin.unsqueeze(-2)


def build_model(cfg: ModelConfig, seed: int, device: torch.device | str = "cpu") -> Transformer:
    """Build a model from the meta device and give it its initial weights.

    Args:
        cfg: its configuration, with `vocab_size` filled in.
        seed: of the initial weights; they depend on it and on each parameter's name alone.
        device: where the fp32 parameters live.
    """
    with torch.device("meta"):
        model = Transformer(cfg)
    model.to_empty(device=device)
    initialise(model, cfg, seed)
    return model
