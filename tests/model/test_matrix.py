"""Combinations of norm, position, activation and residual in which all pairs meet: each learns, caches, differentiates.

The full product is a certificate: python -m castalia.tools.model_matrix
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from castalia.model import positions
from castalia.model.registry import BLOCKS
from castalia.tools import model_matrix as matrix

PAIRS = matrix.pairs()


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_pair_of_values_occurs():
    sizes = [len(v) for v in matrix.AXES.values()]
    for one, two in itertools.combinations(range(4), 2):
        assert len({(c[one], c[two]) for c in PAIRS}) == sizes[one] * sizes[two]
    assert len(PAIRS) < 90 and len(matrix.product()) == math.prod(sizes)


@pytest.mark.parametrize("combination", PAIRS, ids="-".join)
def test_learns_caches_and_differentiates(combination):
    assert matrix.check(combination).failures == []


def test_the_copy_task_needs_order(monkeypatch):
    """A model that cannot look back stays above the bound: the check is able to fail."""
    cfg = matrix.configuration(("layernorm", "learned", "gelu", "sequential"))

    class Blind(torch.nn.Module):
        def __init__(self, cfg, layer):
            super().__init__()

        def forward(self, x, layer, context):
            return x

    monkeypatch.setitem(BLOCKS, "blind", Blind)
    loss, steps = matrix.copy_task(cfg.model_copy(update={"block": "blind"}), most_steps=200)
    assert steps == 200 and loss > 2 * matrix.COPIED


def test_positions_counted_from_zero_in_every_piece_are_noticed(monkeypatch):
    cfg = matrix.configuration(("layernorm", "sinusoidal", "gelu", "sequential"))
    model = matrix.random_model(cfg)
    assert matrix.cache_error(model) < matrix.CACHE_TOLERANCE
    right = positions.sinusoids
    monkeypatch.setattr("castalia.model.transformer.sinusoids", lambda p, h: right(torch.arange(p.shape[-1]), h))
    assert matrix.cache_error(model) > 1e-3


def test_a_gradient_that_misses_a_factor_is_noticed():
    cfg = matrix.configuration(("layernorm", "rpe", "gelu", "sequential"))
    model = matrix.random_model(cfg)
    model.relative_bias.weight.register_hook(lambda gradient: 0.5 * gradient)
    error, tensor = matrix.gradient_error(model)
    assert error > 1e-3 and tensor == "relative_bias.weight"
