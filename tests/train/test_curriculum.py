"""A curriculum of sequence lengths in a run: what is read and counted, a resume, and evaluation at full length."""

from __future__ import annotations

import copy
import json

import pytest

from castalia.config import Config
from castalia.data.loader import Loader, Shard
from castalia.errors import UserError
from castalia.train.loop import Stopped
from castalia.train.run import train


def records(run, kind):
    lines = (run.directory / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == kind]


def test_lengths_rise_and_a_resumed_run_is_the_unbroken_one(tiny_values, tmp_path):
    tiny_values["data"] |= {"curriculum": "linear", "curriculum_start": 8, "curriculum_steps": 8}
    values = copy.deepcopy(tiny_values) | {"output": str(tmp_path / "broken")}
    unbroken = train(Config.model_validate(tiny_values), quiet=True)
    expected = [8, 8, 16, 16, 16, 24, 24, 32, 32, 32, 32, 32]
    values["training"]["exit_interval"] = 5
    for _ in range(2):
        with pytest.raises(Stopped):
            train(Config.model_validate(values), quiet=True)
    resumed = train(Config.model_validate(values), quiet=True)
    for run in (unbroken, resumed):
        assert [record["seq_length"] for record in records(run, "train")] == expected
        assert run.tokens == 8 * sum(expected) == run.last["train"]["tokens"]
        assert {record["tokens"] for record in records(run, "valid")} == {2 * 8 * 32}
    losses = [[record["loss"] for record in records(run, "train")] for run in (unbroken, resumed)]
    assert losses[0] == losses[1]
    for step in (0, 4, 11):
        spec = unbroken.loader.plan.at(step)
        batches = unbroken.loader.batch(spec)
        assert sum(batch.num_tokens for batch in batches) == 8 * expected[step]
        whole = unbroken.loader.dataset[spec.first_sample]
        assert batches[0].tokens[0].tolist() == whole[: expected[step]].tolist()
        assert batches[0].labels[0].tolist() == whole[1 : expected[step] + 1].tolist()
        ranks = [Loader(unbroken.loader.dataset, unbroken.loader.plan, Shard(r, 2), 2).batch(spec) for r in range(2)]
        assert {batch.tokens.shape for rank in ranks for batch in rank} == {(2, expected[step])}


def test_tokens_do_not_say_how_many_steps(tiny_values):
    tiny_values["data"] |= {"curriculum": "linear", "curriculum_start": 8, "curriculum_steps": 8}
    tiny_values["training"] = {"tokens": 1000, "batch_size": 8}
    with pytest.raises((UserError, ValueError), match=r"give training\.steps"):
        Config.model_validate(tiny_values)
