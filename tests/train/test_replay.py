"""Steps of the past: the same numbers; and planted faults found by name."""

from __future__ import annotations

import json

import pytest
import torch

from castalia.cli import main
from castalia.config import Config
from castalia.errors import UserError
from castalia.model.layers import MLP
from castalia.tools.replay import replay
from castalia.train.loop import Diverged
from castalia.train.run import train


@pytest.fixture
def values(tiny_values):
    return tiny_values | {
        "model": tiny_values["model"] | {"hidden_dropout": 0.1},
        "evaluation": {"interval": None, "at_end": False},
    }


def test_a_step_comes_out_the_same_from_a_checkpoint_and_from_the_start(values, capsys):
    run = train(Config.model_validate(values), quiet=True)
    found = replay(run.directory, 11)
    assert found.start == 8 and [row["step"] for row in found.rows] == [9, 10, 11]
    assert found.largest_difference() == 0 and all(row["logged_loss"] is not None for row in found.rows)
    assert main(["replay", str(run.directory), "--step", "3", "--json", "--autopsy"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["start"] == 0 and answer["largest_difference"] == 0 and answer["finding"] is None
    with pytest.raises(UserError, match="steps 1 to 12"):
        replay(run.directory, 13)


def test_a_soft_prompt_begins_with_its_text(values):
    prompt = {"soft_prompt_tokens": 4, "soft_prompt_text": "the cat"}
    values |= {"model": values["model"] | prompt | {"hidden_dropout": 0.0}, "tokenizer": {"path": "byte"}}
    run = train(Config.model_validate(values | {"checkpoint": {"interval": None}}), quiet=True)
    found = replay(run.directory, 3)
    assert found.start == 0 and found.largest_difference() < 1e-6  # a mistaken beginning: 0.6


def test_a_record_that_does_not_agree_is_told(values):
    run = train(Config.model_validate(values), quiet=True)
    path = run.directory / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        if record["kind"] == "train" and record["step"] == 10:
            record["loss"] += 1e-3
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    assert main(["replay", str(run.directory), "--step", "11"]) == 4


class Broken(torch.autograd.Function):
    """Passes values on, and makes one NaN of gradients."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.log() if (grad < 0).any() else grad


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_an_autopsy_names_module_operation_and_documents(values, monkeypatch, phase):
    """A fault in the second layer's MLP that strikes one token of one sample."""
    config = Config.model_validate(values)
    original, calls = MLP.forward, []

    def forward(self, x, *args, **kwargs):
        out = original(self, x, *args, **kwargs)
        calls.append(1)
        if len(calls) <= planted["from"] or not self.training or (len(calls) - 1) % 2 == 0:
            return out
        if phase == "backward":
            return Broken.apply(out)
        hit = torch.zeros_like(out)
        hit[2, 5, 1] = -1.0
        return out + hit.sqrt()

    planted = {"from": 0}
    monkeypatch.setattr(MLP, "forward", forward)
    with pytest.raises(Diverged):
        train(config, quiet=True)
    found = replay(tmp_run(values), 1)
    assert found.finding is not None
    assert (found.finding.phase, found.finding.module, found.finding.layer) == (phase, "layers.1.mlp", 1)
    if phase == "forward":
        assert found.finding.operation == "sqrt"
        assert (found.finding.row, found.finding.position, found.finding.sample) == (2, 5, 2)
        assert found.documents and all(d["length"] > 0 for d in found.documents)
    else:
        assert found.finding.operation == "log"


def tmp_run(values):
    from pathlib import Path

    return Path(values["output"])
