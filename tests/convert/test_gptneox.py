"""GPT-NeoX checkpoints: every tensor is mapped once, logits come out the same, both directions agree."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from castalia.config import ModelConfig, ScheduleConfig
from castalia.convert import load_gptneox_checkpoint, to_gptneox
from castalia.convert.gptneox_table import Naming, table
from castalia.convert.safe_pickle import load_pt
from castalia.data.order import split_documents
from castalia.data.sample import PackedDataset
from castalia.data.store import TokenStore
from castalia.errors import UserError
from castalia.model.transformer import build_model
from castalia.optim.schedule import learning_rate

RUNS = Path(__file__).parents[1] / "fixtures" / "gptneox_runs"


def model_config(**changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "num_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "vocab_size": 512,
        "max_position_embeddings": 64,
        "rotary_fraction": 0.25,
        "residual": "parallel",
    }
    return ModelConfig(**(fields | changes))


CONFIGS = {
    "seq_gptj": model_config(),
    "pp1_gptj": model_config(),
    "tp2_std": model_config(residual="sequential"),
}


def random_weights(model: ModelConfig) -> dict[str, Tensor]:
    weights = build_model(model, 1).state_dict()
    return {name: torch.randn_like(tensor) for name, tensor in weights.items()}


@pytest.mark.parametrize("step", [0, 30])
@pytest.mark.parametrize("run", CONFIGS)
def test_weights_and_moments(run: str, step: int) -> None:
    model = CONFIGS[run]
    state = load_gptneox_checkpoint(RUNS / f"ckpt_{run}", model, step=step)
    expected = {name: tensor.shape for name, tensor in build_model(model, 1).state_dict().items()}
    assert {name: tensor.shape for name, tensor in state.weights.items()} == expected
    assert all(tensor.dtype == torch.float32 for tensor in state.weights.values())
    assert state.iteration == step and state.args["padded_vocab_size"] == 512
    if step == 0:
        assert state.optimizer is None
        return
    assert state.optimizer is not None and state.optimizer.keys() == expected.keys()
    for name, shape in expected.items():
        moments = state.optimizer[name]
        assert moments["exp_avg"].shape == moments["exp_avg_sq"].shape == shape and moments["step"] == 30
        assert (moments["exp_avg_sq"] >= 0).all()


@pytest.mark.parametrize("run", CONFIGS)
def test_moments_are_those_of_their_parameters(run: str) -> None:
    """Parameters of equal shape could be mistaken for each other: training again tells them apart."""
    cfg = CONFIGS[run]
    facts = json.loads((RUNS / f"{run}.json").read_text())
    model = build_model(cfg, 1)
    model.load_state_dict(load_gptneox_checkpoint(RUNS / f"ckpt_{run}", cfg, step=0).weights)
    batch = facts["config"]["train_micro_batch_size_per_gpu"] * facts["config"]["gradient_accumulation_steps"]
    settings = facts["config"]["optimizer"]["params"]
    schedule = ScheduleConfig(warmup=0.1, min_lr=facts["config"]["min_lr"], arithmetic="gptneox_main")
    store = TokenStore(RUNS / "ds")
    documents = split_documents(len(store), facts["config"]["split"])[0]
    samples = PackedDataset(store, documents, 30 * batch, 64, 1234)
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in parameters.items() if (p.ndim > 1) is decay], "weight_decay": 0.1 * decay}
        for decay in (True, False)
    ]
    adam = torch.optim.AdamW(groups, betas=tuple(settings["betas"]), eps=settings["eps"])
    for step, expected in enumerate(facts["train_loss_per_iteration"]):
        ids = torch.from_numpy(np.stack([samples[step * batch + i] for i in range(batch)]))
        logits = model.logits(model(ids[:, :-1])).reshape(-1, 512)
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].reshape(-1))
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in adam.param_groups:
            group["lr"] = learning_rate(step, settings["lr"], schedule, 30)
        adam.step()
        assert abs(loss.item() - expected) < 1e-5, step
    end = load_gptneox_checkpoint(RUNS / f"ckpt_{run}", cfg, step=30)
    assert end.optimizer is not None
    for name, parameter in parameters.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            ours, theirs = adam.state[parameter][moment], end.optimizer[name][moment]
            assert (ours - theirs).norm() < 1e-3 * theirs.norm(), (name, moment)


def test_the_latest_is_taken_and_a_file_will_do() -> None:
    by_latest = load_gptneox_checkpoint(RUNS / "ckpt_seq_gptj", CONFIGS["seq_gptj"])
    assert by_latest.iteration == 30
    file = RUNS / "ckpt_seq_gptj" / "global_step30" / "mp_rank_00_model_states.pt"
    for path in (file, file.parent):
        state = load_gptneox_checkpoint(path, CONFIGS["seq_gptj"])
        assert all(torch.equal(state.weights[n], t) for n, t in by_latest.weights.items())


@pytest.mark.parametrize("run", ["seq_gptj", "tp2_std"])
def test_logits(run: str) -> None:
    state = load_gptneox_checkpoint(RUNS / f"ckpt_{run}", CONFIGS[run])
    model = build_model(CONFIGS[run], 1)
    model.load_state_dict(state.weights)
    tokens = torch.from_numpy(np.random.RandomState(5).randint(0, 500, (2, 64)))
    with torch.no_grad():
        logits = model.logits(model(tokens))
    theirs = np.concatenate([np.load(f) for f in sorted(RUNS.glob(f"logits_{run}_r*.npy"))], axis=-1)
    torch.testing.assert_close(logits, torch.from_numpy(theirs).view_as(logits), atol=5e-6, rtol=0)


def test_every_tensor_of_theirs_is_used_once() -> None:
    content = load_pt(RUNS / "ckpt_seq_gptj" / "global_step30" / "mp_rank_00_model_states.pt")
    names = [f"sequential.{name}" for row in table(CONFIGS["seq_gptj"]) for name in row.theirs]
    assert sorted(names) == sorted(content["module"])
    ours = [name for row in table(CONFIGS["seq_gptj"]) for name in row.ours]
    assert len(set(ours)) == len(ours)


@pytest.mark.parametrize("run", ["seq_gptj", "tp2_std"])
def test_their_own_files_come_out_again(run: str) -> None:
    files = sorted((RUNS / f"ckpt_{run}" / "global_step30").glob("*.pt"))
    state = load_gptneox_checkpoint(RUNS / f"ckpt_{run}", CONFIGS[run])
    for file, written in zip(files, to_gptneox(state.weights, CONFIGS[run], ranks=len(files)), strict=True):
        module = load_pt(file)["module"]
        assert written.keys() == module.keys()
        assert all(torch.equal(written[name], tensor) for name, tensor in module.items())


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("naming", ["main", "v2.0", "w123"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"residual": "sequential", "tie_embeddings": True},
        {"activation": "swiglu", "norm": "rmsnorm", "attention_bias": False, "mlp_bias": False},
        {"activation": "geglu", "num_kv_heads": 2, "intermediate_size": 96},
    ],
)
def test_both_directions(tmp_path: Path, changes: dict[str, Any], naming: Naming, ranks: int) -> None:
    model = model_config(**changes)
    weights = random_weights(model)
    if naming == "w123" and not model.gated:
        with pytest.raises(UserError, match="not gated"):
            to_gptneox(weights, model, ranks, naming)
        return
    for rank, module in enumerate(to_gptneox(weights, model, ranks, naming)):
        content = {"module": module, "iteration": 7, "optimizer": None}
        torch.save(content, tmp_path / f"mp_rank_{rank:02d}_model_states.pt")
    state = load_gptneox_checkpoint(tmp_path, model)
    assert state.weights.keys() == weights.keys() and state.iteration == 7
    assert all(torch.equal(state.weights[name], tensor) for name, tensor in weights.items())


def test_grouped_queries_lie_one_after_the_other_in_each_rank() -> None:
    """GPT-NeoX: [all queries | keys | values] of a rank; ours: per key/value head its queries, key, value."""
    model = model_config(num_kv_heads=2)
    weights = random_weights(model)
    marks = torch.arange(8.0).repeat_interleave(8)  # ours: q0 q1 k0 v0 q2 q3 k1 v1, eight rows each
    weights["layers.0.attention.qkv.bias"] = marks
    name = "sequential.2.attention.query_key_value.bias"
    assert to_gptneox(weights, model)[0][name][::8].tolist() == [0, 1, 4, 5, 2, 6, 3, 7]
    assert [r[name][::8].tolist() for r in to_gptneox(weights, model, 2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_biases_after_the_reduction() -> None:
    """Under a parallel residual each rank adds its bias before the sum; else all hold the one added after."""
    name = "sequential.2.mlp.linear2.bias"
    for residual, share in (("parallel", 0.5), ("sequential", 1.0)):
        model = model_config(residual=residual)
        weights = random_weights(model)
        for rank in to_gptneox(weights, model, 2):
            assert torch.equal(rank[name], weights["layers.0.mlp.down.bias"] * share)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = RUNS / "ckpt_seq_gptj"
    for changes, message in (
        ({"num_layers": 2}, "num_layers 3, but model.num_layers is 2"),
        ({"tie_embeddings": True}, r"no place for: 7\.final_linear\.weight"),
        ({"attention_bias": False}, r"no place for: 2\.attention\.dense\.bias.* and 3 more"),
        ({"norm": "rmsnorm"}, r"does not hold 2\.input_layernorm\.scale"),
        ({"norm": "other"}, "GPT-NeoX has no 'other'"),
    ):
        with pytest.raises(UserError, match=message):
            load_gptneox_checkpoint(folder, model_config(**changes))
    with pytest.raises(UserError, match=r"no global_step5: .*\(global_step0, global_step30\)"):
        load_gptneox_checkpoint(folder, CONFIGS["seq_gptj"], step=5)
    with pytest.raises(UserError, match="no such file or folder"):
        load_gptneox_checkpoint(tmp_path / "nowhere", CONFIGS["seq_gptj"])
    with pytest.raises(UserError, match="holds no mp_rank"):
        load_gptneox_checkpoint(tmp_path, CONFIGS["seq_gptj"])
    shutil.copy(RUNS / "ckpt_pp1_gptj/global_step0/layer_02-model_00-model_states.pt", tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt"):
        load_gptneox_checkpoint(tmp_path / "x.pt", CONFIGS["seq_gptj"])


def test_the_readme_says_what_is_there() -> None:
    text = (RUNS / "README.md").read_text()
    for run in CONFIGS:
        assert re.search(rf"\b{run}\b", text) and len(json.loads((RUNS / f"{run}.json").read_text())) > 3
