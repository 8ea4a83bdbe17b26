"""Blocks against their formulas: gates, residual forms, missing biases, tied norms, shared layers, compiling."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

from castalia.config import Config, ModelConfig
from castalia.generate.engine import make_cache
from castalia.model import Transformer, linear_cross_entropy
from castalia.model.dropout import DropoutKey
from castalia.model.layers import MLP, Context
from castalia.model.registry import ACTIVATIONS
from castalia.model.size import flops_per_token, model_size, parameter_shapes
from castalia.model.transformer import Block
from castalia.optim.weights import low_precision_names

SHAPE = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64, "rotary_fraction": 0.5}

FUNCTIONS = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: x * 0.5 * (1 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))),
    "relu": lambda x: x * (x > 0),
    "silu": lambda x: x * torch.sigmoid(x),
    "swish": lambda x: x * torch.sigmoid(x),
    "mish": lambda x: x * torch.tanh(torch.log1p(torch.exp(x))),
    "softsign": lambda x: x / (1 + x.abs()),
}
GATES = {
    "swiglu": FUNCTIONS["silu"],
    "geglu": FUNCTIONS["gelu"],
    "reglu": FUNCTIONS["relu"],
    "bilinear": lambda x: x,
    "glu": torch.sigmoid,
}


def config(**changes):
    return ModelConfig(**(SHAPE | changes))


def randomise(module, std=0.3):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(std * torch.randn(p.shape, generator=generator))
    return module.eval()


def tokens(rows=2, length=12):
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [*FUNCTIONS, *GATES])
def test_mlp_formula(name):
    cfg = config(activation=name, intermediate_size=48)
    mlp = randomise(MLP(cfg)).double()
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    up = x @ mlp.up.weight.T + mlp.up.bias
    if name in GATES:
        assert cfg.gated
        inner = GATES[name](x @ mlp.gate.weight.T + mlp.gate.bias) * up
    else:
        assert mlp.gate is None and not cfg.gated
        inner = FUNCTIONS[name](up)
    torch.testing.assert_close(mlp(x), inner @ mlp.down.weight.T + mlp.down.bias, rtol=1e-6, atol=1e-8)


def test_every_activation_is_tested():
    assert set(ACTIVATIONS) == set(FUNCTIONS) | set(GATES)


@pytest.mark.parametrize("mlp_bias", [True, False])
@pytest.mark.parametrize("residual", ["sequential", "parallel", "tied"])
@torch.no_grad()
def test_residual_forms(residual, mlp_bias):
    """Both branches are in the sum, with and without the MLP's biases (GPT-NeoX loses one of them there)."""
    tied = residual == "tied"
    cfg = config(residual="parallel" if tied else residual, tie_norms=tied, mlp_bias=mlp_bias, position="none")
    block, x = randomise(Block(cfg, 0)), torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(2))
    a = block.attention(block.attention_norm(x), 0, Context())
    if residual == "sequential":
        expected = x + a + block.mlp(block.mlp_norm(x + a))
    else:
        expected = x + a + block.mlp((block.attention_norm if tied else block.mlp_norm)(x))
    torch.testing.assert_close(block(x, 0, Context()), expected)
    assert a.abs().max() > 0.1
    assert tied == (not any("mlp_norm" in name for name, _ in block.named_parameters()))


@torch.no_grad()
def test_queries_and_keys_are_normed_before_they_are_rotated():
    """So a layer norm's output does not feel their scale, but its gain is felt."""
    model = randomise(Transformer(config(qk_norm=True)))
    base = model(tokens())
    for layer in model.layers:
        qkv = layer.attention.qkv
        for p in (qkv.weight, qkv.bias):  # rows: per head, query, key, value
            p.view(4, 3, 8, -1)[:, :2] *= 7.0
    torch.testing.assert_close(model(tokens()), base, rtol=1e-3, atol=1e-3)
    model.layers[0].attention.qk_norm.weight[9] += 1.0
    assert (model(tokens()) - base).abs().max() > 1e-2


def test_qk_norm_with_grouped_heads_is_refused():
    with pytest.raises(ValueError, match="qk_norm"):
        config(qk_norm=True, num_kv_heads=2)


def test_tied_norms_need_parallel_branches():
    with pytest.raises(ValueError, match="tie_norms"):
        config(tie_norms=True)


CHANGES = [
    {"norm": norm, "qk_norm": True, **more}
    for norm, more in zip(
        ("layernorm", "rmsnorm", "rmsnorm_eps_outside", "scalenorm", "non_parametric_layernorm"),
        (
            {"position": "learned", "max_position_embeddings": 20},
            {"position": "rpe", "activation": "bilinear", "mlp_bias": False},
            {"residual": "parallel", "tie_norms": True, "activation": "glu"},
            {"num_layers": 4, "num_unique_layers": 2, "tie_embeddings": True},
            {"soft_prompt_tokens": 3, "attention_bias": False},
        ),
        strict=True,
    )
]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda c: c["norm"])
def test_shapes_from_the_configuration_are_the_models(changes):
    cfg = config(**changes)
    model = Transformer(cfg)
    built = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert parameter_shapes(cfg, cfg.vocab_size) == built
    assert set(model.state_dict()) == set(built)


