"""Running means of weights: whatever takes weights from a checkpoint takes them."""

import pytest
import torch

from castalia.checkpoint import load_weights
from castalia.config import Config
from castalia.convert.gptneox import load_gptneox_checkpoint
from castalia.generate import load_run
from castalia.tools.checkpoints import slim
from castalia.tools.export_gptneox import export_gptneox
from castalia.train.run import Run, train


@pytest.mark.parametrize("optimizer", [{"lr": 1e-2, "average": 0.9}, {"lr": 1e-2, "type": "schedule_free"}])
def test_weights_that_are_read_are_those_that_were_validated(tiny_values, tmp_path, optimizer):
    values = tiny_values | {"optimizer": optimizer, "checkpoint": {"interval": 6, "extra_steps": [0]}}
    run = train(Config.model_validate(values), quiet=True)
    trained = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    with run.store.averaged():
        mean = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    assert not torch.equal(trained["head.weight"], mean["head.weight"])

    def same(found):
        return all(torch.equal(found[n], t) for n, t in mean.items())

    assert same(dict(load_run(run.directory)[0].named_parameters()))
    slimmed = {f"model.{n}": torch.zeros_like(t) for n, t in mean.items()}
    load_weights(slim(run.directory, tmp_path / "slim"), slimmed)
    assert same({n.removeprefix("model."): t for n, t in slimmed.items()})
    export = export_gptneox(run.directory, tmp_path / "theirs")
    assert same(load_gptneox_checkpoint(export, run.config.model).weights)
    start = {"path": str(run.directory), "optimizer": False}
    with Run(Config.model_validate(values | {"output": str(tmp_path / "next"), "start": start}), quiet=True) as after:
        assert same(dict(after.model.named_parameters()))
    # Before the first update there is no mean yet.
    initial, _ = load_run(run.directory, 0)
    assert float(initial.head_weight.abs().sum()) > 0
