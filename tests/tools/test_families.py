"""Every family's logits equal those of `transformers`, and each of their tensors counts."""

from __future__ import annotations

import pytest
import torch

from castalia.config import ModelConfig
from castalia.convert import from_huggingface, huggingface_config, model_config_fields, to_huggingface
from castalia.tools import families
from castalia.tools.model_matrix import CACHE_TOLERANCE, cache_error, gradient_error
from castalia.tools.model_matrix import random_model as random_fp64_model

pytest.importorskip("transformers", reason="parity is checked against transformers, a dev extra")


@pytest.mark.parametrize("name", families.FAMILIES)
def test_logits_equal_and_every_tensor_counts(name, tmp_path):
    model = families.random_model(ModelConfig(**families.FAMILIES[name]))
    reference = families.read_by_transformers(model, tmp_path)
    with torch.no_grad():
        assert reference(families.tokens()).logits.std() > 1
    assert families.logit_difference(model, reference) < families.LOGIT_TOLERANCE
    effect, tensor, tried = families.least_effect(model, reference)
    assert tried >= len(list(reference.parameters())) - 3
    assert effect > families.LEAST_EFFECT, tensor
    assert families.logit_difference(model, reference) < families.LOGIT_TOLERANCE


@pytest.mark.parametrize("name", families.FAMILIES)
def test_there_and_back(name):
    cfg = ModelConfig(**families.FAMILIES[name])
    weights = families.random_model(cfg).state_dict()
    theirs = to_huggingface(weights, cfg)
    back = from_huggingface(theirs, cfg)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[n], t) for n, t in weights.items())
    again = ModelConfig(**model_config_fields(huggingface_config(cfg)))
    assert from_huggingface(theirs, again).keys() == weights.keys()
    for key in families.FAMILIES[name]:
        if key not in ("num_kv_heads", "head_dim", "intermediate_size") and getattr(cfg, key) is not None:
            assert getattr(again, key) == getattr(cfg, key), key
    assert (again.kv_heads, again.head_size, again.expert_size) == (cfg.kv_heads, cfg.head_size, cfg.expert_size)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_cached_equals_uncached_and_gradients_are_right(name):
    model = random_fp64_model(families.small(families.FAMILIES[name]))
    assert cache_error(model) < CACHE_TOLERANCE
    error, at = gradient_error(model)
    assert error < 1e-5, at


def test_a_wrong_rotation_is_seen(tmp_path):
    """The check can fail: another base of the rotary frequencies than the exported one."""
    model = families.random_model(ModelConfig(**families.FAMILIES["qwen3"]))
    reference = families.read_by_transformers(model, tmp_path)
    model.cfg = model.cfg.model_copy(update={"rotary_base": 9000.0})
    assert families.logit_difference(model, reference) > 10 * families.LOGIT_TOLERANCE


def test_a_model_that_looks_ahead_is_exported_without_those_modules(tmp_path):
    model = families.random_model(ModelConfig(**families.FAMILIES["llama"], mtp_depth=2))
    assert families.logit_difference(model, families.read_by_transformers(model, tmp_path)) < families.LOGIT_TOLERANCE


def test_shipped_configurations_have_as_many_parameters_as_transformers_says():
    """An independent count of every shipped shape, on the meta device."""
    assert len(families.count_lines()) > 40
