"""Saving while training goes on: the same checkpoints, nothing lost, and failures that cost only a warning."""

from __future__ import annotations

import concurrent.futures
import resource
import shutil
import threading
from pathlib import Path

import pytest
import torch

import castalia.train.saving as saving_module
from castalia.checkpoint import CheckpointNotSaved, Mirror, find_checkpoint, load_checkpoint, tensor_shapes
from castalia.config import Config
from castalia.errors import UserError
from castalia.generate.load import load_run
from castalia.train.data import check_samples
from castalia.train.loop import Stopped
from castalia.train.metrics import read_metrics
from castalia.train.run import train


def changed(values, **sections):
    return Config.model_validate(values | {k: {**values.get(k, {}), **v} for k, v in sections.items()})


def tensors(directory, step=None):
    found = find_checkpoint(directory / "checkpoints", step)
    out = {name: torch.empty(shape) for name, shape in tensor_shapes(found.path).items()}
    load_checkpoint(found.path, out)
    return out


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def events(directory, *kinds):
    return [r for r in read_metrics(directory / "metrics.jsonl") if r.get("event") in kinds]


def settle(run):
    """Wait for the save under way, without asking what came of it."""
    future = run.saving._background._future
    if future is not None:
        concurrent.futures.wait([future])


@pytest.fixture
def held(monkeypatch):
    """Makes every write wait for an event; gives the event."""
    go, really = threading.Event(), saving_module.save_checkpoint

    def waits(*arguments, **more):
        assert go.wait(60)
        return really(*arguments, **more)

    monkeypatch.setattr(saving_module, "save_checkpoint", waits)
    return go


def test_training_goes_on_while_a_checkpoint_is_written(tiny_values, held, tmp_path, capfd):
    copies = {}

    def look(run):
        if run.step == 4:
            copies.update({n: t.clone() for n, t in run.store.tensors().items()})
        if run.step == 7:
            assert not list(run.checkpoints.glob("step-*")), "it is still being written"
            held.set()

    run = train(changed(tiny_values, checkpoint={"interval": 4}), callbacks=[look])
    assert same(copies, tensors(run.directory, 4)), "the state of step 4, whatever the steps since have done"
    saves = events(run.directory, "checkpoint")
    assert [r["text"] for r in saves] == ["step-00000004", "step-00000008", "step-00000012"]
    assert [r["step"] for r in saves] == [4, 8, 12]
    assert all(r["checkpoint_stall_seconds"] >= 0 and r["checkpoint_write_seconds"] > 0 for r in saves)


def test_the_next_save_waits_and_says_so(tiny_values, held, capfd, monkeypatch):
    monkeypatch.setattr(saving_module, "_NOTICEABLE", 0.0)

    def look(run):
        if run.step == 7:  # the next save finds this one unfinished
            background = run.saving._background
            wait = background.wait
            monkeypatch.setattr(background, "wait", lambda: (held.set(), wait())[1])

    run = train(changed(tiny_values, checkpoint={"interval": 4}), callbacks=[look])
    assert "the checkpoint before was still being written: waited" in capfd.readouterr().err
    assert [p.name for p in sorted(run.checkpoints.glob("step-*"))] == [f"step-{s:08d}" for s in (4, 8, 12)]


def test_asynchronous_and_synchronous_runs_are_the_same(tiny_values, tmp_path):
    runs = [
        train(
            changed(tiny_values | {"output": str(tmp_path / name)}, checkpoint={"interval": 1, "asynchronous": flag}),
            quiet=True,
        )
        for name, flag in (("a", True), ("b", False))
    ]
    for step in (1, 5, 12):
        assert same(*(tensors(run.directory, step) for run in runs))


def test_a_full_disk_costs_a_warning_and_the_last_good_one_stays(tiny_values, capfd):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(run):
        settle(run)
        if run.step in (5, 9):
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000 if run.step == 5 else limit[0], limit[1]))
        if run.step == 9:
            assert [p.name for p in run.checkpoints.glob("step-*")] == ["step-00000004"]

    try:
        run = train(changed(tiny_values, checkpoint={"interval": 4, "keep_last": 1}), callbacks=[fill])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    failed = events(run.directory, "checkpoint failed")
    assert [r["step"] for r in failed] == [8] and "File too large" in failed[0]["text"]
    assert "earlier checkpoints are untouched; training goes on" in capfd.readouterr().err
    assert run.step == 12 and find_checkpoint(run.checkpoints).step == 12


