"""The cache stores what it is given, where it belongs."""

import pytest
import torch

from castalia.generate.cache import KVCache


def test_updates_append_and_layers_are_apart() -> None:
    cache = KVCache(num_layers=2, max_length=5)
    k, v = torch.randn(2, 3, 2, 5, 4), torch.randn(2, 3, 2, 5, 4)
    for start, end in [(0, 3), (3, 4), (4, 5)]:
        assert cache.length == start
        for layer in range(2):
            keys, values = cache.update(layer, k[layer, :, :, start:end], v[layer, :, :, start:end])
            assert torch.equal(keys, k[layer, :, :, :end])
            assert torch.equal(values, v[layer, :, :, :end])
        cache.advance(end - start)
    cache.reset()
    assert cache.update(0, k[0, :, :, :1], v[0, :, :, :1])[0].shape == (3, 2, 1, 4)


def test_a_full_cache_refuses() -> None:
    cache = KVCache(1, 2)
    with pytest.raises(ValueError, match="holds 2 tokens"):
        cache.update(0, torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4))
    with pytest.raises(ValueError, match="holds 2 tokens"):
        cache.advance(3)
