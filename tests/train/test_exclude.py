"""Excluded documents end to end: from which step they are masked, what a resumed run and `castalia data` know of it."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from castalia.cli import main
from castalia.config import Config
from castalia.data.exclusions import Exclusions, save_exclusions, with_exclusions
from castalia.data.plan import Exclude, RunPlan, Skip, journal_from_json, journal_to_json
from castalia.errors import UserError
from castalia.train.loop import Stopped
from castalia.train.run import train


def labels(run, step):
    return torch.cat([batch.labels for batch in run.loader.batch(run.loader.plan.at(step))])


def test_masked_from_the_step_of_the_resume_on(tiny_values, tiny_data, tmp_path, capsys):
    save_exclusions(tmp_path / "list.txt", {str(tiny_data): np.arange(10, 40)})
    tiny_values["evaluation"] = {"interval": None, "at_end": False}
    unbroken = train(Config.model_validate(tiny_values | {"output": str(tmp_path / "unbroken")}), quiet=True)
    values = copy.deepcopy(tiny_values)
    values["training"]["exit_interval"] = 4
    with pytest.raises(Stopped):
        train(Config.model_validate(values), quiet=True)
    values["data"]["exclude"] = str(tmp_path / "list.txt")
    with pytest.raises(Stopped):  # at 8
        train(Config.model_validate(values), quiet=True)
    run = train(
        Config.model_validate(values | {"training": tiny_values["training"]}), quiet=True
    )  # nothing new is noted
    assert run.journal == (Exclude(4, (("10-39",),)),)
    prefix = str(tiny_data)
    for step in range(12):
        whole, masked = labels(unbroken, step), labels(run, step)
        for row, i in enumerate(range(8 * step, 8 * step + 8)):
            ids = [
                10 <= piece.sequence < 40 for piece in unbroken.loader.dataset.pieces(i) for _ in range(piece.length)
            ]
            gone = torch.tensor(ids[1:]) & (step >= 4)
            assert torch.equal(masked[row], torch.where(gone, -100, whole[row]))
    assert main(["data", "view", values["output"], "--step", "5", "--json"]) == 0
    pieces = [p for s in json.loads(capsys.readouterr().out)["samples"] for p in s["pieces"]]
    assert {p["excluded"] for p in pieces} == {True, False}
    assert all(p["excluded"] == (10 <= p["document"] < 40) for p in pieces)
    assert main(["data", "where", values["output"], "--doc", "12", "--data", prefix]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines and all((int(line.split()[1].rstrip(",")) >= 4) == line.endswith("excluded") for line in lines)
    # The weights follow: equal up to step 4, other ones after it.
    records = [
        [json.loads(line) for line in (one.directory / "metrics.jsonl").read_text().splitlines()]
        for one in (unbroken, run)
    ]
    losses = [[r["loss"] for r in record if r["kind"] == "train"] for record in records]
    assert losses[0][:4] == losses[1][:4] and losses[0][4] != losses[1][4]


def test_resumed_under_one_list_equals_unbroken(tiny_values, tiny_data, tmp_path):
    save_exclusions(tmp_path / "list.txt", {str(tiny_data): np.array([3, 5, 17])})
    tiny_values["data"] |= {"exclude": str(tmp_path / "list.txt"), "order": "permutation"}
    unbroken = train(Config.model_validate(tiny_values | {"output": str(tmp_path / "unbroken")}), quiet=True)
    tiny_values["training"]["exit_interval"] = 4
    for _ in range(2):
        with pytest.raises(Stopped):
            train(Config.model_validate(tiny_values), quiet=True)
    run = train(Config.model_validate(tiny_values), quiet=True)
    assert run.journal == unbroken.journal == (Exclude(0, (("3", "5", "17"),)),)
    assert run.last["train"]["loss"] == unbroken.last["train"]["loss"]


def test_journal(tmp_path):
    first, second = ((), ("7", "9-11")), ((), ())
    journal = with_exclusions((Skip(1, 2),), 3, first)
    assert with_exclusions(journal, 5, first) == journal and with_exclusions((), 5, second) == ()
    journal = with_exclusions(journal, 6, second)
    assert journal == (Skip(1, 2), Exclude(3, first), Exclude(6, second))
    assert journal_from_json(json.loads(json.dumps(journal_to_json(journal)))) == journal
    assert RunPlan(4, 8, 9, journal).at(2).first_sample == 16
    exclusions = Exclusions(journal, ["a", "b"])
    held = [[exclusions.holds(step, "b", i) for i in (6, 7, 8, 9, 11, 12)] for step in (2, 3, 5, 6)]
    assert held == [
        [False] * 6,
        [False, True, False, True, True, False],
        [False, True, False, True, True, False],
        [False] * 6,
    ]
    assert not exclusions.holds(4, "a", 7) and not exclusions.any(2) and exclusions.any(5)
    mask = exclusions.mask(4, [("a", 7, 0, 2), ("b", 9, 5, 3), ("b", 8, 0, 9)], 4)
    assert mask.tolist() == [False, False, True, True]
    with pytest.raises(UserError, match="are no numbers"):
        Exclusions((Exclude(0, (("x",),)),), ["a"])


def test_a_list_that_does_not_fit_is_refused(tiny_values, tiny_data, tmp_path):
    save_exclusions(tmp_path / "list.txt", {str(tiny_data): np.array([60])})
    tiny_values["data"]["exclude"] = str(tmp_path / "list.txt")
    with pytest.raises(UserError, match="document 60"):
        train(Config.model_validate(tiny_values), quiet=True)


def test_a_batch_of_excluded_documents_alone_is_harmless(tiny_values, tiny_data, tmp_path):
    save_exclusions(tmp_path / "list.txt", {str(tiny_data): np.arange(60)})
    tiny_values["data"]["exclude"] = str(tmp_path / "list.txt")
    tiny_values["training"]["steps"] = 2
    run = train(Config.model_validate(tiny_values), quiet=True)
    assert run.step == 2 and all(torch.isfinite(value).all() for value in run.store.tensors().values())
