"""Fill-in-the-middle in a run: a resume is the unbroken run, evaluation is as it was, `castalia data view` shows it."""

from __future__ import annotations

import copy
import json

import pytest

from castalia.cli import main
from castalia.config import Config
from castalia.data.prepare import prepare
from castalia.data.tokenizer import load_tokenizer, save_tokenizer, train_bpe
from castalia.errors import UserError
from castalia.train.loop import Stopped
from castalia.train.run import train

NAMES = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]


@pytest.fixture
def values(tiny_values, tmp_path):
    text = "the cat sat on a mat and saw that it was not a hat but an old rat in the hall. " * 8
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text[i:]}) + "\n" for i in range(60)))
    save_tokenizer(train_bpe([text], 300, ["<|endoftext|>", *NAMES]), tmp_path / "t.json")
    prepare([tmp_path / "texts.jsonl"], tmp_path / "tokens", load_tokenizer(str(tmp_path / "t.json")))
    tiny_values["data"] |= {"path": str(tmp_path / "tokens"), "fim_rate": 0.5}
    return tiny_values


def test_resume_evaluation_and_view(values, tmp_path, capsys):
    unbroken = train(Config.model_validate(values | {"output": str(tmp_path / "unbroken")}), quiet=True)
    broken = copy.deepcopy(values)
    broken["training"]["exit_interval"] = 7
    with pytest.raises(Stopped):
        train(Config.model_validate(broken), quiet=True)
    run = train(Config.model_validate(broken), quiet=True)
    assert run.last["train"]["loss"] == unbroken.last["train"]["loss"]
    pre = unbroken.loader.dataset.sentinels[0]
    assert any((batch.tokens == pre).any() for batch in run.loader.batch(run.loader.plan.at(3)))
    assert all((run.data.datasets["valid"][i] != pre).all() for i in range(8))
    assert main(["data", "view", values["output"], "--step", "3", "--json"]) == 0
    samples = json.loads(capsys.readouterr().out)["samples"]
    for row, sample in enumerate(samples):
        assert [i for p in sample["pieces"] for i in p["ids"]] == run.loader.dataset[24 + row].tolist()
        for piece in sample["pieces"]:
            assert piece["rearranged"] == (piece["ids"][0] == pre) == piece["text"].startswith(NAMES[0])
    assert {p["rearranged"] for s in samples for p in s["pieces"]} == {True, False}


def test_what_cannot_be_filled_in(values, tiny_data):
    values["data"] |= {"fim_tokens": ["<a>", *NAMES[1:]]}
    with pytest.raises(UserError, match="no special token '<a>'"):
        train(Config.model_validate(values), quiet=True)
    with pytest.raises(ValueError, match="label data sets"):
        Config.model_validate({"data": {"path": "x", "label_path": "y", "fim_rate": 0.1}})
    with pytest.raises(ValueError, match="different"):
        Config.model_validate({"data": {"path": "x", "fim_tokens": ["a", "a", "b"]}})
