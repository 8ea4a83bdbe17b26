"""The coordinate check passes where muP is claimed and fails without any one of its rules; the sweep goes on."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from castalia.cli import main
from castalia.config import Config, ModelConfig, OptimizerConfig, TrainingConfig, load, mup
from castalia.data.store import StoreWriter
from castalia.errors import UserError
from castalia.optim import OptimizerKind, optimizers
from castalia.tools.mup import coordinate_check, fitted_slope
from castalia.tools.mup_page import page, values, verdict
from castalia.tools.mup_shapes import base_shapes_text
from castalia.tools.mup_sweep import sweep, trials

WIDTHS = 32, 64, 128
NORMAL = {"init_method": "normal", "output_init_method": "normal"}
EXPERTS = {"moe_num_experts": 4, "moe_shared_experts": 1}
FORMS = {
    "gpt-neox": {"residual": "parallel"},
    "llama": {"norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2, "attention_bias": False, "mlp_bias": False},
    "gpt-2": {"position": "learned", "tie_embeddings": True, **NORMAL},
    "rpe": {"position": "rpe"},
    "qwen 3": {"qk_norm": "head", "num_kv_heads": 1, "head_dim": 32},
    "olmo 2": {"qk_norm": "full", "norm_placement": "post", "norm": "rmsnorm"},
    "gmlp": {"attention": ["gmlp"], "position": "none"},
    "experts": EXPERTS,
    "window, xavier": {"attention": ["window"], "attention_window": 8, "init_method": "xavier_normal"},
}


def config(**fields):
    sizes = {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 128}
    return Config(model=ModelConfig(**sizes | fields), training=TrainingConfig(steps=1))


def check(cfg, **given):
    return coordinate_check(cfg, WIDTHS, seeds=1, **given)


@pytest.mark.parametrize("form", FORMS)
def test_passes_where_it_is_claimed(form):
    found = check(config(**FORMS[form]))
    assert found.good, verdict(found)
    assert any(abs(row.standard) > 0.4 for row in found.rows)  # the standard parametrisation would not


def without(rule):
    """A rate or initial factor that leaves out what `rule` says of the parameter's name."""

    def left_out(original):
        return lambda name, *rest: 1.0 if rule(name) else original(name, *rest)

    return left_out


def everywhere(name):
    return True


RULES = {
    "initial weights": ("initial_factor", without(everywhere), NORMAL, "attention.qkv"),
    "base width of init methods": ("at_base", lambda _: lambda cfg: cfg, {}, "embedding"),
    "rates of hidden weights": ("rate_factor", without(everywhere), {}, "attention.qkv"),
    "rates of vectors": (
        "rate_factor",
        lambda _: lambda name, cfg, family: 1 / mup.ratios(cfg).hidden,
        {},
        "embedding",
    ),
    "weight decay": ("decay_factor", lambda _: lambda rate: 1.0, {}, "attention.qkv.weight"),
    "attention": ("attention_scale", lambda _: lambda cfg: None, {}, "attention.scores"),
    "logits": ("output_factor", lambda _: lambda cfg: 1.0, {}, "logits"),
    "relative biases": ("base_head_size", lambda _: lambda cfg: cfg.head_size, {"position": "rpe"}, "attention.bias"),
    "rates of routers": ("rate_factor", without(lambda n: "router" in n), EXPERTS, "mlp.router"),
    "initial routers": ("initial_factor", without(lambda n: "router" in n), EXPERTS, "mlp.router"),
}


@pytest.mark.parametrize("rule", RULES)
def test_fails_without_any_one_rule(rule, monkeypatch):
    name, change, fields, part = RULES[rule]
    monkeypatch.setattr(mup, name, change(getattr(mup, name)))
    bad = [row.part for row in check(config(**fields)).rows if not row.good]
    assert any(name.endswith(part) for name in bad), bad


SGD = OptimizerKind(lambda groups, cfg: torch.optim.SGD(groups, lr=cfg.lr), moments=(), mup="sgd")


@pytest.mark.parametrize(
    ("left_out", "part"),
    [
        (None, None),
        (everywhere, "embedding"),
        (lambda n: n == "embedding.weight", "embedding"),
        (lambda n: "head" in n, "logits"),
    ],
)
def test_sgd(left_out, part, monkeypatch):
    monkeypatch.setitem(optimizers.OPTIMIZERS, "sgd", SGD)
    if left_out is not None:
        monkeypatch.setattr(mup, "rate_factor", without(left_out)(mup.rate_factor))
    cfg = config().model_copy(update={"optimizer": OptimizerConfig(type="sgd")})
    found = check(cfg, lr=1.0)
    bad = [row.part for row in found.rows if not row.good]
    assert bad == [] if part is None else any(name.endswith(part) for name in bad), bad


