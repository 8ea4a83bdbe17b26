"""Positions against formulas written out element by element, and what the model does with given ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from castalia.config import ModelConfig
from castalia.errors import UserError
from castalia.model import Transformer
from castalia.model.positions import (
    _rotated,
    alibi_bias,
    alibi_slopes,
    causal,
    distance_buckets,
    relative_bias,
    rotary_angles,
    rotate,
    sinusoids,
)

SCHEMES = ["rotary", "learned", "sinusoidal", "rpe", "alibi", "none"]


def config(position, **changes):
    shape = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64}
    return ModelConfig(**(shape | {"max_position_embeddings": 32, "position": position} | changes))


def random_model(cfg):
    model = Transformer(cfg).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3, generator=generator)
    return model


def tokens(length=12, rows=2):
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(0))


def test_alibi_slopes_of_six_heads_as_the_reference_has_them():
    assert alibi_slopes(6) == [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]
    assert alibi_slopes(8) == [2.0**-k for k in range(1, 9)]
    assert alibi_slopes(1) == [2.0**-8]


@given(st.integers(1, 70))
def test_alibi_slopes_are_distinct_and_as_many_as_heads(heads):
    slopes = alibi_slopes(heads)
    assert len(slopes) == len(set(slopes)) == heads and all(0 < s < 1 for s in slopes)


def test_alibi_bias():
    bias = causal(alibi_bias(torch.arange(5)[:, None] - torch.arange(5), torch.tensor(alibi_slopes(6))), 0)
    for head, slope in enumerate(alibi_slopes(6)):
        for i in range(5):
            for j in range(5):
                assert bias[head, i, j] == (-slope * (i - j) if j <= i else -math.inf)


def bucket(r, buckets, furthest):
    """The reference's sentence: r below half of them, then a range of its own, growing geometrically."""
    half = buckets // 2
    if r < half:
        return max(r, 0)
    return min(buckets - 1, half + int(math.log(r / half) / math.log(furthest / half) * (buckets - half)))


@given(st.integers(4, 64), st.integers(1, 500), st.lists(st.integers(-5, 3000), min_size=1, max_size=40))
def test_distance_buckets(buckets, more, distances):
    furthest = buckets // 2 + more
    found = distance_buckets(torch.tensor(distances), buckets, furthest).tolist()
    for r, b in zip(distances, found, strict=True):
        # Where the logarithm hits a whole number, fp32 and fp64 may fall on either side of it.
        near = {bucket(r, buckets, furthest)} | {bucket(r * (1 + s), buckets, furthest) for s in (1e-6, -1e-6) if r > 0}
        exact = r < buckets // 2
        assert b == bucket(r, buckets, furthest) if exact else b in near


def test_relative_bias_is_scaled_by_the_root_of_the_head_size():
    table = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    distance = torch.arange(40)[:, None] - torch.arange(40)
    bias = relative_bias(distance, table, 16, head_size=9)
    for i, j in ((0, 0), (5, 5), (9, 2), (39, 0), (20, 8)):
        assert bias[1, i, j].item() == pytest.approx(3 * table[bucket(i - j, 8, 16), 1].item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotated", [4, 8])
def test_gradient_of_a_rotation_is_autograds(dtype, rotated):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(2, 5, 3, 8, generator=generator).to(dtype) for _ in range(2))
    cos, sin = (t.unsqueeze(-2) for t in rotary_angles(torch.arange(5), rotated, 10000.0))
    results = []
    for function in (rotate, _rotated):
        leaf = x.clone().requires_grad_()
        y = function(leaf, cos, sin)
        results.append((y.detach(), *torch.autograd.grad(y, leaf, grad)))
    for ours, autograds in zip(*results, strict=True):
        torch.testing.assert_close(ours, autograds, rtol=0.0, atol=1e-6 if dtype == torch.float32 else 1e-2)


def test_sinusoids_are_two_halves():
    values = sinusoids(torch.tensor([0, 7, 1000]), 10)
    for row, p in enumerate((0, 7, 1000)):
        for j in range(5):
            angle = p * 10000 ** (-2 * j / 10)
            assert values[row, j].item() == pytest.approx(math.sin(angle), abs=1e-4)
            assert values[row, 5 + j].item() == pytest.approx(math.cos(angle), abs=1e-4)


@pytest.mark.parametrize("position", SCHEMES)
@torch.no_grad()
def test_given_positions_are_honoured(position):
    """One row of positions or one per sequence: the same; other positions, other outputs (but for none)."""
    model = random_model(config(position))
    ids, strided = tokens(), 1 + 2 * torch.arange(12)
    base = model(ids)
    assert torch.equal(model(ids, torch.arange(12)), base)
    torch.testing.assert_close(model(ids, strided.expand(2, -1)), model(ids, strided), rtol=1e-5, atol=1e-5)
    mixed = model(ids, torch.stack([torch.arange(12), strided]))
    torch.testing.assert_close(mixed[0], base[0], rtol=1e-5, atol=1e-5)
    assert (mixed[1] - base[1]).abs().max() > 1e-2 or position == "none"


@pytest.mark.parametrize("position", SCHEMES)
@torch.no_grad()
def test_order_matters_but_for_none(position):
    """The last state of a one-layer model sees a bag of tokens unless positions enter."""
    model = random_model(config(position, num_layers=1))
    ids = tokens(rows=1)
    swapped = ids.clone()
    swapped[0, [2, 7]] = ids[0, [7, 2]]
    difference = (model(ids)[0, -1] - model(swapped)[0, -1]).abs().max()
    assert difference < 1e-5 if position == "none" else difference > 1e-3


@torch.no_grad()
def test_learned_positions_move_by_the_offset_and_end_with_the_table():
    plain, moved = config("learned"), config("learned", position_offset=3)
    model, shifted = random_model(plain), Transformer(moved)
    shifted.load_state_dict(model.state_dict())  # the table is not enlarged
    assert torch.equal(shifted(tokens()), model(tokens(), torch.arange(12) + 3))
    model(tokens(32))
    with pytest.raises(UserError, match="30 tokens, with model.position_offset 3, is beyond the 32 learned"):
        shifted(tokens(30))


def test_one_relative_bias_serves_all_layers():
    names = [n for n, _ in Transformer(config("rpe")).named_parameters() if "relative" in n]
    assert names == ["relative_bias.weight"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"position_offset": 2}, "position_offset is for"),
        ({"position": "learned", "position_offset": 32, "max_position_embeddings": 32}, "beyond the 32 rows"),
        ({"position": "sinusoidal", "hidden_size": 33, "num_attention_heads": 3}, "even"),
        ({"position": "rpe", "rpe_max_distance": 16}, "rpe_max_distance"),
    ],
)
def test_positions_that_cannot_be_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig(**changes)


def test_learned_positions_need_the_tables_size():
    with pytest.raises(UserError, match="max_position_embeddings"):
        Transformer(config("learned", max_position_embeddings=None))
