"""Ours -> GPT-NeoX -> ours and GPT-NeoX -> GPT-NeoX: bit-equal at every degree and layout, every tensor minded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from castalia.checkpoint import save_checkpoint
from castalia.cli import main
from castalia.config import Config, ModelConfig
from castalia.convert import load_gptneox_checkpoint, load_pt
from castalia.convert.gptneox import merged, open_gptneox
from castalia.convert.gptneox_settings import model_of, read_settings
from castalia.errors import UserError
from castalia.model.transformer import build_model
from castalia.tools.export_gptneox import export_gptneox

RUNS = Path(__file__).parents[1] / "fixtures" / "gptneox_runs"

LLAMA = {
    "norm": "rmsnorm",
    "residual": "sequential",
    "activation": "swiglu",
    "attention_bias": False,
    "mlp_bias": False,
    "num_kv_heads": 4,
    "intermediate_size": 24,
}
FORMS: dict[str, dict[str, Any]] = {
    "parallel": {},
    "sequential": {"residual": "sequential", "tie_embeddings": True, "rotary_fraction": 1.0},
    "llama": LLAMA,
    "alibi": {"position": "alibi", "norm": "scalenorm"},
    "rpe": {"position": "rpe", "rpe_num_buckets": 6},
    "learned": {"position": "learned", "tie_norms": True},
    "sinusoidal": {"position": "sinusoidal", "activation": "gelu_tanh"},
}
EVERY = [
    (tensor, layout, pipeline)
    for tensor in (1, 2, 4)
    for layout, pipeline in (("main", 0), ("main", 1), ("v2.0", 0), ("v2.0", 2), ("v1.0", 1))
]
SOME = [(1, "v2.0", 0), (2, "main", 0), (4, "main", 3), (4, "v1.0", 1)]


def config_of(**changes: Any) -> Config:
    fields: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 8,
        "vocab_size": 32,
        "max_position_embeddings": 24,
        "rotary_fraction": 1.0,
        "residual": "parallel",
    }
    return Config(name="tiny", model=ModelConfig(**(fields | changes)), data={"seq_length": 24})


def checkpoint(folder: Path, config: Config) -> tuple[Path, dict[str, Tensor]]:
    weights = {n: torch.randn_like(t) for n, t in build_model(config.model, 1).state_dict().items()}
    state = {"step": 7, "config": config.model_dump(mode="json")}
    tensors = {f"model.{n}": t for n, t in weights.items()}
    tensors["optimizer.embedding.weight.exp_avg"] = torch.ones(2, 2)
    return save_checkpoint(folder, 7, tensors, state), weights


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[n], t) for n, t in expected.items())


@pytest.mark.parametrize("form", FORMS)
def test_there_and_back(tmp_path: Path, form: str) -> None:
    config = config_of(**FORMS[form])
    path, weights = checkpoint(tmp_path / "ours", config)
    for tensor, layout, pipeline in EVERY if form == "parallel" else SOME:
        out = tmp_path / f"{layout}-{pipeline}-{tensor}"
        if layout != "main" and form == "llama":
            with pytest.raises(UserError, match=rf"GPT-NeoX {layout} has it as .* alone: write --layout main"):
                export_gptneox(path, out, tensor=tensor, pipeline=pipeline, layout=layout)
            continue
        folder = export_gptneox(path, out, tensor=tensor, pipeline=pipeline, layout=layout)
        assert (out / "latest").read_text() == "global_step7" == folder.name
        names = {f.name for f in folder.iterdir() if f.is_file()}
        assert {n for n in names if n.startswith("mp")} == {
            f"mp_rank_{i:02d}_model_states.pt" for i in range(tensor * max(1, pipeline))
        }
        layers = {0, 2, 3, 5} | (set() if config.model.tie_embeddings else {6})
        expected = {f"layer_{i:02d}-model_{r:02d}-model_states.pt" for i in layers for r in range(tensor)}
        assert {n for n in names if n.startswith("layer")} == (expected if pipeline else set())
        state = load_gptneox_checkpoint(out, config.model)
        assert same(state.weights, weights) and state.iteration == 7
        assert state.args["model_parallel_size"] == tensor and state.args["padded_vocab_size"] == 32
        given = read_settings(list((folder / "configs").iterdir()), layout != "main")
        assert given["make_vocab_size_divisible_by"] * tensor == 32
        assert given.values["pipe_parallel_size"] == pipeline and given.values["model_parallel_size"] == tensor
        assert model_of(given, "x").mlp_size == config.model.mlp_size


def test_each_tensor_is_minded(tmp_path: Path) -> None:
    """A change of one tensor of ours changes its own there, and comes back as that one alone."""
    for form in ("parallel", "llama"):
        config = config_of(**FORMS[form])
        _, weights = checkpoint(tmp_path / f"{form}-plain", config)
        from castalia.convert import to_gptneox

        plain = to_gptneox(weights, config.model, 2)
        touched: set[str] = set()
        for name in weights:
            changed = dict(weights) | {name: weights[name] + 1}
            there = to_gptneox(changed, config.model, 2)
            differs = {
                n for n in plain[0] if not all(torch.equal(a[n], b[n]) for a, b in zip(plain, there, strict=True))
            }
            assert len(differs) == 1, name
            touched |= differs
            for rank, module in enumerate(there):
                torch.save({"module": module, "iteration": 1}, tmp_path / f"mp_rank_{rank:02d}_model_states.pt")
            back = load_gptneox_checkpoint(tmp_path, config.model).weights
            assert [n for n, t in weights.items() if not torch.equal(back[n], t)] == [name]
            assert same(back, changed)
        assert touched == plain[0].keys()


@pytest.mark.parametrize("run", ["seq_gptj", "pp1_gptj", "tp2_std"])
def test_one_degree_and_layout_of_theirs_to_another(tmp_path: Path, run: str) -> None:
    config = tmp_path / "their.yml"
    config.write_text(json.dumps(json.loads((RUNS / f"{run}.json").read_text())["config"]))
    source = RUNS / f"ckpt_{run}"
    with pytest.raises(UserError, match="has no folder configs, so its model is not known"):
        export_gptneox(source, tmp_path / "no")
    model = model_of(read_settings([config], False), "x")
    expected = load_gptneox_checkpoint(source, model).weights
    first = export_gptneox(source, tmp_path / "a", tensor=4, pipeline=2, configs=[config]).parent
    second = export_gptneox(first, tmp_path / "b", tensor=2, layout="v2.0").parent
    last = export_gptneox(second, tmp_path / "c", layout="main").parent
    assert same(load_gptneox_checkpoint(last, model).weights, expected)
    assert (
        "mlp.dense_h_to_4h.weight" in open_gptneox(second).ranks[0].popitem()[0]
        or open_gptneox(second).naming == "v2.0"
    )
    if run == "seq_gptj":
        theirs = load_pt(source / "global_step30" / "mp_rank_00_model_states.pt")["module"]
        ours = load_pt(last / "global_step30" / "mp_rank_00_model_states.pt")["module"]
        assert list(ours) == list(theirs) and same(ours, theirs)
    assert "train_iters" in next((last / "global_step30" / "configs").iterdir()).read_text()


def test_half_precision_stays_and_norms_that_drifted_are_averaged(tmp_path: Path) -> None:
    config = config_of()
    path, _ = checkpoint(tmp_path / "ours", config)
    folder = export_gptneox(path, tmp_path / "a", tensor=2, layout="v2.0")
    for rank, file in enumerate(sorted(folder.glob("mp_rank*"))):
        content = load_pt(file)
        content["module"] = {n: t.half() for n, t in content["module"].items()}
        content["module"]["sequential.2.input_layernorm.weight"] = torch.full((16,), 1.0 + rank).half()
        torch.save(content, tmp_path / "fresh")
        (tmp_path / "fresh").replace(file)
    out = export_gptneox(folder, tmp_path / "b", tensor=1, layout="v2.0")
    (rank0,) = open_gptneox(out).ranks
    assert {t.dtype for t in rank0.values()} == {torch.float16}
    assert torch.equal(rank0["2.input_layernorm.weight"], torch.full((16,), 1.5).half())


def test_buffers_that_v2_wants_and_files_that_hold_their_own_numbers_alone(tmp_path: Path) -> None:
    path, _ = checkpoint(tmp_path / "ours", config_of(vocab_size=256, num_layers=1))
    folder = export_gptneox(path, tmp_path / "a", tensor=4, layout="v2.0", pipeline=2)
    layer = load_pt(folder / "layer_02-model_01-model_states.pt")
    assert torch.equal(layer["attention.rotary_emb.inv_freq"], torch.ones(1))  # heads of two: one frequency
    file = folder / "layer_00-model_00-model_states.pt"
    assert file.stat().st_size < 256 * 16 * 4 // 2  # a quarter of the embedding, and not the whole of it behind a view
    assert set(torch.load(file, weights_only=True)) == {"word_embeddings.weight"}
    alibi, _ = checkpoint(tmp_path / "alibi", config_of(position="alibi", num_layers=1))
    folder = export_gptneox(alibi, tmp_path / "b", tensor=2)
    slopes = [load_pt(f)["module"]["sequential.2.attention.alibi_embed.slopes"] for f in sorted(folder.glob("mp*"))]
    assert torch.allclose(torch.cat(slopes), torch.tensor([2.0**-k for k in range(1, 9)]))


def test_what_cannot_go_there_is_refused(tmp_path: Path) -> None:
    path, _ = checkpoint(tmp_path / "ours", config_of())
    out = tmp_path / "out"
    for arguments, message in (
        ({"tensor": 3}, "--tensor 3: does not divide model.num_attention_heads, which is 8"),
        ({"tensor": 0}, "at least 1"),
        ({"layout": "v2.0", "pipeline": 1}, "v2.0 reads one file per rank"),
        ({"step": 3}, "leave --step out"),
        ({"configs": [tmp_path / "x.yml"]}, "knows its configuration"),
    ):
        with pytest.raises(UserError, match=message):
            export_gptneox(path, out, **arguments)  # type: ignore[arg-type]
    for number, (changes, message) in enumerate(
        (
            ({"norm_placement": "post", "residual": "sequential"}, "model.norm_placement: is post"),
            ({"head_dim": 4}, "model.head_dim: is 4, which GPT-NeoX main has no key for"),
            ({"mup": True, "mup_base_hidden_size": 8}, "model.mup"),
        )
    ):
        odd, _ = checkpoint(tmp_path / f"odd-{number}", config_of(**changes))
        with pytest.raises(UserError, match=message):
            export_gptneox(odd, out)
    assert not out.exists() and not list(tmp_path.glob(".writing*"))
    out.mkdir()
    with pytest.raises(UserError, match="exists already"):
        export_gptneox(path, out)


def test_nothing_is_left_of_an_export_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = checkpoint(tmp_path / "ours", config_of())
    real = torch.save

    def wrong(content: Any, file: Any) -> None:
        if content.get("module"):
            content["module"]["sequential.2.attention.dense.weight"] += 1
        real(content, file)

    monkeypatch.setattr(torch, "save", wrong)
    with pytest.raises(UserError, match=r"layers\.0\.attention\.out\.weight: is not what it was made from"):
        export_gptneox(path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = checkpoint(tmp_path / "ours", config_of())
    out = tmp_path / "out"
    assert main(["export", str(path), str(out), "--format", "gptneox", "--tensor", "2", "--layout", "v2.0"]) == 0
    assert "global_step7" in capsys.readouterr().out and len(list((out / "global_step7").glob("mp_rank*"))) == 2
    assert main(["export", str(path), str(tmp_path / "x"), "--tensor", "2"]) == 2
    assert "--format gptneox" in capsys.readouterr().err
    one = next(merged(open_gptneox(out), config_of().model))
    assert one[0].ours == ("embedding.weight",)
