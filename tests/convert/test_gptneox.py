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
from castalia.convert.torch_file import load_pt
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


NORMS = ("layernorm", "rmsnorm", "rmsnorm_eps_outside", "scalenorm", "non_parametric_layernorm")
FORMS: dict[str, dict[str, Any]] = {
    "sequential": {"residual": "sequential"},
    "parallel": {},
    "tied norms": {"tie_norms": True},
    "query-key norm": {"qk_norm": True},
    "both": {"qk_norm": True, "tie_norms": True, "tie_embeddings": True},
}
KINDS: dict[str, dict[str, Any]] = {
    **{f"{norm} {form}": {"norm": norm} | changes for norm in NORMS for form, changes in FORMS.items()},
    **{
        position: {"position": position, "rpe_num_buckets": 6}
        for position in ("rotary", "learned", "sinusoidal", "rpe", "alibi", "none")
    },
    "rpe and all": {"position": "rpe", "norm": "rmsnorm", "activation": "glu"} | FORMS["both"],
}


def write_checkpoint(folder: Path, modules: list[dict[str, Tensor]], optimizers: list[Any] | None = None) -> None:
    folder.mkdir(exist_ok=True)
    for rank, module in enumerate(modules):
        content = {"module": module, "iteration": 7, "optimizer": optimizers[rank] if optimizers else None}
        torch.save(content, folder / f"mp_rank_{rank:02d}_model_states.pt")


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())
def test_every_kind_comes_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = model_config(**changes)
    weights = random_weights(model)
    by_rank = model.qk_norm and model.norm in ("layernorm", "non_parametric_layernorm")
    for ranks in (1,) if by_rank else (1, 2, 4):
        for naming in ("main", "v2.0"):
            modules = to_gptneox(weights, model, ranks, naming)
            for module in modules:  # as their files have them
                module["sequential.0.position_embeddings.inv_freq"] = torch.ones(16)
                module["sequential.2.attention.rotary_emb.inv_freq"] = torch.ones(1)
                module["sequential.2.attention.alibi_embed.slopes"] = torch.ones(4 // ranks)
            folder = tmp_path / f"{naming}-{ranks}"
            write_checkpoint(folder, modules)
            back = load_gptneox_checkpoint(folder, model).weights
            assert back.keys() == weights.keys()
            assert all(torch.equal(back[name], tensor) for name, tensor in weights.items()), (ranks, naming)


def test_names_and_shapes_are_theirs() -> None:
    """From the description of their format, not from the table; per rank of two."""
    layer = {
        "attention.query_key_value.weight": [48, 32],
        "attention.dense.weight": [32, 16],
        "mlp.linear1.weight": [64, 32],
        "mlp.linear2.weight": [32, 64],
    }
    plain = {"num_layers": 1, "attention_bias": False, "mlp_bias": False, "tie_embeddings": True, "qk_norm": True}
    rms = {
        "input_layernorm.scale": [32],
        "post_attention_layernorm.scale": [32],
        "attention.qk_layernorm.scale": [2, 8],
    }
    one = {"input_layernorm.g": [1], "post_attention_layernorm.g": [1], "attention.qk_layernorm.g": [1]}
    word = {"0.word_embeddings.weight": [256, 32]}
    for changes, expected_layer, others in (
        (
            {"norm": "rmsnorm", "position": "rpe", "rpe_num_buckets": 6, "tie_norms": True},
            layer | rms | {"attention.rpe.weight": [6, 2]},
            word | {"4.norm.scale": [32]},
        ),
        (
            {"norm": "scalenorm", "position": "learned"},
            layer | one,
            word | {"0.position_embeddings.weight": [64, 32], "4.norm.g": [1]},
        ),
        ({"norm": "non_parametric_layernorm", "position": "alibi", "qk_norm": False}, layer, word),
    ):
        model = model_config(**(plain | changes))
        expected = {f"2.{name}": shape for name, shape in expected_layer.items()} | others
        for module in to_gptneox(random_weights(model), model, 2):
            assert {n.removeprefix("sequential."): list(t.shape) for n, t in module.items()} == expected


def test_each_head_keeps_its_gain_and_its_column() -> None:
    model = model_config(norm="rmsnorm", qk_norm=True, position="rpe", rpe_num_buckets=6)
    weights = random_weights(model)
    weights["layers.1.attention.qk_norm.weight"] = torch.arange(32.0)
    weights["relative_bias.weight"] = torch.arange(24.0).view(6, 4)
    first, second = to_gptneox(weights, model, 2)
    gains = "sequential.3.attention.qk_layernorm.scale"
    assert [first[gains][1, 0], second[gains][0, 3]] == [8, 19]  # head 1, dimension 0; head 2, dimension 3
    for layer in (2, 3, 4):
        name = f"sequential.{layer}.attention.rpe.weight"
        assert first[name][1].tolist() == [4, 5] and second[name][1].tolist() == [6, 7]


def test_a_second_norm_that_is_not_used_is_written_and_not_read(tmp_path: Path) -> None:
    model = model_config(tie_norms=True)
    weights = random_weights(model)
    (module,) = to_gptneox(weights, model)
    name = "sequential.3.post_attention_layernorm"
    assert torch.equal(module[f"{name}.weight"], torch.ones(32)) and torch.equal(
        module[f"{name}.bias"], torch.zeros(32)
    )
    module[f"{name}.weight"].fill_(5.0)
    del module[f"{name}.bias"]
    write_checkpoint(tmp_path, [module])
    back = load_gptneox_checkpoint(tmp_path, model).weights
    assert all(torch.equal(back[n], tensor) for n, tensor in weights.items()) and back.keys() == weights.keys()


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "scalenorm"])
def test_moments_where_parameters_are_shared_or_not_used(tmp_path: Path, norm: str) -> None:
    """Their optimizer numbers a shared table once, and has no state of a norm that never had a gradient."""
    model = model_config(norm=norm, position="rpe", tie_norms=True, attention_bias=False, mlp_bias=False)
    weights = random_weights(model)
    modules, optimizers = [], []
    for unordered in to_gptneox(weights, model, 2):
        module = dict(sorted(unordered.items(), key=lambda item: int(item[0].split(".")[1])))
        names = [n for n in module if "attention.rpe" not in n or n.startswith("sequential.2.")]
        vectors = [n for n in names if "norm" in n]
        order = [n for n in names if n not in vectors] + vectors
        matrices = len(order) - len(vectors)
        groups = [{"params": list(range(matrices))}, {"params": list(range(matrices, len(order)))}]
        moments = {
            number: {"exp_avg": 2 * module[n], "exp_avg_sq": module[n] ** 2, "step": 7}
            for number, n in enumerate(order)
            if "post_attention_layernorm" not in n
        }
        modules.append(module)
        optimizers.append({"state": moments, "param_groups": groups})
    write_checkpoint(tmp_path, modules, optimizers)
    optimizer = load_gptneox_checkpoint(tmp_path, model).optimizer
    assert optimizer is not None and optimizer.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(optimizer[name]["exp_avg"], 2 * tensor) and optimizer[name]["step"] == 7
        assert torch.equal(optimizer[name]["exp_avg_sq"], tensor**2)