def test_slopes():
    assert fitted_slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert fitted_slope([1, 2], [1, math.nan]) == math.inf


def test_a_diverged_model_fails():
    assert not check(config(), lr=1e30, steps=2).good


def test_says_what_it_found(monkeypatch):
    monkeypatch.setattr(mup, "output_factor", lambda cfg: 1.0)
    found = check(config())
    assert verdict(found).startswith("FAILED at widths 32, 64, 128: logits (after initialisation) goes as width^")
    told = values(found)
    assert json.loads(json.dumps(told))["good"] is False
    assert len(told["rows"][0]["values"]["standard"]) == 3
    assert page(found).count("<svg") >= 4


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mup")
    with StoreWriter(str(folder / "data"), np.uint16) as writer:
        writer.add_document(np.random.default_rng(0).integers(0, 64, 2000))
        writer.finish()
    (folder / "run.yml").write_text(
        f"""
        version: 1
        data: {{train_paths: ["{folder}/data"], seq_length: 8}}
        model: {{num_layers: 1, hidden_size: 32, vocab_size: 64, mup: true, mup_base_hidden_size: 16}}
        training: {{steps: 2, batch_size: 2}}
        evaluation: {{interval: null, at_end: false}}
        """
    )
    return folder


def test_the_command(written, capsys):
    run = ["mup", "check", str(written / "run.yml"), "--widths", "32,64", "--seeds", "1"]
    assert main([*run, "--output", str(written / "page.html")]) == 0
    assert "passed at widths 32, 64" in capsys.readouterr().out
    assert "<svg" in (written / "page.html").read_text()
    assert main([*run, "--json", "--tolerance", "1e-9"]) == 4
    assert json.loads(capsys.readouterr().out)["good"] is False
    for words in (["--widths", "32"], ["--widths", "a,b"], ["--seeds", "0"], ["--steps", "0"]):
        assert main([*run, *words]) == 2


def test_a_sweep_goes_on_where_it_was(written, tmp_path, capsys):
    results, config = tmp_path / "results.jsonl", load([str(written / "run.yml")], [])
    said: list[str] = []
    first = sweep(config, results, 2, say=said.append)
    lines = results.read_text()
    assert len(lines.splitlines()) == 2 and all(line["width"] == 16 for line in first)
    results.write_text(lines + '{"width": 16, "lo')  # killed while it wrote
    more = sweep(config, results, 3)
    assert results.read_text().startswith(lines) and len(results.read_text().splitlines()) == 3
    assert {json.dumps(line) for line in first} <= {json.dumps(line) for line in more}
    assert [line["loss"] for line in more] == sorted(line["loss"] for line in more)
    command = ["mup", "sweep", str(written / "run.yml"), "--results", str(results), "--grid", "--runs", "9"]
    assert main([*command, "--try", "lr=0.001,0.01", "--json"]) == 0
    assert [line["lr"] for line in json.loads(capsys.readouterr().out)["trials"]] in ([0.001, 0.01], [0.01, 0.001])
    assert main([*command, "--try", "lr=fast"]) == 2 and main([*command, "--try", "width=3"]) == 2
    with pytest.raises(UserError, match=r"model\.mup is false"):
        sweep(load([str(written / "run.yml")], ["model.mup=false", "model.mup_base_hidden_size=null"]), results, 1)


def test_draws_depend_on_their_number_alone():
    space = {"lr": (1.0, 2.0, 3.0), "mup_init_scale": (1.0, 2.0)}
    assert list(trials(space, 9, 0, False))[:4] == list(trials(space, 4, 0, False))
    assert list(trials(space, 9, 0, False)) != list(trials(space, 9, 1, False))
    assert len({json.dumps(t) for t in trials(space, 99, 0, True)}) == 6


def test_base_shapes_there_and_back(written):
    text = base_shapes_text(load([str(written / "run.yml")], []).model)
    assert "sequential.0.word_embeddings.weight: [null, 16]\n" in text
    assert "sequential.2.attention.query_key_value.weight: [48, 16]\n" in text
    (written / "shapes.0").write_text(text)
    (written / "neox.yml").write_text(
        "{num_layers: 1, hidden_size: 64, num_attention_heads: 4, seq_length: 8, max_position_embeddings: 8, "
        "train_micro_batch_size_per_gpu: 2, train_iters: 2, use_mup: true, mup_attn_temp: 3, mup_output_temp: 2, "
        f"base_shapes_file: {written}/shapes, optimizer: {{type: Adam, params: {{lr: 0.001}}}}}}"
    )
    model = load([str(written / "neox.yml")], []).model
    assert (model.mup_base_hidden_size, model.mup_base_intermediate_size, model.mup_output_temp) == (16, 64, 2)
    assert mup.attention_scale(model) == pytest.approx(1 / (16 * 3))  # 1 / d, as GPT-NeoX divides, and the temperature