def test_the_last_save_must_succeed(tiny_values, monkeypatch):
    def refuses(*_, **__):
        raise CheckpointNotSaved("no room")

    monkeypatch.setattr(saving_module, "save_checkpoint", refuses)
    with pytest.raises(CheckpointNotSaved, match="no room"):
        train(changed(tiny_values, checkpoint={"interval": None}), quiet=True)


def test_an_error_in_training_does_not_lose_the_save_under_way(tiny_values, held):
    def fail(run):
        if run.step == 5:
            held.set()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(changed(tiny_values, checkpoint={"interval": 4}), callbacks=[fail], quiet=True)
    assert find_checkpoint(Path(tiny_values["output"]) / "checkpoints").step == 4


def test_a_run_that_lost_its_folder_goes_on_from_its_copies(tiny_values, tmp_path, capfd):
    whole = train(Config.model_validate(tiny_values | {"output": str(tmp_path / "whole")}), quiet=True)
    config = changed(tiny_values, checkpoint={"interval": 2, "keep_last": 2, "path": f"file://{tmp_path}/far"})

    def stop(run):
        settle(run)
        if run.step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[stop], quiet=True)
    assert Mirror(f"file://{tmp_path}/far").steps() == [4, 6]
    shutil.rmtree(tmp_path / "run")
    run = train(config)
    assert "step-00000006 was downloaded from" in capfd.readouterr().err
    assert same(tensors(run.directory), tensors(whole.directory))
    assert Mirror(f"file://{tmp_path}/far").steps() == [10, 12]


def test_a_place_for_copies_that_fails_costs_a_warning(tiny_values, tmp_path, capfd):
    far = tmp_path / "far"
    far.write_text("a file where a folder is needed")
    config = changed(tiny_values, checkpoint={"interval": 4, "path": f"file://{far}"})

    def mend(run):
        settle(run)
        if run.step == 9:
            far.unlink()

    run = train(config, callbacks=[mend])
    failed = events(run.directory, "upload failed")
    assert [r["step"] for r in failed] == [4, 8] and "could not be uploaded" in failed[0]["text"]
    assert "it is here, training goes on, and the next save tries again" in capfd.readouterr().err
    assert Mirror(f"file://{far}").steps() == [4, 8, 12], "the last save brought what was missing"


def test_an_unreachable_place_for_copies_is_not_taken_for_an_empty_one(tiny_values, monkeypatch):
    from castalia.checkpoint import MirrorFailed

    def unreachable(self):
        raise MirrorFailed("s3://b/r: its checkpoints could not be listed (timeout)")

    monkeypatch.setattr(Mirror, "steps", unreachable)
    with pytest.raises(UserError, match="it may hold the run's checkpoints"):
        train(changed(tiny_values, checkpoint={"path": "memory://b/r"}), quiet=True)


def test_going_back_to_a_step_sets_later_ones_aside(tiny_values, tmp_path):
    values = changed(tiny_values, checkpoint={"interval": 2, "path": f"file://{tmp_path}/far"})
    first = train(values, quiet=True)
    end = tensors(first.directory)

    def stop(run):
        if run.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(UserError, match=r"no checkpoint of step 5: .*\(2, 4, 6, 8, 10, 12\)"):
        train(values, quiet=True, step=5)
    with pytest.raises(KeyboardInterrupt):
        train(values, quiet=True, step=4, callbacks=[stop])
    aside = first.checkpoints / "set-aside-from-4-1"
    assert sorted(p.name for p in aside.iterdir()) == [
        "metrics.jsonl",
        "step-00000006",
        "step-00000008",
        "step-00000010",
        "step-00000012",
    ]
    assert Mirror(f"file://{tmp_path}/far").steps() == [2, 4]
    again = train(values, quiet=True)  # must not jump to the old step 12
    losses = [r["step"] for r in read_metrics(again.directory / "metrics.jsonl") if r["kind"] == "train"]
    assert losses == list(range(1, 13)) and same(tensors(again.directory), end)


