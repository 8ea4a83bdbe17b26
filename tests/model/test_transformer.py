"""The model: size from the configuration, initial weights by name, causality, learning."""

from __future__ import annotations

import math

import pytest
import torch

from castalia.config import Config, ModelConfig, TrainingConfig
from castalia.errors import UserError
from castalia.model import Transformer, build_model, linear_cross_entropy
from castalia.model.initial import INIT_STD, normal_rows
from castalia.model.size import model_size, parameter_shapes

NEOX = ModelConfig(
    num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=96, rotary_fraction=0.25, residual="parallel"
)
LLAMA = ModelConfig(
    num_layers=2, hidden_size=32, num_attention_heads=4, num_kv_heads=2, vocab_size=96, norm="rmsnorm",
    activation="swiglu", attention_bias=False, mlp_bias=False, intermediate_size=48,
)  # fmt: skip
BOTH = pytest.mark.parametrize("cfg", [NEOX, LLAMA], ids=["neox", "llama"])


@BOTH
@pytest.mark.parametrize("change", [{}, {"tie_embeddings": True}, {"head_dim": 16}, {"norm": "rmsnorm"}])
def test_shapes_from_the_configuration_are_the_models(cfg, change):
    cfg = cfg.model_copy(update=change)
    built = {name: tuple(p.shape) for name, p in Transformer(cfg).named_parameters()}
    assert parameter_shapes(cfg, cfg.vocab_size) == built


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "vocab", "total", "inner"),
    [(6, 512, 8, 50304, 70_426_624, 18_915_328), (44, 6144, 64, 50432, 20_554_567_680, None)],
    ids=["pythia-70m", "gpt-neox-20b"],
)
def test_published_parameter_counts(layers, hidden, heads, vocab, total, inner):
    model = ModelConfig(num_layers=layers, hidden_size=hidden, num_attention_heads=heads, vocab_size=vocab)
    size = model_size(Config(model=model))
    assert size.total_parameters == total
    if inner is not None:
        assert size.non_embedding_parameters == inner


def test_flops_per_token_are_palms():
    model = ModelConfig(num_layers=6, hidden_size=512, num_attention_heads=8, vocab_size=50304)
    size = model_size(Config(model=model))
    assert size.flops_per_token == 6 * 18_915_328 + 6 * 50304 * 512 + 12 * 6 * 512 * 512


def test_size_needs_a_vocabulary():
    with pytest.raises(UserError, match="vocab_size"):
        model_size(Config(training=TrainingConfig(steps=1)))


@BOTH
def test_initial_weights_depend_on_seed_and_name_alone(cfg):
    one, two, other = build_model(cfg, 7), build_model(cfg, 7), build_model(cfg, 8)
    deeper = build_model(cfg.model_copy(update={"num_layers": 3, "output_init_method": "normal"}), 7)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
        if value.ndim == 2:
            assert not torch.equal(value, other.state_dict()[name]), name
    same = "layers.0.attention.qkv.weight"
    assert torch.equal(one.state_dict()[same], deeper.state_dict()[same])
    assert not torch.equal(one.layers[0].attention.qkv.weight, one.layers[1].attention.qkv.weight)


def test_a_slice_of_rows_is_drawn_alone():
    whole = torch.empty(3000, 700)
    normal_rows("x.weight", whole, 1, 0.5)
    part = torch.empty(1000, 700)
    normal_rows("x.weight", part, 1, 0.5, first_row=1490)
    assert torch.equal(part, whole[1490:2490])
    assert whole.std().item() == pytest.approx(0.5, rel=0.01)


def test_initial_standard_deviations():
    cfg = ModelConfig(num_layers=4, hidden_size=256, num_attention_heads=4, vocab_size=2048)
    model = build_model(cfg, 0)
    assert model.layers[0].mlp.up.weight.std().item() == pytest.approx(math.sqrt(2 / (5 * 256)), rel=0.02)
    assert model.layers[0].mlp.down.weight.std().item() == pytest.approx(2 / (4 * 16), rel=0.02)
    assert (model.layers[0].mlp.up.bias == 0).all() and (model.final_norm.weight == 1).all()
    assert INIT_STD["scaled_normal"](cfg) == pytest.approx(0.02 / math.sqrt(8))


@BOTH
def test_no_token_sees_the_future(cfg):
    model = _random(cfg)
    tokens = torch.randint(0, 96, (1, 12), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 96
    a, b = model(tokens), model(changed)
    assert torch.equal(a[:, :7], b[:, :7])
    assert (a[:, 7:] - b[:, 7:]).abs().amax(-1).min() > 1e-4


@BOTH
def test_positions_are_relative(cfg):
    """Rotary positions: shifting all of them changes nothing but rounding; permuting them does."""
    model = _random(cfg)
    tokens = torch.randint(0, 96, (1, 12), generator=torch.Generator().manual_seed(0))
    base = model(tokens)
    torch.testing.assert_close(model(tokens, torch.arange(12) + 100), base, rtol=1e-3, atol=1e-3)
    assert (model(tokens, torch.arange(12) * 2) - base).abs().max() > 1e-2


@BOTH
def test_accumulated_gradient_is_the_whole_batchs(cfg):
    def gradient(pieces):
        model = build_model(cfg, 0)
        tokens = torch.randint(0, 96, (6, 9), generator=torch.Generator().manual_seed(0))
        labels = tokens[:, 1:].clone()
        labels[0, :5] = -100  # unequal counts: a mean of means would differ
        for part in torch.arange(6).chunk(pieces):
            hidden = model(tokens[part, :-1])
            linear_cross_entropy(hidden, model.head_weight, labels[part], scale=1 / 43)[0].backward()
        return {n: p.grad for n, p in model.named_parameters()}

    whole, pieces = gradient(1), gradient(3)
    for name, value in whole.items():
        assert (value - pieces[name]).norm() <= 1e-5 * value.norm() + 1e-8, name


@BOTH
def test_learns_to_copy(cfg):
    """The second half repeats the first: below log(V), what any predictor without context can reach."""
    model = build_model(cfg.model_copy(update={"vocab_size": 16}), 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(250):
        first = torch.randint(0, 16, (16, 8), generator=generator)
        tokens = torch.cat([first, first], 1)
        labels = tokens[:, 1:].clone()
        labels[:, :7] = -100
        loss, _ = linear_cross_entropy(model(tokens[:, :-1]), model.head_weight, labels, scale=1 / (16 * 8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.9 * math.log(16)
    assert sum(losses[-10:]) / 10 < 0.5 * math.log(16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm": "batchnorm"}, "model.norm"),
        ({"activation": "sinus"}, "model.activation"),
        ({"block": "nowhere:Block"}, "model.block"),
        ({"init_method": "zeros"}, "model.init_method"),
    ],
)
def test_unknown_parts_are_named(change, words):
    with pytest.raises(UserError, match=words):
        build_model(NEOX.model_copy(update=change), 0)


def _random(cfg):
    model = Transformer(cfg).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3, generator=generator)
    return model
