"""Experts: grouped products equal plain ones, routing by its formulas, balance, and a model that learns."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from castalia.config import Config, LossConfig, ModelConfig
from castalia.model import Transformer, build_model
from castalia.model.collected import Collected, Routing, balance_loss, expert_counts, router_z_loss
from castalia.model.dropout import DropoutKey
from castalia.model.layers import Context
from castalia.model.moe import MoE, Router, grouped_linear, sinkhorn
from castalia.model.size import model_size, parameter_shapes
from castalia.tools.model_matrix import cache_error, copy_task, gradient_error, random_model

SMALL = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 12, "max_position_embeddings": 64,
    "intermediate_size": 48, "moe_num_experts": 4,
}  # fmt: skip
FORMS = {
    "top 2 gated": {"activation": "swiglu"},
    "top 1 sigmoid": {"moe_top_k": 1, "moe_score": "sigmoid", "moe_normalise": False},
    "sinkhorn": {"moe_router": "sinkhorn", "moe_top_k": 1, "moe_normalise": False},
    "shared, every second": {"moe_shared_experts": 2, "moe_interval": 2, "moe_first_layer": 1, "activation": "swiglu"},
    "biased": {"moe_bias_rate": 0.01, "moe_score": "sigmoid", "norm": "rmsnorm", "residual": "parallel"},
}  # fmt: skip


def moe_config(**changes):
    return ModelConfig(**(SMALL | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width", [24, 10], ids=["aligned", "not aligned"])
def test_grouped_products_equal_one_product_each(dtype, width):
    torch.manual_seed(0)
    counts = torch.tensor([3, 0, 7, 2])
    rows = torch.randn(12, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(4, width, 16, dtype=dtype, requires_grad=True)
    y = grouped_linear(rows, weight, counts)
    expected = torch.cat([r @ w.T for r, w in zip(rows.split(counts.tolist()), weight, strict=True)])
    upstream = torch.randn_like(y)
    tolerance = {"atol": 0.05, "rtol": 0.02} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(y, expected, **tolerance)
    for mine, theirs in zip(
        torch.autograd.grad(y, (rows, weight), upstream),
        torch.autograd.grad(expected, (rows, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, **tolerance)


@pytest.mark.parametrize("changes", FORMS.values(), ids=FORMS.keys())
def test_a_mixture_is_the_weighted_sum_of_its_experts(changes):
    """Against the definition: every expert computed for every token, weighted by the router's choice."""
    cfg = moe_config(**changes)
    model = build_model(cfg, 0)
    moe = next(b.mlp for b in model.layers if isinstance(b.mlp, MoE))
    x = torch.randn(2, 9, 32)
    if cfg.moe_bias_rate:
        moe.router.bias.copy_(torch.tensor([5.0, 0.0, 0.0, -5.0]))
    y = moe(x, 0, Context())

    logits = x @ moe.router.weight.T
    scores = logits.sigmoid() if cfg.moe_score == "sigmoid" else logits.softmax(-1)
    chosen = (scores + (0 if moe.router.bias is None else moe.router.bias)).topk(cfg.moe_top_k).indices
    weights = torch.zeros_like(scores).scatter(-1, chosen, scores.gather(-1, chosen))
    if cfg.moe_normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    act = F.silu if cfg.gated else F.gelu
    expected = torch.zeros_like(x)
    for e in range(4):
        up = x @ moe.experts.up.weight[e].T
        inner = act(x @ moe.experts.gate.weight[e].T) * up if cfg.gated else act(up)
        expected += weights[..., e : e + 1] * (inner @ moe.experts.down.weight[e].T)
    if moe.shared is not None:
        assert moe.shared.up.weight.shape == (2 * 48, 32)
        expected += moe.shared(x)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
    if cfg.moe_bias_rate:
        assert (chosen != 3).all() and (chosen == 0).any(-1).all()


@pytest.mark.parametrize("changes", FORMS.values(), ids=FORMS.keys())
def test_parameters_are_those_of_the_table(changes):
    cfg = moe_config(**changes)
    with torch.device("meta"):
        found = {name: tuple(p.shape) for name, p in Transformer(cfg).named_parameters()}
    assert found == parameter_shapes(cfg, 12)
    assert [cfg.has_experts(i) for i in range(2)] == [f"layers.{i}.mlp.router.weight" in found for i in range(2)]