def test_a_checkpoint_alone_is_enough_to_generate(tiny_values, tmp_path):
    run = train(Config.model_validate(tiny_values), quiet=True)
    shutil.copytree(run.checkpoints / "step-00000012", tmp_path / "elsewhere" / "mine")
    model, tokenizer = load_run(tmp_path / "elsewhere" / "mine")
    expected, _ = load_run(run.directory)
    assert same(model.state_dict(), expected.state_dict())
    assert tokenizer.identity() == run.tokenizer.identity()
    with pytest.raises(UserError, match="is the checkpoint of step 12"):
        load_run(tmp_path / "elsewhere" / "mine", step=3)
    other = tiny_values | {"output": str(tmp_path / "other"), "start": {"path": str(tmp_path / "elsewhere" / "mine")}}
    begun = train(changed(other, training={"steps": 14}, schedule={"decay_steps": 12}), quiet=True)
    assert begun.step == 14 and "step 12" in begun.imported


def test_the_logits_of_a_fixed_batch_are_compared(tiny_values, capfd):
    config = changed(tiny_values, training={"exit_interval": 6}, checkpoint={"validate_forward": True})
    with pytest.raises(Stopped):
        train(config, quiet=True)
    run = train(config)
    assert run.step == 12 and "computes the logits that step-00000006 keeps (they differ by 0.0e+00" in (
        capfd.readouterr().err
    )
    assert (find_checkpoint(run.checkpoints).path / "logits.safetensors").exists()


@pytest.mark.parametrize("setting", ["rotary_base", "norm_epsilon"])
def test_a_model_that_computes_something_else_is_refused(tiny_values, setting):
    config = changed(tiny_values, training={"exit_interval": 6}, checkpoint={"validate_forward": True})
    with pytest.raises(Stopped):
        train(config, quiet=True)
    value = {"rotary_base": 10_100, "norm_epsilon": 1e-2}[setting]
    with pytest.raises(UserError, match=r"computes other logits .* checkpoint.validate_forward=false"):
        train(changed(tiny_values, model={setting: value}, checkpoint={"validate_forward": True}), accept=True)


def test_no_run_goes_on_in_a_slim_copy_but_one_may_begin_from_it(tiny_values, tmp_path):
    from castalia.tools.checkpoints import slim

    run = train(Config.model_validate(tiny_values), quiet=True)
    slim(run.directory, tmp_path / "slim")
    with pytest.raises(UserError, match="holds weights alone, so no run goes on from it"):
        train(changed(tiny_values | {"output": str(tmp_path / "slim")}, training={"steps": 14}), quiet=True)
    fresh = tiny_values | {"output": str(tmp_path / "fresh")}
    with pytest.raises(UserError, match="set start.optimizer=false"):
        train(changed(fresh, start={"path": str(tmp_path / "slim")}), quiet=True)
    begun = train(changed(fresh, start={"path": str(tmp_path / "slim"), "optimizer": False}), quiet=True)
    assert begun.step == 12


def test_a_changed_batch_size_is_refused_and_if_accepted_goes_on_where_the_data_was(tiny_values, capfd):
    with pytest.raises(Stopped):
        train(changed(tiny_values, training={"exit_interval": 6}), quiet=True)
    smaller = changed(tiny_values, training={"batch_size": 4})
    with pytest.raises(UserError, match="training.batch_size: 8 -> 4"):
        train(smaller, quiet=True)
    specs = []
    run = train(smaller, accept=True, callbacks=[lambda run: specs.append(run.loader.plan.at(run.step - 1))])
    assert [s.first_sample for s in specs] == [48, 52, 56, 60, 64, 68] and run.tokens == (6 * 8 + 6 * 4) * 32
    assert "batches have other sizes from step 6 on; their samples follow" in capfd.readouterr().err
    state = find_checkpoint(run.checkpoints).state
    assert state["journal"] == [{"kind": "rebatch", "from_step": 6, "before": [[0, 0, 8]]}]
    plan = run.loader.plan
    check_samples(plan, 72)
    with pytest.raises(UserError, match="takes 72 samples, and the data order holds 71: set training.steps to at most"):
        check_samples(plan, 71)