def test_models_that_theirs_cannot_be_are_refused(tmp_path: Path) -> None:
    for changes, message in (
        ({"num_unique_layers": 1}, "model.num_unique_layers: is 1, but GPT-NeoX gives every layer"),
        ({"soft_prompt_tokens": 3}, "model.soft_prompt_tokens: is 3, but"),
        ({"norm": "other"}, "one of layernorm, rmsnorm, rmsnorm_eps_outside, scalenorm, non_parametric_layernorm"),
    ):
        model = model_config(**changes)
        with pytest.raises(UserError, match=message):
            to_gptneox({}, model)
        with pytest.raises(UserError, match=message):
            load_gptneox_checkpoint(RUNS / "ckpt_seq_gptj", model)
    whole = model_config(num_unique_layers=3)  # as many as there are: nothing is shared
    assert load_gptneox_checkpoint(RUNS / "ckpt_seq_gptj", whole).iteration == 30
    # Their layer norm of queries and keys is over the heads of a rank.
    model = model_config(qk_norm=True)
    with pytest.raises(UserError, match="with 2 ranks is another model"):
        to_gptneox(random_weights(model), model, 2)
    (module,) = to_gptneox(random_weights(model), model)
    write_checkpoint(tmp_path / "norm", [module, module])
    with pytest.raises(UserError, match="with 2 ranks is another model"):
        load_gptneox_checkpoint(tmp_path / "norm", model)
    # Each of their pipeline stages trains a table of its own.
    model = model_config(position="rpe")
    (module,) = to_gptneox(random_weights(model), model)
    module["sequential.4.attention.rpe.weight"] = module["sequential.4.attention.rpe.weight"] + 1
    write_checkpoint(tmp_path / "rpe", [module])
    with pytest.raises(UserError, match=r"4\.attention\.rpe\.weight: differs from 2\.attention\.rpe\.weight"):
        load_gptneox_checkpoint(tmp_path / "rpe", model)


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