@pytest.mark.parametrize("changes", FORMS.values(), ids=FORMS.keys())
def test_cached_equals_uncached_and_gradients_are_right(changes):
    model = random_model(moe_config(**changes))
    assert cache_error(model) < 1e-10
    error, name = gradient_error(model)
    assert error < 1e-5, name


@pytest.mark.parametrize("name", ["top 2 gated", "sinkhorn"])
def test_copying_is_learnt(name):
    loss, _ = copy_task(moe_config(**FORMS[name]))
    assert loss < 0.5 * math.log(2)


def test_every_place_and_interval():
    cfg = moe_config(num_layers=6, moe_first_layer=1, moe_interval=2)
    assert [cfg.has_experts(i) for i in range(6)] == [False, True, False, True, False, True]
    assert not any(ModelConfig().has_experts(i) for i in range(6))


def test_each_expert_starts_as_if_it_were_alone():
    """Initial weights depend on the expert's number in the layer, not on how many of them are held here."""
    few, more = (build_model(moe_config(moe_num_experts=n), 3).layers[0].mlp.experts.up.weight for n in (2, 4))
    assert torch.equal(few, more[:2])
    for method in ("orthogonal", "xavier_uniform"):
        weight = build_model(moe_config(init_method=method), 0).layers[0].mlp.experts.up.weight
        assert not torch.equal(weight[0], weight[1])
        if method == "orthogonal":
            torch.testing.assert_close(
                weight[1].detach().T @ weight[1].detach(), 2 * torch.eye(32), atol=1e-4, rtol=1e-4
            )
        else:
            assert weight.detach().abs().max() == pytest.approx(math.sqrt(6 / (32 + 48)), rel=0.01)


def routing_of(chosen, logits):
    return Routing(logits, logits.softmax(-1), chosen)


def test_balance_loss_is_one_when_even_and_the_number_of_experts_when_not():
    even = routing_of(torch.arange(8).view(2, 4, 1) % 4, torch.zeros(2, 4, 4))
    sure = torch.full((2, 4, 4), -40.0).index_fill(2, torch.tensor([1]), 40.0)
    for scope in ("sequence", "micro_batch"):
        assert balance_loss(even, scope).item() == pytest.approx(1.0)
        assert balance_loss(routing_of(torch.ones(2, 4, 1, dtype=torch.int64), sure), scope).item() == pytest.approx(4)
    # Each sequence uses one expert, together they use both.
    parted = torch.tensor([[[40.0, -40.0]] * 3, [[-40.0, 40.0]] * 3])
    each = routing_of(parted.argmax(-1, keepdim=True), parted)
    assert balance_loss(each, "sequence").item() == pytest.approx(2.0)
    assert balance_loss(each, "micro_batch").item() == pytest.approx(1.0)


def test_losses_of_the_router_have_the_right_gradients():
    logits = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)

    def losses(logits):
        routing = Routing(logits, logits.sigmoid(), torch.arange(20).view(2, 5, 2) % 4)
        return balance_loss(routing, "sequence"), balance_loss(routing, "micro_batch"), router_z_loss(routing)

    assert torch.autograd.gradcheck(losses, logits)
    assert losses(logits)[2].item() == pytest.approx(logits.exp().sum(-1).log().square().mean().item())


