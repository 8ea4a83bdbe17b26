"""Experts, further tokens and z-losses in a run: their gradients, records, scopes, and states that are resumed."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from castalia.config import Config, LossConfig, ModelConfig, OptimizerConfig
from castalia.data.loader import Batch
from castalia.errors import UserError
from castalia.generate.engine import make_cache
from castalia.generate.load import load_run
from castalia.model import build_model
from castalia.model.collected import Collected, balance_loss, router_z_loss
from castalia.model.mtp import shifted
from castalia.optim import make_store
from castalia.train.engine import LocalEngine
from castalia.train.loop import Stopped
from castalia.train.metrics import read_metrics
from castalia.train.run import train

EXPERTS = {"moe_num_experts": 4, "moe_bias_rate": 0.01, "moe_jitter": 0.05, "mtp_depth": 1, "intermediate_size": 48}
SMALL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 24, "max_position_embeddings": 16}


@pytest.fixture
def expert_values(tiny_values):
    losses = {"moe_balance": 0.01, "moe_z_loss": 1e-3, "z_loss": 1e-4}
    return tiny_values | {"model": tiny_values["model"] | EXPERTS, "loss": losses}


def batch(rows=4, length=12, seed=0, doc_ids=None):
    ids = torch.randint(0, 24, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return Batch(
        tokens=ids[:, :-1], labels=ids[:, 1:].clone(), positions=torch.arange(length).expand(rows, -1),
        doc_ids=doc_ids, extras={}, sample_ids=torch.arange(rows),
    )  # fmt: skip


def engine(loss, **model):
    built = build_model(ModelConfig(**(SMALL | model)), 0)
    return LocalEngine(built, make_store(built, OptimizerConfig(), "fp32", True), loss)


def gradients(engine, micro_batches):
    tokens = sum(b.num_tokens for b in micro_batches)
    stats = engine.forward_backward(micro_batches, tokens)
    return stats, {n: g.clone() for n, g in engine.store.gradients().items()}


def test_what_is_minimised_is_the_sum_of_its_terms():
    """Autograd of the formula, written out plainly, gives the engine's gradients."""
    loss = LossConfig(z_loss=0.01, moe_balance=0.1, moe_z_loss=0.02, mtp=0.5)
    one, data = engine(loss, moe_num_experts=4, mtp_depth=2), batch()
    data.labels[:, 3] = -100
    stats, found = gradients(one, [data])
    model, collected = one.model, Collected()
    hidden = model(data.tokens, collected=collected)
    valid = data.num_tokens

    def tokens_loss(hidden, labels):
        logits = model.logits(hidden).flatten(0, 1)
        z = logits.logsumexp(1).square()[labels.flatten() != -100].sum()
        return F.cross_entropy(logits, labels.flatten(), reduction="sum"), z

    nll, z = tokens_loss(hidden, data.labels)
    total = (nll + 0.01 * z) / valid
    for depth, ahead in enumerate(collected.ahead):
        further, its_z = tokens_loss(ahead, shifted(data.labels, depth + 1, -100))
        total = total + 0.5 / 2 * (further + 0.01 * its_z) / valid
    for routing in collected.routing.values():
        total = total + 0.1 * balance_loss(routing, "sequence") + 0.02 * router_z_loss(routing)
    expected = torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad])
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert found.keys() == set(names)
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    assert stats.loss == pytest.approx(nll.item() / valid)
    assert stats.aux["z_loss"] == pytest.approx(z.item() / valid, rel=1e-5)
    assert set(stats.aux) == {"z_loss", "moe_balance", "moe_z_loss", "mtp_loss_2", "mtp_loss_3", "expert_load"}
    assert {layer: sum(n) for layer, n in stats.experts.items()} == dict.fromkeys(range(4), 2 * 48)


@pytest.mark.parametrize("scope", ["sequence", "micro_batch"])
def test_a_sequence_scope_does_not_feel_micro_batches(scope):
    loss = LossConfig(moe_balance=1.0, moe_balance_scope=scope)
    results = []
    for size in (4, 2, 1):
        data = batch()
        cut = [
            Batch(
                tokens=data.tokens[i : i + size], labels=data.labels[i : i + size],
                positions=data.positions[i : i + size], doc_ids=None, extras={},
                sample_ids=data.sample_ids[i : i + size],
            )
            for i in range(0, 4, size)
        ]  # fmt: skip
        results.append(gradients(engine(loss, moe_num_experts=4), cut))
    name = "layers.0.mlp.router.weight"
    same = [torch.allclose(g[name], results[0][1][name], atol=1e-6) for _, g in results]
    assert same == ([True] * 3 if scope == "sequence" else [True, False, False])
    assert all(r[0].experts == results[0][0].experts for r in results)


