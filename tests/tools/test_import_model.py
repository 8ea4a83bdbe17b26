"""Other people's weights become a run with the same logits, whatever files they are in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from castalia.checkpoint import save_checkpoint
from castalia.cli import main
from castalia.config import ModelConfig
from castalia.config.load import check_values
from castalia.config.render import to_yaml
from castalia.convert.huggingface_files import open_folder, read_header
from castalia.convert.llama import LlamaFiles, llama_rows
from castalia.convert.table import to_theirs
from castalia.data.tokenizer import load_tokenizer
from castalia.errors import CheckFailed, UserError
from castalia.generate.load import load_run
from castalia.tools import families, import_model
from castalia.tools.export import export_run
from castalia.tools.export_tokenizer import tokenizer_json

pytest.importorskip("transformers", reason="imports are checked against transformers")


def write_run(folder: Path, fields: dict[str, Any]) -> Path:
    """A run of random weights, with bytes for tokens."""
    values = {"version": 1, "model": fields | {"vocab_size": 260}, "data": {"seq_length": 32}}
    config = check_values(values, "here")
    model = families.random_model(config.model)
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    state = {
        **{"version": 1, "step": 5, "updates": 5, "tokens": 5120, "config": config.model_dump(), "journal": []},
        **{"tokenizer": load_tokenizer("byte").identity(), "versions": {"castalia": "0", "torch": "0"}},
    }
    save_checkpoint(folder / "checkpoints", 5, {f"model.{n}": t for n, t in model.state_dict().items()}, state)
    return folder


def weights(run: Path) -> dict[str, Tensor]:
    return dict(load_run(run)[0].state_dict())


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_family_there_and_back_bit_equal(name, tmp_path) -> None:
    run = write_run(tmp_path / "run", families.FAMILIES[name])
    export_run(run, tmp_path / "theirs", check=False, shard_size=50_000)
    parity = import_model.import_model(tmp_path / "theirs", tmp_path / "back")
    assert parity["checked"] and parity["largest_relative_difference"] <= parity["tolerance"]
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "back"))


def test_old_files_without_a_prefix(tmp_path) -> None:
    """pytorch_model.bin of the bare model, as of GPT-2's first release, in fp16."""
    run = write_run(tmp_path / "run", families.FAMILIES["gpt-2"])
    export_run(run, tmp_path / "theirs", check=False, dtype="float16")
    tensors = {n.removeprefix("transformer."): t for n, t in open_folder(tmp_path / "theirs").items()}
    torch.save(tensors, tmp_path / "theirs" / "pytorch_model.bin")
    (tmp_path / "theirs" / "model.safetensors").unlink()
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "back")]) == 0
    for name, tensor in weights(tmp_path / "run").items():
        assert torch.equal(tensor.half().float(), weights(tmp_path / "back")[name])


def test_a_wrong_mapping_refuses(tmp_path, monkeypatch) -> None:
    run = write_run(tmp_path / "run", families.FAMILIES["gpt-neox"])
    export_run(run, tmp_path / "theirs", check=False)
    monkeypatch.setattr(
        import_model, "model_config_fields",
        lambda c, read=import_model.model_config_fields: read(c) | {"residual": "sequential"},
    )  # fmt: skip
    with pytest.raises(CheckFailed, match="transformers gives other logits .* nothing was imported"):
        import_model.import_model(tmp_path / "theirs", tmp_path / "back")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "theirs"]


LLAMA = families.FAMILIES["llama 3.1"] | {"vocab_size": 260, "tie_embeddings": False, "max_position_embeddings": 131072}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("release", ["llama 2", "llama 3.1"])
def test_original_llama(ranks, release, tmp_path) -> None:
    fields = LLAMA | {"rotary_original_length": 8192, "rotary_scaling_factor": 32.0}
    params = {
        **{"dim": 64, "n_layers": 3, "n_heads": 8, "n_kv_heads": 2, "vocab_size": 260, "norm_eps": 1e-6},
        **{"rope_theta": 500000.0, "use_scaled_rope": True},
    }
    if release == "llama 2":
        fields = families.FAMILIES["llama"] | {"vocab_size": 260, "num_kv_heads": 2, "norm_epsilon": 1e-5}
        params |= {"rope_theta": 10000.0, "use_scaled_rope": False, "norm_eps": 1e-5}
    cfg = ModelConfig(**fields)
    own = families.random_model(cfg).state_dict()
    theirs = to_theirs(llama_rows(cfg, {}), own, "here")
    source = tmp_path / "source"
    source.mkdir()
    (source / "params.json").write_text(json.dumps(params))
    (source / "tokenizer.json").write_bytes(tokenizer_json(load_tokenizer("byte")))
    for rank in range(ranks):
        torch.save(
            {name: shard(name, t, rank, ranks, release) for name, t in theirs.items()} | {"rope.freqs": torch.ones(4)},
            source / f"consolidated.{rank:02d}.pth",
        )
    parity = import_model.import_model(source, tmp_path / "run")
    assert parity["checked"] and parity["against"] == "the original formulas"
    assert equal(own, weights(tmp_path / "run"))
    assert any("positions" in remark for remark in parity["remarks"])
    if ranks == 2:
        (source / "consolidated.00.pth").unlink()
        with pytest.raises(UserError, match="numbered from 00"):
            LlamaFiles(source)


