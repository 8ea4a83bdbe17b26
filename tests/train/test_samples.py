"""Texts written while training: the same in every layout, as generation writes them, and training does not notice."""

from __future__ import annotations

import os

import pytest
import torch

from castalia.config import Config
from castalia.errors import UserError
from castalia.generate import generate
from castalia.parallel.testing import run_in_processes
from castalia.train.loop import Stopped
from castalia.train.metrics import read_metrics
from castalia.train.run import Run, train

PROMPTS = ["the cat sat", "", "on a mat and saw"]
SAMPLING = {"interval": 5, "prompts": PROMPTS, "max_tokens": 12, "seed": 3}


@pytest.fixture
def values(tiny_values):
    # Dropout and averages: what draws, and what is not the weights that are trained.
    model = tiny_values["model"] | {"hidden_dropout": 0.1}
    optimizer = {"lr": 1e-2, "average": 0.9}
    return tiny_values | {"model": model, "optimizer": optimizer, "evaluation": {"interval": None, "at_end": False}}


def records_of(run, kind):
    return [r for r in read_metrics(run.directory / "metrics.jsonl") if r["kind"] == kind]


def test_training_does_not_notice(values, tmp_path):
    without = train(Config.model_validate(values | {"output": str(tmp_path / "without")}), quiet=True)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run = train(Config.model_validate(values | {"sampling": SAMPLING}), quiet=True)
    assert torch.equal(torch.get_rng_state(), before)
    losses = [[(r["loss"], r["grad_norm"]) for r in records_of(done, "train")] for done in (without, run)]
    assert losses[0] == losses[1]
    for name, tensor in without.store.tensors().items():
        assert torch.equal(tensor, run.store.tensors()[name]), name


def test_texts_are_those_of_generation_from_the_averages_each_written_once(values, tmp_path):
    values |= {"sampling": SAMPLING, "logging": {"interval": 1, "tensorboard": str(tmp_path / "tb")}}
    with pytest.raises(Stopped):
        train(Config.model_validate(values | {"training": values["training"] | {"exit_interval": 5}}), quiet=True)
    run = train(Config.model_validate(values), quiet=True)
    with run.store.averaged():
        expected = generate(run.model, run.tokenizer, PROMPTS, 12, seed=3)
    live = generate(run.model, run.tokenizer, PROMPTS, 12, seed=3)
    found = records_of(run, "samples")
    assert [r["step"] for r in found] == [5, 10, 12]
    written = [(s["prompt"], s["text"], s["tokens"]) for s in found[-1]["samples"]]
    assert written == [(one.prompt, one.text, len(one.tokens)) for one in expected]
    assert [one.text for one in live] != [one.text for one in expected]  # the test can tell them apart
    assert found[0]["samples"][0].keys() == {"prompt", "text", "tokens", "temperature", "seed"}
    _check_tensorboard(tmp_path / "tb", found)


def _check_tensorboard(folder, found):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    texts = events.Tensors("samples/0/text_summary")
    assert [t.step for t in texts] == [5, 10, 12]
    sample = found[-1]["samples"][0]
    first = (sample["prompt"] + sample["text"]).splitlines()[0]
    assert first in texts[-1].tensor_proto.string_val[0].decode()


LAYOUTS = (
    {"zero": 3},
    {"tensor": 2, "sequence": True},
    {"pipeline": 2, "tensor": 2, "schedule": "interleaved"},
    {"context": 2},
)


def texts_of(values, layouts, output):
    """What models with initial weights write, by layout."""
    texts = []
    for number, layout in enumerate(layouts):
        given = values | {"parallel": layout, "output": f"{output}-{number}"}
        with Run(Config.model_validate(given), quiet=True) as run:
            run.sample()
            texts.append([s["text"] for s in run.last["samples"]["samples"]])
    return texts


def spread(world, values, output):
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1")  # joined already, but asked for
    return texts_of(values, LAYOUTS, output)


def test_every_layout_writes_the_same(values, tmp_path):
    training = values["training"] | {"micro_batch_size": 1}
    model = values["model"] | {"num_layers": 4}
    sampling = SAMPLING | {"max_tokens": 5}
    values |= {"sampling": sampling, "training": training, "model": model, "optimizer": {"lr": 1e-2}}
    (alone,) = texts_of(values, [{}], tmp_path / "alone")
    assert len(set(alone)) == 3
    for texts in run_in_processes(4, spread, values, tmp_path / "spread", timeout=120):
        assert dict(zip(map(str, LAYOUTS), texts, strict=True)) == dict.fromkeys(map(str, LAYOUTS), alone)


def test_a_file_of_prompts_and_the_console(values, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("the cat\n\nthe hat\n")
    sampling = {"interval": 12, "prompts_file": str(file), "max_tokens": 4, "temperature": 0.0}
    run = train(Config.model_validate(values | {"sampling": sampling}))
    assert [s["prompt"] for s in run.last["samples"]["samples"]] == ["the cat", "the hat"]
    assert "step 12/12  from 'the hat':\n    " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"interval": 1, "prompts": ["x" * 30], "max_tokens": 3}, "prompt 0 has 30 tokens.*data.seq_length 32"),
        ({"interval": 1, "prompts_file": "nowhere.txt"}, "nowhere.txt cannot be read"),
    ],
)
def test_prompts_that_cannot_be_gone_on_from_are_refused(values, sampling, message):
    with pytest.raises(UserError, match=message), Run(Config.model_validate(values | {"sampling": sampling})):
        pass
    assert not os.path.exists(values["output"])


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"max_tokens": 3}, "sampling.interval alone"),
        ({"interval": 1, "prompts": ["a"], "prompts_file": "b"}, "not both"),
    ],
)
def test_settings_that_say_nothing_are_refused(sampling, message):
    with pytest.raises(ValueError, match=message):
        Config.model_validate({"sampling": sampling})
