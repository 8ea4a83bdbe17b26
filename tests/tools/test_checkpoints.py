"""A run's checkpoints are listed, verified and copied without what only training needs."""

import json

import pytest
import torch

from castalia.checkpoint import load_checkpoint, save_checkpoint, tensor_shapes
from castalia.cli import main
from castalia.config import Config
from castalia.data.tokenizer import load_tokenizer
from castalia.errors import UserError
from castalia.generate.load import load_run
from castalia.model.transformer import build_model
from castalia.tools.checkpoints import checkpoints_of, slim


@pytest.fixture
def run(tmp_path):
    """A run's folder with two checkpoints."""
    config = Config.model_validate(
        {"model": {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 384}}
    )
    model = build_model(config.model, 1, torch.device("cpu"))
    tensors = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
    tensors |= {f"optimizer.{n}.exp_avg": torch.ones_like(p) for n, p in model.named_parameters()}
    for step in (3, 12):
        state = {"version": 1, "step": step, "tokens": 100 * step, "config": config.model_dump()}
        save_checkpoint(
            tmp_path / "run" / "checkpoints", step, tensors, state | {"tokenizer": load_tokenizer("byte").identity()}
        )
    return tmp_path / "run"


def test_list(run, capsys):
    (run / "checkpoints" / "step-00000003" / "state.json").unlink()
    assert main(["checkpoint", "list", str(run), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["checkpoints"]
    assert first["step"] == 3 and "state.json: is missing" in first["problem"]
    assert second["step"] == 12 and second["problem"] is None and second["tokens"] == 1200 and second["bytes"] > 10_000
    assert main(["checkpoint", "list", str(run / "checkpoints" / "step-00000012")]) == 0
    assert "1,200 tokens" in capsys.readouterr().out
    assert main(["checkpoint", "list", str(run.parent)]) == 2
    assert "has no checkpoints" in capsys.readouterr().err


def test_verify(run, capsys):
    assert main(["verify", "checkpoint", str(run)]) == 0
    assert capsys.readouterr().out.count(": whole\n") == 2
    file = next((run / "checkpoints" / "step-00000012").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    assert main(["verify", "checkpoint", str(run)]) == 4
    said = capsys.readouterr()
    assert "step-00000012: DAMAGED" in said.out and f"{file}: its content is not what was written" in said.err
    assert main(["verify", "checkpoint", str(run), "--json"]) == 4
    problems = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [len(found) for found in problems.values()] == [0, 1]


def test_a_slim_copy_is_a_run_without_an_optimizer(run, tmp_path, capsys):
    assert main(["checkpoint", "slim", str(run), str(tmp_path / "slim"), "--step", "3"]) == 0
    (path,) = checkpoints_of(tmp_path / "slim")
    assert path.name == "step-00000003" and all(name.startswith("model.") for name in tensor_shapes(path))
    model, tokenizer = load_run(tmp_path / "slim")
    again = slim(path, tmp_path / "again")
    other, _ = load_run(again)  # one checkpoint alone is enough as well
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    whole = {f"model.{n}": torch.empty_like(p) for n, p in model.state_dict().items()}
    load_checkpoint(run / "checkpoints" / "step-00000003", whole, only="model.")
    assert all(torch.equal(whole[f"model.{n}"], p) for n, p in model.state_dict().items())
    assert tokenizer.identity() == load_tokenizer("byte").identity()
    with pytest.raises(UserError, match="exists already"):
        slim(run, tmp_path / "slim")
    assert not list(tmp_path.glob(".writing-*"))
