"""A model -> one that continues: prompts to logits, then one token of each row to logits.

    tokens [B,P], lengths ─begin─> logits [B,V] after each row's last token
    tokens [B]            ─step──> logits [B,V]

Prompts of unequal length are padded at their ends. What is padding comes later than all that is real, so
causality alone keeps it from being seen, and each row then goes on at its own place (see `RowCache`):
position ids, masks and biases follow from that place, never from the neighbours in the batch.
The output matrix is only ever applied to the last token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from castalia.config import mup
from castalia.config.attention import GATED_MLPS
from castalia.generate.cache import KVCache, RowCache
from castalia.generate.quick import doubled, quicken
from castalia.generate.weights import linear_of, replace_linears, shared_copy
from castalia.model import Transformer
from castalia.model.attention_mask import MaskSpec, ScoreBias
from castalia.model.layers import Context
from castalia.model.positions import alibi_slopes, rope_scaling, rotary_angles


class Links(Protocol):
    """What joins the ranks among which a model is spread (castalia.parallel.inference).

    Attributes:
        first, last: whether this rank has the embedding, the output matrix.
        layers: the executed layers that it holds.
    """

    first: bool
    last: bool
    layers: Sequence[int]

    def receive(self, shape: tuple[int, ...]) -> Tensor:
        """Hidden states from the stage before."""

    def send(self, x: Tensor) -> None:
        """Hidden states to the stage behind."""

    def whole_logits(self, local: Tensor | None, rows: int) -> Tensor:
        """Logits `[rows, V]` on every rank, of what the last stage's ranks computed."""