def test_biases_move_once_for_each_update_by_the_global_batch():
    one = engine(LossConfig(), moe_num_experts=4, moe_bias_rate=0.25)
    bias = one.model.layers[0].mlp.router.bias
    stats, _ = gradients(one, [batch(seed=0), batch(seed=1)])
    assert not bias.any()  # not before the update
    one.updated()
    counts = torch.tensor(stats.experts[0], dtype=torch.float32)
    assert torch.equal(bias, 0.25 * (counts.mean() - counts).sign())


def test_shared_layers_have_one_bias():
    one = engine(LossConfig(), moe_num_experts=4, moe_bias_rate=0.25, num_layers=4, num_unique_layers=2)
    stats, _ = gradients(one, [batch()])
    one.updated()
    counts = (torch.tensor(stats.experts[0]) + torch.tensor(stats.experts[2])).float()
    assert torch.equal(one.model.layers[0].mlp.router.bias, 0.25 * (counts.mean() - counts).sign())


def test_no_label_of_another_document_is_predicted():
    documents = torch.tensor([[0] * 5 + [1] * 7] * 4, dtype=torch.int32)
    one, data = engine(LossConfig(), mtp_depth=1), batch(doc_ids=documents)
    data.labels[:, 4] = -100
    with torch.no_grad():
        sums, collected, head = one._loss(data, 1.0, None, True)
    from castalia.train.auxiliary import Auxiliary

    auxiliary = Auxiliary(one.loss, one.model.cfg)
    auxiliary.add(sums, collected, data.labels, 1.0, head, documents)
    assert auxiliary._noted["mtp_tokens_2"] == 4 * (3 + 6)  # of 5 and of 7 tokens


def test_further_tokens_are_seen_neither_early_nor_in_generation():
    """Module d at place i depends on tokens up to i + d alone; hidden states do not depend on the modules."""
    model = build_model(ModelConfig(**(SMALL | {"mtp_depth": 2})), 0)
    data, kept = batch(rows=1), Collected()
    plain = model(data.tokens)
    assert torch.equal(model(data.tokens, collected=kept), plain)
    changed = data.tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 24
    other = Collected()
    model(changed, collected=other)
    for depth, (a, b) in enumerate(zip(kept.ahead, other.ahead, strict=True), 1):
        differs = ((a - b).abs().amax(-1) > 1e-6)[0]
        assert differs.nonzero()[0].item() == 8 - depth
    cache = make_cache(model, 12)
    assert torch.allclose(model(data.tokens, cache=cache), plain, atol=1e-5)


def test_a_run_records_its_losses_and_the_use_of_experts(expert_values):
    run = train(Config.model_validate(expert_values), quiet=True)
    records = read_metrics(run.directory / "metrics.jsonl")
    steps = [r for r in records if r["kind"] == "train"]
    assert steps[-1]["loss"] < steps[0]["loss"] - 1.0
    assert steps[-1]["mtp_loss_2"] < steps[0]["mtp_loss_2"] - 0.5
    for name in ("moe_balance", "moe_z_loss", "z_loss", "expert_load"):
        assert steps[-1][name] > 0, name
    used = [r for r in records if r["kind"] == "experts"]
    assert len(used) == 12
    assert {layer: sum(n) for layer, n in used[0]["tokens"].items()} == dict.fromkeys("012", 2 * 8 * 32)
    json.dumps(used)
    model, _ = load_run(run.directory)
    assert torch.equal(model.layers[1].mlp.router.bias, run.model.layers[1].mlp.router.bias)
    assert model.layers[1].mlp.router.bias.any()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_equals_uninterrupted(expert_values, tmp_path, precision):
    def values(output, **training):
        return Config.model_validate(
            expert_values
            | {"training": expert_values["training"] | training | {"precision": precision}, "output": str(output)}
        )

    whole = train(values(tmp_path / "whole"), quiet=True).store.tensors()
    with pytest.raises(Stopped):
        train(values(tmp_path / "parts", exit_interval=5), quiet=True)
    parts = train(values(tmp_path / "parts"), quiet=True).store.tensors()
    assert whole.keys() == parts.keys() and "model.layers.0.mlp.router.bias" in whole
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name


def test_micro_batches_may_not_change_where_they_are_balanced(expert_values, tmp_path):
    expert_values["loss"]["moe_balance_scope"] = "micro_batch"
    first = {**expert_values, "training": expert_values["training"] | {"exit_interval": 5}}
    with pytest.raises(Stopped):
        train(Config.model_validate(first), quiet=True)
    expert_values["training"] |= {"micro_batch_size": 8}
    with pytest.raises(UserError, match="micro_batch_size"):
        train(Config.model_validate(expert_values), quiet=True)