# --- Shared layers ---


def shared_and_not(style, **changes):
    """A model of 2 layers used twice, and one of 4 layers with copies of them."""
    changes |= {"num_layers": 4, "num_unique_layers": 2, "param_sharing_style": style}
    shared = randomise(Transformer(config(**changes)))
    apart = Transformer(config(**(changes | {"num_unique_layers": None}))).eval()
    order = {"grouped": (0, 1, 0, 1), "spaced": (0, 0, 1, 1)}[style]
    state = shared.state_dict()
    copies = {n: v for n, v in state.items() if not n.startswith("layers.")}
    for i, j in enumerate(order):
        head = f"layers.{j}."
        copies |= {f"layers.{i}.{n.removeprefix(head)}": v for n, v in state.items() if n.startswith(head)}
    apart.load_state_dict(copies)
    return shared, apart, order


@pytest.mark.parametrize("style", ["grouped", "spaced"])
def test_shared_layers_are_copies_whose_gradients_add_up(style):
    shared, apart, order = shared_and_not(style)
    assert {n.split(".")[1] for n in shared.state_dict() if n.startswith("layers.")} == {"0", "1"}
    assert torch.equal(shared(tokens()), apart(tokens()))
    for model in (shared, apart):
        model(tokens()).square().sum().backward()
    for name, p in shared.layers.named_parameters():
        index, rest = name.split(".", 1)
        parts = [apart.layers[i].get_parameter(rest).grad for i, j in enumerate(order) if j == int(index)]
        torch.testing.assert_close(p.grad, sum(parts), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_each_execution_of_a_shared_layer_has_its_own_cache_and_its_own_masks():
    shared, apart, _ = shared_and_not("grouped", hidden_dropout=0.3, attention_dropout=0.3)
    whole, parts, cache = shared(tokens()), [], make_cache(shared, 12)
    for piece in tokens().split([7, 1, 4], 1):
        parts.append(shared(piece, cache=cache))
        cache.advance(piece.shape[1])
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    key = DropoutKey(1, 2, torch.arange(2))
    assert torch.equal(shared(tokens(), dropout=key), apart(tokens(), dropout=key))


def test_shared_layers_are_counted_once_and_paid_for_every_time():
    shared = model_size(Config(model=config(num_layers=4, num_unique_layers=2)))
    two, four = (model_size(Config(model=config(num_layers=n))) for n in (2, 4))
    assert shared.total_parameters == two.total_parameters
    assert shared.flops_per_token == four.flops_per_token
    assert flops_per_token(config(), 0, 0, 1) == 12 * 2 * 32


def test_sharing_needs_a_divisor():
    with pytest.raises(ValueError, match="num_unique_layers"):
        config(num_layers=4, num_unique_layers=3)


# --- Working copies and compiling ---


@pytest.mark.parametrize("position", ["rotary", "learned", "sinusoidal", "rpe", "alibi", "none"])
def test_bf16_copies_give_nearly_the_same_and_leave_gradients_everywhere(position):
    model = randomise(
        Transformer(config(position=position, max_position_embeddings=16, qk_norm=True, norm="rmsnorm")), 0.1
    )
    weights = {n: (p.bfloat16() if p.ndim > 1 and "embedding" not in n else p) for n, p in model.named_parameters()}
    with torch.no_grad():
        exact = model(tokens())
    hidden = functional_call(model, weights, (tokens(),))
    assert hidden.dtype == torch.float32
    assert (hidden - exact).norm() < 0.05 * exact.norm()
    key = DropoutKey(0, 0, torch.arange(2))
    linear_cross_entropy(
        functional_call(model, weights, (tokens(), None, None, key)), weights["head.weight"], tokens()
    )[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("position", ["rotary", "alibi"])
def test_compiles_to_one_graph(position):
    """No graph breaks, and no new graph for another step's dropout."""
    cfg = config(position=position, hidden_dropout=0.1, attention_dropout=0.1)
    model = randomise(Transformer(cfg))
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=count)
    torch.testing.assert_close(compiled(tokens()), model(tokens()))
    assert len(graphs) == 1
    for step in range(3):
        key = DropoutKey(0, step, torch.arange(2) + step)
        torch.testing.assert_close(compiled(tokens(), None, None, key), model(tokens(), None, None, key))
    assert len(graphs) == 2


@pytest.mark.parametrize("tied", [True, False])
def test_tables_that_are_only_looked_up_stay_fp32(tied):
    shape = {"max_position_embeddings": 16, "tie_embeddings": tied, "soft_prompt_tokens": 2, "qk_norm": True}
    for position, table in (("learned", "position_embedding.weight"), ("rpe", "relative_bias.weight")):
        low = low_precision_names(Transformer(config(position=position, **shape)))
        assert not {table, "soft_prompt.weight", "layers.0.attention.qk_norm.weight"} & set(low)
        assert ("embedding.weight" in low) == tied and "layers.1.mlp.down.weight" in low