def shard(name: str, tensor: Tensor, rank: int, ranks: int, release: str) -> Tensor:
    part = name.split(".")[-2]
    if part in ("wq", "wk", "wv", "w1", "w3", "output") or (part == "tok_embeddings" and release == "llama 3.1"):
        return tensor.chunk(ranks)[rank].clone()
    if part in ("wo", "w2", "tok_embeddings"):
        return tensor.chunk(ranks, dim=1)[rank].clone()
    return tensor.clone()


def test_llama_without_the_permutation_is_refused(tmp_path, monkeypatch) -> None:
    cfg = ModelConfig(**families.FAMILIES["llama"] | {"vocab_size": 260})
    monkeypatch.setattr("castalia.convert.llama.halves", lambda model: (lambda x: x, lambda x: x))
    theirs = to_theirs(llama_rows(cfg, {}), families.random_model(cfg).state_dict(), "here")
    (tmp_path / "source").mkdir()
    params = {"dim": 64, "n_layers": 3, "n_heads": 8, "vocab_size": 260, "norm_eps": 1e-6}
    (tmp_path / "source" / "params.json").write_text(json.dumps(params))
    torch.save(theirs, tmp_path / "source" / "consolidated.00.pth")
    (tmp_path / "source" / "tokenizer.json").write_bytes(tokenizer_json(load_tokenizer("byte")))
    with pytest.raises(CheckFailed, match="the original formulas gives other logits"):
        import_model.import_model(tmp_path / "source", tmp_path / "run")


def changed_config(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_cannot_be_imported_is_refused_in_words(tmp_path, capfd) -> None:
    run = write_run(tmp_path / "run", families.FAMILIES["llama"])
    export_run(run, tmp_path / "theirs", check=False, shard_size=50_000)

    def refused(source: Path, *flags: str) -> str:
        assert main(["import", str(source), str(tmp_path / "out"), "--no-check", *flags]) == 2
        assert not (tmp_path / "out").exists()
        return capfd.readouterr().err

    assert "check the path" in refused(tmp_path)
    assert "--length is for original Llama" in refused(tmp_path / "theirs", "--length", "4")
    assert "--config is for GPT-NeoX" in refused(tmp_path / "theirs", "--config", "a.yml")
    (tmp_path / "theirs" / "tokenizer.json").rename(tmp_path / "kept.json")
    assert "--tokenizer" in refused(tmp_path / "theirs")
    (tmp_path / "kept.json").rename(tmp_path / "theirs" / "tokenizer.json")
    shutil.copytree(tmp_path / "theirs", tmp_path / "quantised")
    changed_config(tmp_path / "quantised", {"quantization_config": {"quant_method": "gptq"}})
    assert "quantised by gptq" in refused(tmp_path / "quantised")
    first = next(tmp_path.glob("theirs/model-00001*"))
    content = first.read_bytes()
    first.write_bytes(content[:-1])
    with pytest.raises(UserError, match="cut short"):
        read_header(first)
    first.unlink()
    assert f"names {first.name}, which is not beside it" in refused(tmp_path / "theirs")


def test_training_begins_from_an_import(tmp_path, capfd) -> None:
    """And what has no optimizer says so."""
    run = write_run(tmp_path / "run", families.FAMILIES["llama"])
    export_run(run, tmp_path / "theirs", check=False)
    import_model.import_model(tmp_path / "theirs", tmp_path / "back", check=False)
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("the cat sat on the mat and saw the rat. " * 60)
    tokens = str(tmp_path / "tokens")
    assert (
        main(["prepare", str(texts), "--tokenizer", str(tmp_path / "back" / "tokenizer.json"), "--output", tokens]) == 0
    )
    settings = [
        str(tmp_path / "back" / "config.yaml"), f"start.path={tmp_path / 'back'}", f"data.path={tokens}",
        "data.split=1,0,0", "training.steps=1", "training.batch_size=2", "training.micro_batch_size=2",
        f"output={tmp_path / 'tuned'}", "evaluation.interval=null",
    ]  # fmt: skip
    assert main(["train", *settings, "start.optimizer=false"]) == 0
    capfd.readouterr()
    assert main(["evaluate", str(tmp_path / "back"), "--data", tokens, "--max-tokens", "64"]) == 0