class Decoder:
    """A model made ready to generate.

    Args:
        model: any model of the `castalia.model.Transformer` interface; it stays as it is. Where the decoder holds its
            matrices in another form, dropping the model frees them.
        int8: round the matrices to 8 bits; activations are then bf16.
        links: where the model is one rank's part.
    """

    def __init__(self, model: Transformer, int8: bool = False, links: Links | None = None) -> None:
        self.cfg, self.links = model.cfg, links
        weight = next(p for p in model.layers.parameters() if p.ndim >= 2)
        # Custom blocks and cores may ask a cache for one length of all rows, as gated MLPs and soft prompts do.
        self.uneven = (
            self.cfg.block == "transformer"
            and self.cfg.attention_core == "sdpa"
            and not model.prompt_length
            and not any(kind in GATED_MLPS for kind in self.cfg.attention_kinds)
        )
        """Whether rows of a batch may be of unequal length."""
        self.dtype, self.device = torch.bfloat16 if int8 else weight.dtype, weight.device
        self.head: nn.Module | None = None
        if links is None or links.last:
            self.head = linear_of(model.head_weight, model.head_bias, int8)
        self.model = shared_copy(model)
        replace_linears(self.model.layers, int8)
        if self.uneven:
            quicken(self.model.layers)
        if self.head is not None:
            self.model.head = None
        # Without a head of its own, the embedding's matrix is looked up and stays.
        self._layers = [self._layer(number) for number in (links.layers if links else range(len(model.order)))]
        self._windows = [self.cfg.attention_window if kind == "window" else None for kind in self.cfg.attention_kinds]
        self._angles: tuple[Tensor, Tensor] | None = None
        self._cache: KVCache | RowCache | None = None
        self._out: Tensor | None = None

    def _layer(self, number: int) -> tuple[int, nn.Module]:
        layers: Any = self.model.layers
        index = self.model.order[number]
        return number, layers[str(index) if isinstance(layers, nn.ModuleDict) else index]

    def begin(self, prompts: Sequence[Sequence[int]], max_length: int) -> Tensor:
        """Read prompts.

        Args:
            prompts: ids, none empty; of one length unless `uneven`.
            max_length: most tokens that a row will have, the last one not counted, as it is never read.

        Returns:
            fp32 logits `[B, V]` after each prompt's last token, good until the next call.
        """
        lengths = [len(p) for p in prompts]
        longest = max(lengths)
        tokens = torch.tensor([[*p, *([p[-1]] * (longest - len(p)))] for p in prompts], device=self.device)
        if not self.uneven:
            prompt = self.model.prompt_length
            self._cache = KVCache(self.cfg.num_layers, max_length + prompt, self.dtype, self.device)
            return self._plain(tokens)
        if not isinstance(self._cache, RowCache) or self._cache.max_length < max_length:
            self._cache = RowCache(self._windows, max_length, self.dtype, self.device)
        cache = self._cache
        cache.begin(lengths)
        x = self.hidden(tokens, cache)
        cache.advance(longest)
        last = torch.tensor(lengths, device=self.device) - 1
        return self.logits(None if x is None else x[torch.arange(len(lengths), device=self.device), last], len(tokens))

    def hidden(self, tokens: Tensor, cache: RowCache | None = None) -> Tensor | None:
        """Hidden states of texts from their beginning on, for `logits`.

        Args:
            tokens: int64 `[B, S]`; the model of the `uneven` kind.
            cache: where keys and values are kept; None: nowhere.

        Returns:
            `[B, S, h]`, before the final norm; None on a rank that is not of the last stage.
        """
        length = tokens.shape[1]
        positions = torch.arange(length, device=self.device)
        row = positions.unsqueeze(0)
        masks = self.model.masks.describe(0, row, row, self._table(), None)
        rotary = self._rotary(slice(0, length), length if cache is None else cache.max_length)
        return self._run(tokens, positions, Context(rotary, masks, None, cache))

    def step(self, tokens: Tensor) -> Tensor:
        """Read one more token of each row: int64 `[B]` to fp32 logits `[B, V]`, good until the next call."""
        cache = self._cache
        if not isinstance(cache, RowCache):
            return self._plain(tokens.unsqueeze(-1))
        positions = cache.places[:1] if cache.even else cache.places.unsqueeze(-1)
        masks = self._masks(cache, positions.view(-1, 1))
        where = slice(cache.length, cache.length + 1) if cache.even else positions
        context = Context(self._rotary(where, cache.max_length), masks, None, cache)
        x = self._run(tokens.unsqueeze(-1), positions, context)
        cache.advance(1)
        return self.logits(None if x is None else x[:, -1], len(tokens))

    def select(self, rows: Tensor) -> None:
        """Go on with these rows of the old ones, int64 `[B']`, in this order; a row may come twice."""
        assert self._cache is not None, "begin comes first"
        self._cache.select(rows)

    def _plain(self, tokens: Tensor) -> Tensor:
        assert isinstance(self._cache, KVCache)
        x = self.model(tokens, None, self._cache)
        self._cache.advance(tokens.shape[1])
        return self._head(x[:, -1])

    def _run(self, tokens: Tensor, positions: Tensor, context: Context) -> Tensor | None:
        """Hidden states before the final norm; None on a rank that has passed them on."""
        if self.links is None or self.links.first:
            x = self.model._embed(tokens, positions, None)
        else:
            x = self.links.receive((*tokens.shape, self.cfg.hidden_size))
        for number, layer in self._layers:
            x = layer(x, number, context)
        if self.links is not None and not self.links.last:
            self.links.send(x)
            return None
        return x

    def logits(self, x: Tensor | None, rows: int) -> Tensor:
        """fp32 `[rows, V]`, on every rank, of hidden states `[rows, h]` of `hidden` (None: another stage has them).

        Good until the next call.
        """
        local = None if x is None else self._head(self.model.final_norm(x))
        if self.links is not None:
            return self.links.whole_logits(local, rows)
        assert local is not None
        return local

    def _head(self, hidden: Tensor) -> Tensor:
        """In memory of its own, which the next call overwrites: asking for so much at each step costs more than it."""
        if self.head is None:
            return self.model.logits(hidden)
        out = self.head(hidden)
        if self._out is None or self._out.shape != out.shape:
            self._out = torch.empty(out.shape, device=self.device)
        return self._out.copy_(out)

    def _table(self) -> Tensor | None:
        """Of T5's relative bias."""
        if self.model.relative_bias is None:
            return None
        return self.model.relative_bias.weight * self.cfg.mup_rp_embedding_mult

    def _rotary(self, positions: Tensor | slice, length: int) -> tuple[Tensor, Tensor] | None:
        """cos and sin, read from a table: computing them at each step costs as much as a layer."""
        if self.cfg.position != "rotary":
            return None
        if self._angles is None or len(self._angles[0]) < length:
            every = torch.arange(length, device=self.device)
            scaling = rope_scaling(self.cfg)
            self._angles = doubled(*rotary_angles(every, self.cfg.rotary_dim, self.cfg.rotary_base, scaling))
        cos, sin = self._angles
        return cos[positions], sin[positions]

    def _masks(self, cache: RowCache, places: Tensor) -> tuple[MaskSpec, ...]:
        """One description per executed layer for one token of each row, at `places` `[1 or B, 1]`."""
        made: dict[Any, MaskSpec] = {}
        described = self.model.masks.layers
        for (kind, layout), slots in zip(described, cache.slots, strict=True):
            key = kind, id(layout), slots
            if key not in made:
                made[key] = MaskSpec(kind, cache.length, dense=self._seen(cache, places, layout, slots))
        return tuple(
            made[kind, id(layout), slots] for (kind, layout), slots in zip(described, cache.slots, strict=True)
        )

    def _seen(self, cache: RowCache, places: Tensor, layout: Any, slots: int) -> Tensor | None:
        """What one token of each row sees of the slots, `[1 or B, 1 or n, 1, T]` to be added; None: all of them."""
        biased = self.cfg.position in ("alibi", "rpe")
        if cache.even and layout is None and not biased:
            return None
        keys = cache.key_positions(slots)
        if cache.even:
            keys = keys[:1]
        hidden = (keys < 0)[:, None, None, :]
        bias = torch.zeros((), device=self.device)
        if biased:
            slopes = table = None
            if self.cfg.position == "alibi":
                slopes = torch.tensor(alibi_slopes(self.cfg.num_attention_heads), device=self.device)
            else:
                table = self._table()
            whole = slice(None)
            bias = ScoreBias(places, keys, slopes, table, self.cfg.rpe_max_distance, mup.base_head_size(self.cfg)).part(
                whole, whole, whole, whole
            )
        if layout is not None:
            live = layout.live(cache.length + 1).to(self.device)
            i, j = (p.clamp(min=0).div(layout.block, rounding_mode="floor") for p in (places, keys))
            hidden = hidden | ~live[:, i.unsqueeze(-1), j.unsqueeze(-2)].transpose(0, 1)
        return bias.masked_fill(hidden, -math.inf).to(self.dtype)
