"""A run that begins from another's checkpoint goes on without a jump, or says in one sentence why it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from castalia.checkpoint import read_state
from castalia.config import Config, load
from castalia.errors import UserError
from castalia.train.metrics import read_metrics
from castalia.train.run import Run, train
from castalia.train.start import kind_of

FIXTURES = Path(__file__).parents[1] / "fixtures" / "gptneox_runs"
STEPS = 40


def gptneox_config(name, folder, *overrides):
    """A fixture's configuration, ten steps longer; the decay still ends where it did, at step 30."""
    record = json.loads((FIXTURES / f"{name}.json").read_text())
    keys = record["config"] | {"data-path": str(FIXTURES / "ds"), "vocab-file": str(FIXTURES / "tok.json")}
    keys |= {"train_iters": STEPS, "save": str(folder), "model_parallel_size": 1, "global_num_gpus": 1}
    source = folder.with_suffix(".yml")
    source.write_text(json.dumps(keys))
    quick = ["evaluation.interval=null", "evaluation.at_end=false", "evaluation.test_at_end=false"]
    return load([source], ["performance.threads=1", "performance.peak_flops=1e11", *quick, *overrides])


def with_(values, **sections):
    """A configuration in which some values of some sections are others."""
    merged = {k: (v | sections.pop(k, {}) if isinstance(v, dict) else v) for k, v in values.items()}
    return Config.model_validate(merged | sections)


def losses(run):
    records = read_metrics(run.directory / "metrics.jsonl")
    return {r["step"]: r["loss"] for r in records if r["kind"] == "train"}


def event(run, name):
    return next(r for r in read_metrics(run.directory / "metrics.jsonl") if r.get("event") == name)


@pytest.mark.parametrize("name", ["seq_gptj", "pp1_gptj", "tp2_std"])
def test_a_gptneox_run_goes_on_without_a_jump(name, tmp_path):
    """GPT-NeoX made steps 1 to 30, Castalia 31 to 40; or Castalia made all 40 from the same first weights."""
    save = FIXTURES / f"ckpt_{name}"
    begin = [f"start.path={save}", "start.step=0", "start.optimizer=false"]
    whole = losses(train(gptneox_config(name, tmp_path / "whole", *begin), quiet=True))
    run = train(gptneox_config(name, tmp_path / "continued", f"start.path={save}"), quiet=True)
    continued = losses(run)
    assert sorted(continued) == list(range(31, STEPS + 1))
    assert run.updates == STEPS and run.tokens == STEPS * run.step_tokens
    # The weights at step 30 differ by rounding alone (1e-6 of the loss), which ten more steps do not magnify. Moments
    # left at zero would be seen at 1e-2, and so would the data or the learning rate of another step.
    for step, loss in continued.items():
        assert loss == pytest.approx(whole[step], abs=1e-5), step
    assert event(run, "import")["step"] == 30


def test_the_comparison_above_would_notice_a_cold_start(tmp_path):
    save = FIXTURES / "ckpt_seq_gptj"
    warm = losses(train(gptneox_config("seq_gptj", tmp_path / "warm", f"start.path={save}"), quiet=True))
    with Run(gptneox_config("seq_gptj", tmp_path / "cold", f"start.path={save}"), quiet=True) as run:
        for tensor_name, tensor in run.store.tensors().items():
            if tensor_name.startswith("optimizer."):
                tensor.zero_()
        run.store.set_updates(0)
        run.train()
    assert max(abs(warm[step] - loss) for step, loss in losses(run).items()) > 1e-3


@pytest.mark.parametrize("what", ["run", "run/checkpoints", "run/checkpoints/step-00000008", "copied"])
def test_our_own_run_goes_on_bit_for_bit(what, tiny_values, tmp_path):
    whole = train(with_(tiny_values), quiet=True)
    shutil.copytree(tmp_path / "run/checkpoints/step-00000008", tmp_path / "copied")
    step = None if "0008" in what or what == "copied" else 8
    start = {"path": str(tmp_path / what), "step": step}
    run = train(with_(tiny_values, output=str(tmp_path / "second"), start=start), quiet=True)
    assert losses(run) == {s: v for s, v in losses(whole).items() if s > 8}
    mine = run.store.tensors()
    assert all(torch.equal(mine[n], t) for n, t in whole.store.tensors().items())


def test_weights_alone_begin_at_step_0(tiny_values, tmp_path):
    first = train(with_(tiny_values), quiet=True)
    start = {"path": str(tmp_path / "run"), "optimizer": False}
    config = with_(tiny_values, output=str(tmp_path / "second"), start=start, optimizer={"lr": 1e-3})
    with Run(config, quiet=True) as run:
        assert (run.step, run.updates, run.tokens) == (0, 0, 0)
        for name, tensor in run.store.tensors().items():
            expected = first.store.tensors()[name] if name.startswith("model.") else torch.zeros_like(tensor)
            assert torch.equal(tensor, expected), name
        run.train()
    assert losses(run)[1] < 0.7 * losses(first)[1]


def test_a_soft_prompt_is_added_to_trained_weights(tiny_values, tmp_path):
    train(with_(tiny_values), quiet=True)
    start = {"path": str(tmp_path / "run"), "optimizer": False}
    config = with_(tiny_values, output=str(tmp_path / "second"), start=start, model={"soft_prompt_tokens": 3})
    assert train(config, quiet=True).step == 12


