"""FLOPs are the plan's, bytes those of the tensors kept, and every moment belongs to one module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from castalia.config.load import from_yaml
from castalia.model.size import model_size, parameter_shapes
from castalia.tools.profile import profile
from castalia.tools.profile_page import page, report
from castalia.train.profile_modules import ModuleWatch, operation_flops
from castalia.train.profile_tree import lines, merged, read_profile, tree

TEXT = (
    "model: {{num_layers: 3, hidden_size: 32, num_attention_heads: 4, vocab_size: 64, rotary_fraction: 0.5{}}}\n"
    "data: {{seq_length: 16}}\ntraining: {{steps: 5, batch_size: 4, micro_batch_size: 2, precision: {}}}\n"
    "performance: {{threads: 1, device: cpu, matmul: native{}}}\n"
)


def config_of(model="", precision="fp32", performance=""):
    return from_yaml(TEXT.format(model, precision, performance), "f.yml")


@pytest.mark.parametrize(
    ("model", "precision", "performance"),
    [
        ("", "fp32", ""),
        (", num_kv_heads: 2, activation: swiglu, norm: rmsnorm, tie_embeddings: true, qk_norm: head", "bf16", ""),
        (", moe_num_experts: 4, mtp_depth: 1, num_unique_layers: 1, residual: sequential", "fp32", ""),
        ("", "bf16", ", arena: false, recompute: full"),
        ("}\noptimizer: {type: muon", "fp32", ""),  # whose own products are not the model's
    ],
)
def test_the_flops_are_the_plan_s(model, precision, performance):
    config = config_of(model, precision, performance)
    found = profile(config, repeat=1)
    counted = found.root.flops["forward"] + found.root.flops["backward"]
    # The plan has 6 FLOPs for each number that a token meets; no matrix product has gains and biases.
    shapes = parameter_shapes(config.model.model_copy(update={"max_position_embeddings": 16}), 64)
    repeats = 3 // (config.model.num_unique_layers or 3)
    vectors = sum(
        shape[0] * (repeats if name.startswith("layers.") else 1) for name, shape in shapes.items() if len(shape) == 1
    )
    assert counted == found.plan_flops - 6 * vectors * found.tokens
    assert found.plan_flops == found.tokens * model_size(config).flops_per_token and found.tokens == 64
    assert found.root.parameters == model_size(config).total_parameters
    again = found.root.flops["recompute"]
    # Each layer's forward pass once more, but for its last product, whose result nothing needs.
    down = 3 * 2 * 32 * 128 * found.tokens
    layers = next(p for p in found.root.parts if p.name == "layers")
    assert again == (layers.flops["forward"] - down if "recompute" in performance else 0)


class Toy(nn.Module):
    """x -> up -> x^2 -> down, called as a root is."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8, bias=False), nn.Linear(8, 4, bias=False)

    def forward(self, x):
        return self.down(self.up(x) ** 2)


class Loss:
    """What the watch needs of an engine."""

    def loss_sums(self, hidden):
        return hidden.square().sum()


class Ticks:
    """A clock that goes on by one each time it is looked at."""

    def __init__(self):
        self.at = 0

    def now(self):
        self.at += 1
        return self.at

    def between(self, start, end):
        return float(end - start)


def one_pass(clock=None):
    model, engine = Toy(), Loss()
    plain = engine.loss_sums
    x = torch.randn(6, 4)
    engine.loss_sums(model(x)).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with ModuleWatch(model, engine, clock) as watch:
        engine.loss_sums(model(x)).backward()
    assert engine.loss_sums == plain and not model._forward_hooks and not model.up._forward_pre_hooks
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))
    return model, watch


def test_bytes_are_those_that_are_kept():
    _, watch = one_pass()
    # up keeps x; the square keeps its input, 6 x 8; down the square; the loss its input, 6 x 4.
    assert watch.kept == {"up": 4 * 6 * 4, "": 4 * 6 * 8, "down": 4 * 6 * 8, "head": 4 * 6 * 4}
    each = 2 * 6 * 4 * 8
    assert watch.flops == {
        ("up", "forward"): each,
        ("down", "forward"): each,
        ("up", "backward"): each,  # x needs no gradient
        ("down", "backward"): 2 * each,
    }


def test_every_moment_belongs_to_one_module():
    clock = Ticks()
    model, watch = one_pass(clock)
    taken = watch.seconds()
    # Looks: each interval has two, and lasts one look longer for each look inside.
    assert taken["up", "forward"] == taken["down", "forward"] == taken["head", "forward"] == 1
    assert taken["", "forward"] == 3  # around two modules: begin, between, end
    for name in ("up", "down", "", "head"):
        assert taken[name, "backward"] >= 1
    assert watch.calls == {"": 1, "up": 1, "down": 1, "head": 1}
    _, counts = one_pass()
    root = tree(model, watch, counts)
    assert root.seconds["forward"] == 6 and root.kept == sum(counts.kept.values())
    assert [part.path for part in root.parts] == ["up", "down", "head"] and root.parameters == 64
    assert root.seconds["backward"] == sum(t for (_, phase), t in taken.items() if phase == "backward")


def test_operations():
    a, b, c = torch.empty(5, 3, 4), torch.empty(5, 4, 2), torch.empty(5, 3, 2)
    assert operation_flops("bmm", (a, b), c) == operation_flops("baddbmm", (c, a, b), c) == 2 * 5 * 3 * 4 * 2
    assert operation_flops("relu", (a,), a) == 0
    q, k, v = torch.empty(2, 4, 6, 8), torch.empty(2, 2, 10, 8), torch.empty(2, 2, 10, 16)
    forward = operation_flops("_scaled_dot_product_flash_attention_for_cpu", (q, k, v), None)
    assert forward == 2 * 2 * 4 * 6 * 10 * (8 + 16)
    assert operation_flops("_scaled_dot_product_flash_attention_backward", (q, q, k, v), None) == 2 * forward
    rows, grad, matrices = torch.empty(7, 4), torch.empty(7, 3), torch.empty(2, 4, 3)
    assert operation_flops("_grouped_mm", (rows, matrices), torch.empty(7, 3)) == 2 * 7 * 4 * 3
    assert operation_flops("_grouped_mm", (grad.T, rows), torch.empty(2, 3, 4)) == 2 * 7 * 4 * 3


def test_alike_layers_are_told_together():
    found = profile(config_of(), repeat=1)
    assert read_profile(found.as_dict()) == found
    together = merged(found.root)
    (layers,) = (p for p in together.parts if p.name == "layers")
    (block,) = layers.parts
    assert block.name == "0-2" and block.kind == "3 x Block" and block.parameters == layers.parameters
    assert block.measure("seconds") == pytest.approx(layers.measure("seconds"))
    assert block.calls == 6 and [p.name for p in block.parts] == ["attention_norm", "attention", "mlp_norm", "mlp"]
    assert len(lines(together, depth=1)) == 1 + 1 + len(together.parts)
    text = "\n".join(report(found, depth=2, each=True, count=3))
    assert "random tokens, as no data is named" in text and "castalia plan reckons" in text
    assert text.count("  Block  ") == 3 and "own work that takes longest" in text
    html = page(found)
    fetched = html.replace("http://www.w3.org/2000/svg", "").replace('href="data:,"', "")
    assert not any(word in fetched for word in ("http", "src=", "href", "@import", "url("))
    assert html.count('class="view') == 6 and "layers.0-2.attention.qkv (Linear)" in html and "layers.1.mlp.up" in html
