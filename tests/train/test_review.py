"""What once went wrong: signals during validations, masked batches, missing validation data, toggled evaluations."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch

from castalia.checkpoint import find_checkpoint
from castalia.cli import main
from castalia.config import Config, LossConfig, ModelConfig, OptimizerConfig
from castalia.data.loader import Batch
from castalia.errors import UserError
from castalia.model import build_model
from castalia.optim import make_store
from castalia.train.engine import LocalEngine
from castalia.train.loop import Stopped
from castalia.train.metrics import read_metrics
from castalia.train.run import Run, train


def with_values(values, **sections):
    merged = {k: (v | sections.get(k, {}) if isinstance(v, dict) else v) for k, v in values.items()}
    return Config.model_validate({k: v for k, v in sections.items() if k not in merged} | merged)


def test_a_signal_is_answered_before_the_validation(tiny_values):
    """The state is safe first; the validation that was left out is made up for."""
    config = with_values(tiny_values, evaluation={"interval": 3}, checkpoint={"interval": None})
    order = []
    with Run(config, quiet=True) as run:
        step, save, evaluate = run.record_step, run.save, run.evaluate

        def record(*args):
            step(*args)
            if run.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        run.record_step = record
        run.save = lambda *a, **k: (order.append(("save", run.step)), save(*a, **k))[1]
        run.evaluate = lambda split: (order.append((split, run.step)), evaluate(split))[1]
        with pytest.raises(Stopped, match="SIGTERM after step 3"):
            run.train()
    assert order == [("save", 3)]
    train(config, quiet=True)
    records = read_metrics(run.directory / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "valid"] == [3, 6, 9, 12]


def test_a_signal_during_the_validation_saves_that_step(tiny_values):
    config = with_values(tiny_values, evaluation={"interval": 3}, checkpoint={"interval": None})
    with Run(config, quiet=True) as run:
        evaluate = run.evaluate
        run.evaluate = lambda split: (os.kill(os.getpid(), signal.SIGINT), evaluate(split))[1]
        with pytest.raises(Stopped, match="SIGINT after step 3"):
            run.train()
    assert find_checkpoint(run.checkpoints).step == 3


def test_any_second_signal_is_deadly(tiny_values):
    """Once one signal was noticed, the other kind has its own effect again, too."""
    config = with_values(tiny_values, checkpoint={"interval": None})
    with Run(config, quiet=True) as run:
        step = run.record_step

        def record(*args):
            step(*args)
            # To this very thread: what is sent to the process may reach another one, and come in another order.
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)

        run.record_step = record
        # A shell that starts the tests in its background has them ignore SIGINT.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                run.train()
        finally:
            signal.signal(signal.SIGINT, before)


def test_a_batch_without_labels_changes_nothing():
    model = build_model(ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=32), 0)
    store = make_store(model, OptimizerConfig(weight_decay=0.0), "fp32", arena=True)
    before = {n: p.clone() for n, p in model.named_parameters()}
    ids = torch.zeros(2, 8, dtype=torch.long)
    batch = Batch(ids, torch.full_like(ids, -100), torch.arange(8).expand(2, -1))
    stats = LocalEngine(model, store, LossConfig()).forward_backward([batch], 0)
    store.step(0.1)
    assert stats.loss == 0.0 and stats.tokens == 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_validation_without_data_is_said(tiny_values, capsys):
    train(with_values(tiny_values, data={"split": "100,0,0"}))
    assert "nothing will be evaluated on the valid split, since data.split '100,0,0'" in capsys.readouterr().err
    values = {**tiny_values, "output": tiny_values["output"] + "2"}
    train(with_values(values, data={"split": "100,0,0"}, evaluation={"interval": None, "at_end": False}))
    assert "WARNING" not in capsys.readouterr().err


def test_evaluation_may_be_switched_on_and_off(tiny_values):
    with pytest.raises(Stopped):
        train(with_values(tiny_values, training={"exit_interval": 5}), quiet=True)
    run = train(with_values(tiny_values, evaluation={"interval": None, "at_end": False}), quiet=True)
    assert run.step == 12


def test_overrides_do_not_go_with_a_config(tiny_config):
    with pytest.raises(UserError, match=r"training\.steps=1"):
        train(tiny_config, "training.steps=1", quiet=True)


def test_json_alone_is_on_standard_output(tiny_values, tmp_path, capsys):
    path = tmp_path / "run.yml"
    path.write_text(json.dumps(tiny_values))
    assert main(["train", str(path), "training.exit_interval=5", "--json", "--quiet"]) == 3
    out = capsys.readouterr()
    assert "exit_interval" in json.loads(out.out)["stopped"] and "exit_interval" in out.err


def test_threads_are_given_back(tiny_values):
    torch.set_num_threads(2)
    try:
        train(with_values(tiny_values), quiet=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("value", ["2", "", "x"])
def test_launcher_variables(tiny_config, monkeypatch, value):
    monkeypatch.setenv("WORLD_SIZE", value)
    if value == "":
        assert train(tiny_config, quiet=True).step == 12
    else:
        with pytest.raises(UserError, match="WORLD_SIZE"):
            train(tiny_config, quiet=True)
