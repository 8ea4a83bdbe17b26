"""Dropout masks: the right share, nothing in common between places, steps and samples, the same in any batch."""

from __future__ import annotations

import hashlib
import itertools
import math

import pytest
import torch

from castalia.config import ModelConfig
from castalia.model import Transformer
from castalia.model.dropout import PLACES, DropoutKey, dropout, keep_mask

ROWS, COLUMNS = 200, 300


def mask(share=0.5, seed=1, step=2, sample=3, place="mlp", layer=4):
    return keep_mask(DropoutKey(seed, step, torch.tensor([sample])).streams, ROWS, COLUMNS, share, place, layer)[0]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_share_overall_by_row_and_by_column(share):
    """Within five standard deviations, everywhere; rows and columns spread as chance does (chi squared)."""
    dropped = (~mask(share)).double()
    sd = math.sqrt(share * (1 - share))
    assert abs(dropped.mean() - share) < 5 * sd / math.sqrt(ROWS * COLUMNS)
    for axis, count in ((0, ROWS), (1, COLUMNS)):
        z = (dropped.mean(axis) - share) * math.sqrt(count) / sd
        chi, degrees = z.square().sum().item(), z.numel()
        assert abs(chi - degrees) < 5 * math.sqrt(2 * degrees)


def test_neighbours_are_independent():
    kept = mask().double() * 2 - 1
    for a, b in ((kept[:, 1:], kept[:, :-1]), (kept[1:], kept[:-1]), (kept[1:, 1:], kept[:-1, :-1])):
        assert abs((a * b).mean()) < 5 / math.sqrt(a.numel())


def test_everything_that_a_mask_depends_on_gives_another_mask():
    base = {"seed": 1, "step": 2, "sample": 3, "place": "mlp", "layer": 4}
    variants = [base]
    variants += [base | {key: base[key] + d} for key in ("seed", "step", "sample", "layer") for d in (1, 2, 1 << 20)]
    variants += [base | {"place": place} for place in PLACES if place != "mlp"]
    # Keys that a sum or an exclusive or of the parts would confuse.
    variants += [base | {"step": 3, "sample": 2}, base | {"seed": 2, "step": 1}, base | {"sample": 4, "layer": 3}]
    masks = [mask(**v).double() * 2 - 1 for v in variants]
    for a, b in itertools.combinations(masks, 2):
        assert abs((a * b).mean()) < 5.5 / math.sqrt(a.numel())


def by_hand(seed, step, sample, place, layer, row, column):
    """The 32 bits of one element, in Python's whole numbers."""
    m64, m32 = 2**64 - 1, 2**32 - 1

    def word(text):
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & m64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & m64
        return x ^ (x >> 31)

    stream = mix(mix(sample) ^ word(f"dropout/{seed}/{step}"))
    start = mix((mix(stream ^ word(f"dropout/{place}")) + layer) & m64)
    words = mix((start + row * 0x9E3779B97F4A7C15) & m64)
    x = ((words & m32) + column * 0x9E3779B9) & m32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & m32
    x ^= words >> 32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & m32
    return x ^ (x >> 16)


def test_masks_are_known_for_good():
    """They are part of what a run is: changed ones would make a resumed run differ."""
    kept = mask(0.3)
    assert kept[0, :16].int().tolist() == [1, 0, 1, 1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1]
    for row, column in itertools.product((0, 1, 77, 199), (0, 1, 150, 299)):
        # Kept is what lies above the share, the 32 bits read as a signed number.
        signed = (by_hand(1, 2, 3, "mlp", 4, row, column) + 2**31) % 2**32 - 2**31
        assert bool(kept[row, column]) == (signed >= round(0.3 * 2**32) - 2**31)


def test_some_rows_are_drawn_alone():
    streams = DropoutKey(1, 2, torch.tensor([3, 9])).streams
    whole = keep_mask(streams, 50, 8, 0.3, "mlp")
    assert torch.equal(keep_mask(streams[1:], 20, 8, 0.3, "mlp", first_row=30)[0], whole[1, 30:])


def test_values_are_zero_or_scaled_up():
    key = DropoutKey(0, 0, torch.tensor([0, 1]))
    x = torch.ones(2, 50, 40)
    y = dropout(x, 0.2, key, "embedding")
    assert set(y.unique().tolist()) == {0.0, 1.25}
    assert y.mean().item() == pytest.approx(1.0, abs=0.05)
    assert dropout(x, 0.2, None, "embedding") is x and dropout(x, 0.0, key, "embedding") is x


CFG = ModelConfig(
    num_layers=2, hidden_size=32, num_attention_heads=4, num_kv_heads=2, vocab_size=64, rotary_fraction=0.5,
    hidden_dropout=0.2, attention_dropout=0.2,
)  # fmt: skip


def model_and_tokens(**changes):
    model = Transformer(CFG.model_copy(update=changes)).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model, torch.randint(0, 64, (4, 10), generator=generator)


@torch.no_grad()
def test_a_row_is_dropped_the_same_whatever_stands_beside_it():
    model, tokens = model_and_tokens()
    ids = torch.tensor([7, 3, 12, 5])
    whole = model(tokens, dropout=DropoutKey(1, 2, ids))
    for rows in ([0, 1], [3, 2], [2]):
        part = model(tokens[rows], dropout=DropoutKey(1, 2, ids[rows]))
        torch.testing.assert_close(part, whole[rows], rtol=1e-9, atol=1e-9)
    assert (model(tokens, dropout=DropoutKey(1, 3, ids)) - whole).abs().max() > 0.1


@pytest.mark.parametrize("changes", [{"hidden_dropout": 0.0}, {"attention_dropout": 0.0}])
@torch.no_grad()
def test_each_place_is_reached_and_no_key_means_no_dropout(changes):
    model, tokens = model_and_tokens(**changes)
    plain = model(tokens)
    assert (model(tokens, dropout=DropoutKey(0, 0, torch.arange(4))) - plain).abs().max() > 0.1
    undropped, _ = model_and_tokens(hidden_dropout=0.0, attention_dropout=0.0)
    assert torch.equal(undropped(tokens), plain)
    assert torch.equal(undropped(tokens, dropout=DropoutKey(0, 0, torch.arange(4))), plain)


@torch.no_grad()
def test_step_by_step_attention_is_the_fused_kernels():
    """With a share too small to drop anything, the path that dropout takes computes the same function."""
    for position in ("rotary", "alibi"):
        model, tokens = model_and_tokens(position=position, hidden_dropout=0.0, attention_dropout=1e-12)
        dropped = model(tokens, dropout=DropoutKey(0, 0, torch.arange(4)))
        torch.testing.assert_close(dropped, model(tokens), rtol=1e-6, atol=1e-6)


def test_future_stays_unseen_under_dropout():
    model, tokens = model_and_tokens()
    key, changed = DropoutKey(0, 0, torch.arange(4)), tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 64
    assert torch.equal(model(tokens, dropout=key)[:, :6], model(changed, dropout=key)[:, :6])