def test_sinkhorn_balances():
    """Scaled until both margins are even, whatever the logits; by default as early as GPT-NeoX stops."""
    logits = 2 * torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([3.0, 0.0, 0.0, 0.0])
    scaled = sinkhorn(logits, rounds=100, tolerance=0.0)
    torch.testing.assert_close(scaled.sum(0), torch.full((4,), 0.25), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(scaled.sum(1), torch.full((64,), 1 / 64), atol=1e-4, rtol=1e-3)
    # One round by hand.
    cost = logits.exp()
    columns = 1 / (4 * cost.sum(0))
    rows = 1 / (64 * ((columns * cost).sum(1) + 1e-8))
    columns = 1 / (4 * ((rows[:, None] * cost).sum(0) + 1e-8))
    torch.testing.assert_close(sinkhorn(logits, rounds=1), columns * cost * rows[:, None])
    assert torch.equal(sinkhorn(logits, rounds=9, tolerance=1e9), sinkhorn(logits, rounds=1))


def test_sinkhorn_looks_at_other_tokens_in_training_alone():
    cfg = moe_config(moe_router="sinkhorn", moe_top_k=1)
    router = Router(cfg)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[2] = 3.0
    x = torch.rand(4, 16, 32)
    plain, trained = (expert_counts(router(x, 0, Context(collected=c))[1]) for c in (None, Collected()))
    assert plain.tolist() == [0, 0, 64, 0]
    assert trained.max() < 64


def test_biases_even_out_the_use_of_experts():
    """Without any loss: experts that get too few tokens are preferred until they do not."""
    torch.manual_seed(0)
    router = Router(moe_config(moe_bias_rate=0.003, moe_score="sigmoid"))
    with torch.no_grad():
        router.weight.normal_(0, 0.05)
        router.weight[1] += 0.1
    x, worst = torch.randn(4, 64, 32) + 0.3, []
    for _ in range(200):
        counts = expert_counts(router(x, 0, Context())[1])
        worst.append((counts.max() / counts.double().mean()).item())
        router.rebalance(counts)
    assert worst[0] > 1.5
    assert sum(worst[-20:]) / 20 < 1.1
    assert not router.bias.requires_grad


def test_jitter_depends_on_the_sample_and_is_within_its_bounds():
    router = Router(moe_config(moe_jitter=0.1))
    with torch.no_grad():
        router.weight.copy_(torch.eye(4, 32))
    x = torch.ones(3, 5, 32)
    keys = [DropoutKey(0, 7, torch.tensor(ids)) for ids in ([4, 5, 6], [6, 5, 4])]
    first, second = (router(x, 1, Context(dropout=key))[1].logits for key in keys)
    assert torch.equal(first.flip(0), second)
    assert 0.9 <= first.min() < 0.93 and 1.07 < first.max() <= 1.1
    assert first.unique().numel() > 50
    assert torch.equal(router(x, 1, Context())[1].logits, torch.ones(3, 5, 4))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"moe_num_experts": 0, "moe_shared_experts": 1}, "moe_shared_experts needs experts"),
        ({"moe_top_k": 5}, "more than the 4"),
        ({"moe_first_layer": 2}, "no layer would have experts"),
        ({"moe_router": "sinkhorn", "moe_bias_rate": 0.1}, "sinkhorn balances by itself"),
    ],
)
def test_nonsense_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        moe_config(**changes)


def test_losses_of_experts_need_experts():
    with pytest.raises(ValueError, match=r"loss\.moe_balance needs experts"):
        Config(model=ModelConfig(), loss=LossConfig(moe_balance=0.1))


def test_the_loss_of_further_tokens_needs_modules_that_predict_them():
    with pytest.raises(ValueError, match=r"loss\.mtp weighs what model\.mtp_depth predicts"):
        Config(model=ModelConfig(), loss=LossConfig(mtp=0.1))
    assert Config(model=ModelConfig(mtp_depth=1), loss=LossConfig(mtp=0.1)).loss.mtp == 0.1


def test_a_plan_counts_what_a_token_meets():
    """Of four experts' weights, two for each token; FLOPs follow those."""
    dense, sparse = (
        model_size(
            Config(model=ModelConfig(**(SMALL | {"moe_num_experts": n, "moe_top_k": k})), data={"seq_length": 8})
        )
        for n, k in ((2, 2), (4, 2))
    )
    expert, router = 2 * 32 * 48, 2 * 32  # by layer: one expert's matrices, two more rows of the router
    assert dense.active_parameters == dense.total_parameters
    assert sparse.total_parameters == dense.total_parameters + 2 * (2 * expert + router)
    assert sparse.active_parameters == dense.total_parameters + 2 * router
    assert sparse.flops_per_token == dense.flops_per_token + 6 * 2 * router
