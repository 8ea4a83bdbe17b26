"""A run from start to end: it learns, records, saves, resumes bit-equal, and refuses what would make it jump."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from castalia.checkpoint import find_checkpoint
from castalia.config import Config
from castalia.errors import UserError
from castalia.train.loop import Stopped
from castalia.train.metrics import read_metrics
from castalia.train.run import Run, train


def weights(run):
    return {n: t.clone() for n, t in run.store.tensors().items()}


def changed(values, **sections):
    merged = {k: (v | sections.get(k, {}) if isinstance(v, dict) else v) for k, v in values.items()}
    return Config.model_validate({k: v for k, v in sections.items() if k not in merged} | merged)


def same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def test_a_run_learns_and_leaves_what_the_contract_says(tiny_config):
    run = train(tiny_config, quiet=True)
    records = read_metrics(run.directory / "metrics.jsonl")
    losses = [r["loss"] for r in records if r["kind"] == "train"]
    assert len(losses) == 12 and losses[-1] < losses[0] - 1.0
    assert {r["step"] for r in records if r["kind"] == "valid"} == {6, 12}
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "checkpoints/latest"):
        assert (run.directory / name).exists(), name
    valid = [r for r in records if r["kind"] == "valid"][-1]
    # One byte is one token here, but for the end-of-document ids, which stand for no byte.
    assert valid["bits_per_byte"] == pytest.approx(valid["loss"] / 0.6931, rel=0.02)
    tokens = [r["tokens"] for r in records if r["kind"] == "train"]
    assert tokens == [(i + 1) * 8 * 32 for i in range(12)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("arena", [True, False])
def test_resumed_equals_uninterrupted(tiny_values, tmp_path, precision, arena):
    settings = {"training": {"precision": precision}, "performance": {"arena": arena}}
    whole = weights(train(changed(tiny_values, **settings), quiet=True))
    values = {**tiny_values, "output": str(tmp_path / "other")}
    settings["training"]["exit_interval"] = 5
    with pytest.raises(Stopped):
        train(changed(values, **settings), quiet=True)
    with pytest.raises(Stopped):
        train(changed(values, **settings), quiet=True)
    resumed = train(changed(values, **settings), quiet=True)
    same(whole, weights(resumed))
    steps = [r["step"] for r in read_metrics(resumed.directory / "metrics.jsonl") if r["kind"] == "train"]
    assert steps == list(range(1, 13))


def test_micro_batches_do_not_change_the_run(tiny_values, tmp_path):
    one = weights(train(changed(tiny_values, training={"micro_batch_size": 8}), quiet=True))
    values = {**tiny_values, "output": str(tmp_path / "other")}
    other = weights(train(changed(values, training={"micro_batch_size": 2}), quiet=True))
    for name, value in one.items():
        if name.startswith("model.") and not name.endswith("qkv.bias"):  # keys' biases have no true gradient
            assert (value - other[name]).norm() < 2e-3 * value.norm() + 1e-6, name


def test_a_finished_run_stays_as_it_is(tiny_config, tiny_values):
    run = train(tiny_config, quiet=True)
    first, settings = weights(run), (run.directory / "config.yaml").read_text()
    same(first, weights(train(tiny_config, quiet=True)))
    same(first, weights(train(changed(tiny_values, optimizer={"lr": 0.5}), quiet=True, accept=True)))
    assert (run.directory / "config.yaml").read_text() == settings


@pytest.mark.parametrize(
    ("section", "values", "word"),
    [
        ("optimizer", {"lr": 2e-2}, "optimizer.lr"),
        ("model", {"norm": "rmsnorm"}, "model.norm"),
        ("data", {"split": "70,30,0"}, "data.split"),
    ],
)
def test_a_changed_numerics_field_is_refused(tiny_values, section, values, word):
    with pytest.raises(Stopped):
        train(changed(tiny_values, training={"exit_interval": 5}), quiet=True)
    with pytest.raises(UserError, match=word):
        train(changed(tiny_values, **{section: values}), quiet=True)


def test_accept_goes_on_with_a_changed_rate(tiny_values):
    with pytest.raises(Stopped):
        train(changed(tiny_values, training={"exit_interval": 5}), quiet=True)
    run = train(changed(tiny_values, optimizer={"lr": 2e-2}), quiet=True, accept=True)
    assert run.step == 12


def test_performance_and_cosmetic_fields_may_change(tiny_values):
    with pytest.raises(Stopped):
        train(changed(tiny_values, training={"exit_interval": 5}), quiet=True)
    run = train(changed(tiny_values, loss={"chunk_size": 7}, checkpoint={"interval": 2}), quiet=True)
    assert run.step == 12


def test_a_run_whose_folder_is_removed_stops_with_a_sentence(tiny_config):
    def remove(run: Run) -> None:
        if run.step == 2:
            shutil.rmtree(run.directory)

    with pytest.raises(UserError, match="was removed while the run trained"):
        train(tiny_config, callbacks=[remove], quiet=True)
    assert not Path(tiny_config.run_dir).exists()


def test_a_second_process_is_refused(tiny_config):
    with Run(tiny_config, quiet=True), pytest.raises(UserError, match=str(os.getpid())):
        train(tiny_config, quiet=True)


def test_a_broken_checkpoint_is_passed_over(tiny_config):
    first = train(tiny_config, quiet=True)
    expected = weights(first)
    newest = find_checkpoint(first.checkpoints).path
    victim = next(newest.glob("*.distcp"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    again = train(tiny_config, quiet=True)
    same(expected, weights(again))


def test_diverged_loss_stops_with_a_sentence(tiny_values):
    with pytest.raises(UserError, match="not finite"):
        train(changed(tiny_values, optimizer={"lr": 1e30, "clip_grad": 0}), quiet=True)


def test_sigterm_saves_the_step(tiny_values, tmp_path):
    values = {**tiny_values, "training": {"steps": 4000, "batch_size": 8}, "checkpoint": {"interval": None}}
    values["evaluation"] = {"interval": None, "at_end": False}
    config = tmp_path / "run.yml"
    config.write_text(yaml.safe_dump(values))
    process = subprocess.Popen(
        [sys.executable, "-m", "castalia", "train", str(config)], stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:
        if line.startswith("step"):
            process.send_signal(signal.SIGTERM)
            break
    process.communicate(timeout=60)
    assert process.returncode == 3
    run = tmp_path / "run"
    saved = find_checkpoint(run / "checkpoints")
    records = read_metrics(run / "metrics.jsonl")
    assert saved.state["step"] == max(r["step"] for r in records if r["kind"] == "train")
    assert records[-1]["event"] == "signal"


def test_environment_is_recorded(tiny_config):
    run = train(tiny_config, quiet=True)
    facts = json.loads((run.directory / "environment.json").read_text())
    assert facts["device"] == "cpu" and facts["fp32_matmul"] in ("medium", "highest")


def test_a_longer_run_that_would_shuffle_the_data_anew_is_refused(tiny_values):
    """GPT-NeoX's order depends on the number of epochs, and so on the run's length."""
    values = changed(tiny_values, schedule={"decay_steps": 12})
    train(values, quiet=True)
    longer = changed(tiny_values, schedule={"decay_steps": 12}, training={"steps": 400})
    with pytest.raises(UserError, match="epochs"):
        train(longer, quiet=True)


def test_a_run_is_prolonged_where_the_order_stays(tiny_values):
    train(changed(tiny_values, schedule={"decay_steps": 12}), quiet=True)
    run = train(changed(tiny_values, schedule={"decay_steps": 12}, training={"steps": 14}), quiet=True)
    assert run.step == 14
