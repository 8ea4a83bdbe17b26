"""Norms behind the tables of tokens and positions: what they compute, how the tables begin, and who has them."""

import pytest
import torch
import torch.nn.functional as F

from castalia.config import ModelConfig
from castalia.convert.gptneox_table import table
from castalia.errors import UserError
from castalia.model.size import parameter_shapes
from castalia.model.transformer import build_model


def config(**settings):
    shape = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 50}
    return ModelConfig(**(shape | {"max_position_embeddings": 16, "position": "learned"} | settings))


@pytest.mark.parametrize("kind", ["none", "tokens", "positions", "both"])
def test_tables_are_normed_each_for_itself(kind):
    cfg = config(stable_embedding=kind)
    model = build_model(cfg, 0)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == parameter_shapes(cfg, 50)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "embedding_norm" in name:
                p.copy_(torch.linspace(0.5, 1.5, 32))
    tokens = torch.arange(12).view(2, 6)
    gain = torch.linspace(0.5, 1.5, 32)
    parts = {"tokens": model.embedding(tokens), "positions": model.position_embedding(torch.arange(6))}
    for name in ("tokens", "positions"):
        if kind in (name, "both"):
            parts[name] = F.layer_norm(parts[name], (32,), gain, gain)
    found = model._embed(tokens, torch.arange(6), None)
    torch.testing.assert_close(found, parts["tokens"] + parts["positions"])


def test_their_tables_are_drawn_by_xavier_uniform():
    model, plain = (build_model(config(stable_embedding=kind, init_method="normal"), 0) for kind in ("tokens", "none"))
    bound = (6 / (50 + 32)) ** 0.5
    assert 0.95 * bound < model.embedding.weight.abs().max() <= bound
    assert plain.embedding.weight.abs().max() < 0.5 * bound
    assert torch.equal(model.position_embedding.weight, plain.position_embedding.weight)


def test_positions_that_are_no_table_have_no_norm():
    with pytest.raises(ValueError, match="needs model.position learned"):
        config(stable_embedding="both", position="rotary")


def test_gptneox_has_the_one_behind_positions():
    rows = {row.ours: row.theirs for row in table(config(stable_embedding="positions", residual="parallel"))}
    assert rows["position_embedding_norm.bias",] == ("0.position_embeddings.norm.bias",)
    with pytest.raises(UserError, match="norms learned positions alone"):
        table(config(stable_embedding="tokens"))
