"""Dropout masks as a function of (seed, step, place, sample, element), by counting, not drawing.

    seed, step, sample numbers ──> streams [B] ─+ place, layer─> [B] ─+ row─> two words per row
                                                                       ─+ column─> 32 bits ─> keep?

There is no generator whose state could differ: the mask of an element is the same whatever
the micro-batch, the layout, recomputation in backward, or a restart in the middle. `place` is
what is dropped ("embedding", "attention", "mlp", "probabilities") and in which executed layer.

The mixers are the finaliser of SplitMix64 (Steele et al. 2014) and a 32-bit relative with the
constants of C. Wellons' hash search ("lowbias32"), in integer tensor operations that wrap.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

PLACES = ("embedding", "probabilities", "attention", "mlp", "router")


def _word(text: str) -> int:
    """64 bits of a hash, signed."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


_PLACE_WORDS = {place: _word(f"dropout/{place}") for place in PLACES}


@dataclass(frozen=True)
class DropoutKey:
    """What the masks of one forward pass depend on, besides the place.

    Attributes:
        seed: the run's.
        step: the optimizer step.
        sample_ids: int64 `[B]`, the global number of each row's sample.
        rows: int64 `[S]`, numbers of the tokens that are held, where the sequence is shared out over ranks;
            None: 0, 1, 2, ...
        wider: the key of which this one is a share (see `share`).
        streams: int64 `[B]`, all three mixed; what a forward pass reads, so that a compiled one sees
            a tensor and not a number that changes at every step.
    """

    seed: int
    step: int
    sample_ids: Tensor
    rows: Tensor | None = None
    wider: DropoutKey | None = field(default=None, repr=False, compare=False)
    streams: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        streams = _mix64(_mix64(self.sample_ids) ^ _word(f"dropout/{self.seed}/{self.step}"))
        object.__setattr__(self, "streams", streams)

    def share(self, number: int, tokens: int) -> DropoutKey:
        """The key of the tokens `number x tokens` and so on, of those that are held."""
        first = number * tokens
        if self.rows is None:
            rows = torch.arange(first, first + tokens, device=self.sample_ids.device)
        else:
            rows = self.rows[first : first + tokens]
        return replace(self, rows=rows, wider=self)

    @property
    def whole(self) -> DropoutKey:
        """The key that this one is a share of, or itself."""
        return self.wider or self

    def rows_of(self, x: Tensor) -> Tensor:
        """Numbers of the rows of `x` `[B, ..., C]`."""
        return torch.arange(x[0].numel() // x.shape[-1], device=x.device) if self.rows is None else self.rows


def dropout(x: Tensor, share: float, key: DropoutKey | None, place: str, layer: int = 0) -> Tensor:
    """Zero a share of `x` `[B, ..., C]` and scale up the rest; `x` itself where there is no key or no share.

    Args:
        share: how many, 0 <= share < 1.
        key: None switches dropout off.
        place: one of PLACES.
        layer: the executed layer (not the shared one), 0 for the embedding.
    """
    if key is None or share == 0.0:
        return x
    columns = torch.arange(x.shape[-1], device=x.device)
    return drop_elements(x, share, key, place, layer, key.rows_of(x), columns)


def drop_elements(
    x: Tensor,
    share: float,
    key: DropoutKey,
    place: str,
    layer: int,
    rows: Tensor,
    columns: Tensor,
    batch: slice = slice(None),
) -> Tensor:
    """As `dropout`, where x holds only some elements of a whole.

    Args:
        rows, columns: int64, numbers of x's rows and columns in the whole; x is `[b, ..., C]` with
            len(rows) rows of len(columns).
        batch: which of the key's samples x's rows of the batch are.
    """
    keep = _opaque_mask(key.streams[batch], rows, columns, share, place, layer)
    return torch.where(keep.view(x.shape), x * (1.0 / (1.0 - share)), 0.0)


@torch.library.custom_op("castalia::keep_mask", mutates_args=())
def _opaque_mask(streams: Tensor, rows: Tensor, columns: Tensor, share: float, place: str, layer: int) -> Tensor:
    """`keep_elements`, closed to torch.compile: the C++ that it writes for products that wrap is undefined
    behaviour, from which the compiler concluded that a loop's index is small, and wrote beyond the mask."""
    return keep_elements(streams, rows, columns, share, place, layer)


@_opaque_mask.register_fake
def _(streams: Tensor, rows: Tensor, columns: Tensor, share: float, place: str, layer: int) -> Tensor:
    return streams.new_empty(streams.shape[0], rows.shape[0], columns.shape[0], dtype=torch.bool)


def keep_mask(
    streams: Tensor, rows: int, columns: int, share: float, place: str, layer: int = 0, first_row: int = 0
) -> Tensor:
    """Which elements stay: bool `[B, rows, columns]`.

    Args:
        streams: int64 `[B]`, see DropoutKey.
        first_row: number of the first row, where a caller holds only some of a sample's rows.
    """
    row = torch.arange(first_row, first_row + rows, device=streams.device)
    return keep_elements(streams, row, torch.arange(columns, device=streams.device), share, place, layer)


def keep_elements(streams: Tensor, rows: Tensor, columns: Tensor, share: float, place: str, layer: int = 0) -> Tensor:
    """Which of the elements with these int64 row and column numbers stay: bool `[B, len(rows), len(columns)]`."""
    return _bits(streams, rows, columns, place, layer) >= min(round(share * 2**32), 2**32 - 1) - 2**31


def jitter(x: Tensor, width: float, key: DropoutKey | None, layer: int) -> Tensor:
    """`x` `[B, ..., C]` times numbers uniform between 1 - width and 1 + width; `x` itself without a key or width."""
    if key is None or width == 0.0:
        return x
    rows, columns = key.rows_of(x), torch.arange(x.shape[-1], device=x.device)
    return x * (1.0 + width * _symmetric(key.streams, rows, columns, "router", layer)).view(x.shape).to(x.dtype)


@torch.library.custom_op("castalia::symmetric", mutates_args=())
def _symmetric(streams: Tensor, rows: Tensor, columns: Tensor, place: str, layer: int) -> Tensor:
    """fp32 numbers uniform from -1 on and below 1, `[B, len(rows), len(columns)]`; closed as `_opaque_mask` is."""
    return _bits(streams, rows, columns, place, layer) * 2.0**-31


@_symmetric.register_fake
def _(streams: Tensor, rows: Tensor, columns: Tensor, place: str, layer: int) -> Tensor:
    return streams.new_empty(streams.shape[0], rows.shape[0], columns.shape[0], dtype=torch.float32)


def _bits(streams: Tensor, rows: Tensor, columns: Tensor, place: str, layer: int) -> Tensor:
    """32 bits for each element, as int32 `[B, len(rows), len(columns)]`."""
    start = _mix64(_mix64(streams ^ _PLACE_WORDS[place]) + layer)
    words = _mix64(start[:, None] + rows * -7046029254386353131)
    # Two words, one added and one inside the mixer: rows whose first words lie close still differ.
    low, high = words.to(torch.int32).unsqueeze(-1), (words >> 32).to(torch.int32).unsqueeze(-1)
    x = low + columns.to(torch.int32) * -1640531527
    x = (x ^ _shift(x, 16)) * 0x7FEB352D
    x = x ^ high
    x = (x ^ _shift(x, 15)) * -0x7B935975
    return x ^ _shift(x, 16)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int32."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _mix64(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & ((1 << 33) - 1))