def test_a_run_with_a_checkpoint_of_its_own_does_not_begin_again(tiny_values, tmp_path):
    train(with_(tiny_values), quiet=True)
    config = with_(
        tiny_values, output=str(tmp_path / "second"), start={"path": str(tmp_path / "run"), "optimizer": False}
    )
    first = train(config, quiet=True)
    shutil.rmtree(tmp_path / "run")
    again = train(config, quiet=True)
    assert again.resumed and again.step == 12
    newest = read_state(again.checkpoints / "step-00000012")
    assert newest["import"] == first.imported == again.imported
    assert "step 12" in newest["import"] and str(tmp_path / "run") in newest["import"]


def test_the_state_says_which_code_and_command_wrote_it(tiny_config):
    run = train(tiny_config, quiet=True)
    state = read_state(run.checkpoints / "step-00000012")
    facts = json.loads((run.directory / "environment.json").read_text())
    assert state["git"] == facts["git"] and state["command"] == facts["command"] != ""
    assert state["import"] is None


def test_settings_that_differ_are_said(tiny_values, tmp_path, capsys):
    train(with_(tiny_values), quiet=True)
    start = {"path": str(tmp_path / "run"), "step": 4}
    config = with_(tiny_values, output=str(tmp_path / "second"), start=start, optimizer={"lr": 2e-3})
    capsys.readouterr()
    train(config)
    assert "optimizer.lr: 0.01 -> 0.002" in capsys.readouterr().err


def refused(config, match):
    with pytest.raises(UserError, match=match) as caught, Run(config, quiet=True):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["start.path=nowhere"], "nowhere is neither a Castalia run"),
        (["start.path={save}", "start.step=7"], "there is no global_step7.*global_step30"),
        (["start.path={save}/global_step30", "start.step=30"], "is one checkpoint: leave start.step out"),
        (["start.path={save}", "start.step=0"], "no state of Adam.*start.optimizer=false"),
        (["start.path={save}", "training.steps=30"], "leaves nothing of training.steps 30"),
        (["start.path={save}", "model.intermediate_size=64"], "mlp"),
        (
            ["start.path={save}", "model.vocab_size=640"],
            "is .512, 32. there and .640, 32. here: set model.vocab_size=512",
        ),
        (["start.path={save}", "model.num_layers=2"], "num_layers 3, but model.num_layers is 2"),
        (["start.path={save}", "model.tie_embeddings=true"], "no place for.*final_linear"),
    ],
)
def test_a_gptneox_checkpoint_that_does_not_fit(overrides, match, tmp_path):
    given = [text.format(save=FIXTURES / "ckpt_seq_gptj") for text in overrides]
    refused(gptneox_config("seq_gptj", tmp_path / "run", *given), match)


def test_moments_in_shards_are_refused_and_weights_alone_taken(tmp_path):
    """What a run under ZeRO leaves: weights as ever, the optimizer's state in files of its own."""
    save = tmp_path / "save" / "global_step30"
    shutil.copytree(FIXTURES / "ckpt_seq_gptj" / "global_step30", save)
    head = next(save.glob("mp_rank_*"))
    content = torch.load(head, weights_only=False)
    torch.save(content | {"optimizer": None}, head)
    config = gptneox_config("seq_gptj", tmp_path / "run", f"start.path={save}")
    refused(config, "ZeRO.*start.optimizer=false")
    config = gptneox_config("seq_gptj", tmp_path / "run", f"start.path={save}", "start.optimizer=false")
    with Run(config, quiet=True) as run:
        assert run.step == 0 and "step 30" in run.imported


def test_one_file_is_enough(tmp_path):
    file = next((FIXTURES / "ckpt_seq_gptj" / "global_step30").glob("mp_rank_*"))
    with Run(gptneox_config("seq_gptj", tmp_path / "run", f"start.path={file}"), quiet=True) as run:
        assert run.step == 30


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"start": {"step": 5}}, "no checkpoint of step 5"),
        ({"model": {"hidden_size": 64}}, "has other shapes"),
        ({"training": {"steps": 8}, "start": {"step": 8}}, "leaves nothing of training.steps 8"),
    ],
)
def test_our_own_checkpoint_that_does_not_fit(changed, match, tiny_values, tmp_path):
    train(with_(tiny_values), quiet=True)
    start = {"path": str(tmp_path / "run")} | changed.pop("start", {})
    refused(with_(tiny_values, output=str(tmp_path / "second"), start=start, **changed), match)


def test_another_release_and_a_broken_file_are_refused(tiny_values, tmp_path):
    train(with_(tiny_values), quiet=True)
    lone = tmp_path / "lone"
    shutil.copytree(tmp_path / "run/checkpoints/step-00000008", lone)
    victim = next(lone.glob("*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    second = {"output": str(tmp_path / "second")}
    refused(with_(tiny_values, **second, start={"path": str(lone)}), "choose another checkpoint")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    refused(with_(tiny_values, **second, start={"path": str(tmp_path / "empty")}), "has no checkpoint yet")


def test_a_step_needs_a_path(tiny_values):
    with pytest.raises(ValueError, match="start.step needs start.path"):
        with_(tiny_values, start={"step": 3})


def test_what_is_there_decides(tmp_path):
    (tmp_path / "save").mkdir()
    (tmp_path / "save" / "notes.txt").touch()
    with pytest.raises(UserError, match="neither"):
        kind_of(tmp_path / "save")
    (tmp_path / "save" / "global_step3").mkdir()
    assert kind_of(tmp_path / "save") == kind_of(FIXTURES / "ckpt_pp1_gptj" / "global_step30") == "gptneox"
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert kind_of(tmp_path / "run") == "castalia"
