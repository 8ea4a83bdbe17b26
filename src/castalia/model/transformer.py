"""Token ids -> hidden states -> logits: the decoder-only transformer.

    tokens [B,S] ─embedding─> x [B,S,h] ─block─> ... ─block─> x ─final norm─> hidden [B,S,h]
                  + positions                                    hidden · head^T = logits [B,S,V]

The model stops at the hidden states. Whoever trains hands them, with the output matrix, to
the chunked loss, so that all logits never exist at once; whoever generates asks `logits`.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from castalia.config import ModelConfig, mup
from castalia.errors import UserError
from castalia.model.attention import Attention
from castalia.model.attention_mask import Documents, Masks
from castalia.model.collected import Collected
from castalia.model.dropout import DropoutKey, dropout
from castalia.model.gmlp import GATED_BLOCKS
from castalia.model.initial import initialise
from castalia.model.layers import MLP, Cache, Context
from castalia.model.moe import MoE
from castalia.model.mtp import AheadModule, shifted
from castalia.model.norms import LayerNorm, make_norm, wide
from castalia.model.positions import rope_scaling, rotary_angles, sinusoids
from castalia.model.recompute import LayerRunner, run_layer
from castalia.model.registry import BLOCKS, look_up, register
from castalia.model.soft_prompt import SoftPrompt, freeze_all_but_prompt

_STABLE_EPSILON = 1e-5  # of Dettmers et al.'s layer norm, whatever model.norm_epsilon is


@register(BLOCKS, "transformer")
class Block(nn.Module):
    """Attention and MLP (or experts), one after the other or side by side, with norms before or after them.

    sequential: a = x + attention(n1(x)); y = a + mlp(n2(a))
    parallel:   y = x + attention(n1(x)) + mlp(n2(x))        (GPT-J's and GPT-NeoX-20B's form)
    tied norms: y = x + attention(n1(x)) + mlp(n1(x))        (n2 does not exist)
    post:       a = x + n1(attention(x)); y = a + n2(mlp(a)) (OLMo 2's form)

    Dropout is on both branches, their biases included.
    """

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.parallel, self.dropout = cfg.residual == "parallel", cfg.hidden_dropout
        self.pre = cfg.norm_placement == "pre"
        self.attention_norm = make_norm(cfg)
        self.attention = Attention(cfg)
        self.mlp_norm = None if cfg.tie_norms else make_norm(cfg)
        self.mlp = MoE(cfg) if cfg.has_experts(layer) else MLP(cfg)

    def forward(self, x: Tensor, layer: int, context: Context) -> Tensor:
        """fp32 `[B, S, h]` to fp32 `[B, S, h]`; `layer` is the number of the executed layer."""
        normed = self.attention_norm(x) if self.pre else x
        attention = self.attention(normed, layer, context)
        if not self.pre:
            attention = self.attention_norm(attention)
        attention = self._drop(attention, "attention", layer, context)
        if not self.parallel:
            x = x + attention
        if not self.pre:
            normed = x
        elif self.mlp_norm is not None:
            normed = self.mlp_norm(x)
        mlp = self.mlp(normed, layer, context) if isinstance(self.mlp, MoE) else self.mlp(normed)
        if not self.pre and self.mlp_norm is not None:
            mlp = self.mlp_norm(mlp)
        mlp = self._drop(mlp, "mlp", layer, context)
        return x + attention + mlp if self.parallel else x + mlp

    def _drop(self, branch: Tensor, place: str, layer: int, context: Context) -> Tensor:
        return dropout(branch, self.dropout, context.dropout, place, layer)


class Transformer(nn.Module):
    """A decoder-only language model.

    `layers` holds the layers that have weights of their own; `order` says which of them each
    executed layer is, so shared ones are really one module.

    Args:
        cfg: its configuration, with `vocab_size` filled in, and for learned positions
            `max_position_embeddings`.

    Raises:
        UserError: one of these is missing, or a registered name is not known.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        if cfg.vocab_size is None:
            raise UserError("model.vocab_size is not set and no tokenizer says it: give model.vocab_size")
        self.cfg, self.order = cfg, cfg.layer_order
        self.runner: LayerRunner = run_layer
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.position_embedding, self.relative_bias, self.soft_prompt = None, None, None
        if cfg.position == "learned":
            if cfg.max_position_embeddings is None:
                raise UserError(
                    "model.max_position_embeddings is not set: learned positions need the size of their table"
                )
            self.position_embedding = nn.Embedding(cfg.max_position_embeddings, cfg.hidden_size)
        elif cfg.position == "rpe":
            self.relative_bias = nn.Embedding(cfg.rpe_num_buckets, cfg.num_attention_heads)
        norms = {name: LayerNorm(cfg.hidden_size, _STABLE_EPSILON) for name in cfg.normed_embeddings}
        self.embedding_norm = norms.get("embedding")
        self.position_embedding_norm = norms.get("position_embedding")
        if cfg.soft_prompt_tokens:
            self.soft_prompt = SoftPrompt(cfg.soft_prompt_tokens, cfg.hidden_size)
        block = look_up(BLOCKS, cfg.block, "model.block")
        kinds = dict(zip(self.order, cfg.attention_kinds, strict=True))
        self.layers = nn.ModuleList(GATED_BLOCKS.get(kinds[i], block)(cfg, i) for i in sorted(kinds))
        self.masks = Masks(cfg)
        self.final_norm = make_norm(cfg)
        self.head = None if cfg.tie_embeddings else nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=cfg.head_bias)
        self.mtp = nn.ModuleList(AheadModule(cfg) for _ in range(cfg.mtp_depth))
        for norm in (self.final_norm, *(cast(AheadModule, module).norm for module in self.mtp)):
            _times(norm, mup.output_factor(cfg))
        if cfg.soft_prompt_tokens:
            freeze_all_but_prompt(self)

    @property
    def head_name(self) -> str:
        """Canonical name of the output matrix."""
        return "embedding.weight" if self.head is None else "head.weight"

    @property
    def head_weight(self) -> Tensor:
        """The output matrix `[V, h]`."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def prompt_length(self) -> int:
        """Vectors of the soft prompt: places that a cache needs beside those of the tokens."""
        return self.cfg.soft_prompt_tokens

    @property
    def head_bias(self) -> Tensor | None:
        """What is added to the logits, `[V]`."""
        return None if self.head is None else self.head.bias

    def experts_of(self, layer: int) -> MoE:
        """The mixture of an executed layer that has one; modules that look ahead count on from the last layer."""
        ahead = layer - len(self.order)
        block = self.layers[self.order[layer]] if ahead < 0 else cast(AheadModule, self.mtp[ahead]).block
        return cast("MoE", block.mlp)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        dropout: DropoutKey | None = None,
        collected: Collected | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, divided as the output matrix wants them (see castalia.config.mup).

        Args:
            tokens: int64 `[B, S]`.
            positions: int64 `[B, S]` or `[S]`; None: 0 .. S-1, after what the cache holds, and from 0
                again in each document.
            cache: keys and values of earlier tokens.
            dropout: which elements are dropped; None: none, as in evaluation and generation.
            collected: is filled with what a training step needs besides (see Collected); None: as in
                evaluation and generation, nothing looks at other tokens than earlier ones.
            doc_ids: integers `[B, S]`: runs of equal ids are documents, and tokens see their own alone;
                on the CPU, where it may stay, nothing has to wait for a device. None: each row is one.

        Returns:
            fp32 `[B, S, h]`.

        Raises:
            UserError: learned positions, and the sequence is longer than their table.
        """
        S, past = tokens.shape[1], 0 if cache is None else cache.length
        documents = None if doc_ids is None else self._documents(doc_ids, tokens, cache)
        if documents is not None and positions is None:
            positions = torch.arange(S, device=tokens.device) - documents.starts
        if positions is None:
            start = max(past - self.prompt_length, 0)
            self._check_length(start + S)
            positions = torch.arange(start, start + S, device=tokens.device)
        x = self._embed(tokens, positions, dropout)
        first = self.soft_prompt is not None and past == 0
        if self.soft_prompt is not None:
            positions = positions + self.prompt_length
            if first:
                x, positions = self.soft_prompt(x), _count_up_to(positions, self.prompt_length)
        context = self._context(positions, past, cache, dropout, documents)._replace(collected=collected)
        for layer, index in enumerate(self.order):
            x = self.runner(self.layers[index], x, layer, context)
        if first and cache is not None:
            cache.advance(self.prompt_length)
        if collected is not None:
            self._look_ahead(x, tokens, context, collected)
        hidden: Tensor = self.final_norm(x)
        return hidden[:, -S:] if first else hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits `[..., V]` of hidden states `[..., h]`, the product in the head's dtype."""
        weight = self.head_weight
        out = wide(hidden.to(weight.dtype) @ weight.T)
        return out if self.head is None or self.head.bias is None else out + self.head.bias

    def _look_ahead(self, x: Tensor, tokens: Tensor, context: Context, collected: Collected) -> None:
        """Run the modules of `mtp.py`; the last places, which have no such token, have no labels either."""
        collected.ahead.clear()
        for number, module in enumerate(self.mtp):
            embedded = self._embed_tokens(shifted(tokens, number + 1, 0))
            x = module(x, embedded, len(self.order) + number, context)
            collected.ahead.append(cast(AheadModule, module).norm(x))

    def _embed_tokens(self, tokens: Tensor) -> Tensor:
        x = wide(self.embedding(tokens))
        x = x if self.embedding_norm is None else self.embedding_norm(x)
        return _scaled(x, self.cfg.mup_embedding_mult)

    def _embed(self, tokens: Tensor, positions: Tensor, key: DropoutKey | None) -> Tensor:
        x, factor = self._embed_tokens(tokens), self.cfg.mup_rp_embedding_mult
        if self.position_embedding is not None:
            y = wide(self.position_embedding(positions + self.cfg.position_offset))
            y = y if self.position_embedding_norm is None else self.position_embedding_norm(y)
            x = x + _scaled(y, factor)
        elif self.cfg.position == "sinusoidal":
            x = x + _scaled(sinusoids(positions, self.cfg.hidden_size), factor)
        return dropout(x, self.cfg.hidden_dropout, key, "embedding")

    def _documents(self, doc_ids: Tensor, tokens: Tensor, cache: Cache | None) -> Documents:
        if self.soft_prompt is not None:
            raise UserError("model.soft_prompt_tokens: a soft prompt and documents kept apart do not go together yet")
        if cache is not None:
            raise ValueError("documents are kept apart in training and evaluation, not with a cache")
        return Documents.of(doc_ids, tokens.device)

    def _context(
        self,
        positions: Tensor,
        past: int,
        cache: Cache | None,
        key: DropoutKey | None,
        documents: Documents | None = None,
    ) -> Context:
        rotary, keys = None, positions
        if self.cfg.position == "rotary":
            cos, sin = rotary_angles(positions, self.cfg.rotary_dim, self.cfg.rotary_base, rope_scaling(self.cfg))
            rotary = cos.unsqueeze(-2), sin.unsqueeze(-2)
        elif self.cfg.position in ("alibi", "rpe"):
            positions = positions if positions.ndim == 2 else positions.unsqueeze(0)
            keys = self._key_positions(positions, past, cache)
        table = None
        if self.relative_bias is not None:
            table = _scaled(self.relative_bias.weight, self.cfg.mup_rp_embedding_mult)
        masks = self.masks.describe(past, positions, keys, table, documents)
        return Context(rotary, masks, documents, cache, key)

    @staticmethod
    def _key_positions(positions: Tensor, past: int, cache: Cache | None) -> Tensor:
        """Positions of all keys `[1 or B, past + S]`, noted in the cache."""
        keys = positions
        if cache is not None:
            if past and cache.positions is not None:
                before = cache.positions[:, :past]
                rows = max(len(before), len(positions))
                keys = torch.cat([before.expand(rows, -1), positions.expand(rows, -1)], 1)
            cache.positions = keys
        return keys

    def _check_length(self, length: int) -> None:
        rows = self.cfg.max_position_embeddings
        if self.position_embedding is not None and rows is not None and length + self.cfg.position_offset > rows:
            raise UserError(
                f"a sequence of {length} tokens, with model.position_offset {self.cfg.position_offset}, is beyond "
                f"the {rows} learned positions: shorten it or raise model.max_position_embeddings"
            )


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


def _times(module: nn.Module, factor: float) -> None:
    """Multiply what a module returns, wherever it is called: a pipeline's last stage takes over the norm alone."""
    if factor != 1:
        module.register_forward_hook(lambda _, __, y: y * factor)


def _count_up_to(positions: Tensor, count: int) -> Tensor:
    """Positions 0 .. count-1 in front of the others: `[..., S]` to `[..., count + S]`."""
    before = torch.arange(count, device=positions.device).expand(*positions.shape[:-1], count)
    return torch.cat([before, positions], -1)


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
