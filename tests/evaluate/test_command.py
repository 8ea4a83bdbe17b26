"""`castalia evaluate`: texts, all checkpoints, the memorisation scan, a baseline, several processes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import pytest

from castalia.cli import main
from castalia.errors import UserError
from castalia.evaluate.score import Request
from castalia.evaluate.subject import make_subject, open_subject
from castalia.parallel.testing import run_in_processes
from castalia.tools.data_view import open_data_run
from castalia.tools.decoding import opened, parallel_of
from castalia.tools.memorised import scan


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "texts.jsonl"
    texts = ["the cat sat on a mat", "a hat was on the cat and it saw that", "zebra quiz", "not a mat"]
    path.write_text("".join(json.dumps({"text": t, "set": "ab"[i % 2]}) + "\n" for i, t in enumerate(texts)))
    return path


def answer(capsys, *argv):
    assert main(["evaluate", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_texts_by_domain(run, corpus, capsys, tmp_path):
    found = answer(capsys, run, "--text", corpus, "--by", "set", "--output", tmp_path / "out.json")
    assert found["documents"] == 4 and list(found["domains"]) == ["a", "b"]
    assert found == json.loads((tmp_path / "out.json").read_text())
    assert [d["domain"] for d in found["by_document"]] == ["a", "b", "a", "b"]
    assert main(["evaluate", str(run), "--text", str(corpus), "--by", "set"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[0] == "set" and [line.split()[0] for line in table[1:]] == ["a", "b", "all"]


def test_an_exported_folder_scores_the_same(run, corpus, capsys, tmp_path):
    assert main(["export", str(run), str(tmp_path / "hf")]) == 0
    capsys.readouterr()
    mine = answer(capsys, run, "--text", corpus)
    if not (tmp_path / "hf" / "tokenizer.json").exists():  # bytes have no file to export
        pytest.skip("the byte tokenizer has no file that an export could carry")
    assert answer(capsys, tmp_path / "hf", "--text", corpus)["nll"] == pytest.approx(mine["nll"], rel=1e-5)


def test_a_baseline_is_compared_document_by_document(run, corpus, capsys):
    found = answer(capsys, run, "--text", corpus, "--baseline", run)
    entry = found["comparison"]["bits_per_byte"]
    assert (entry["items"], entry["difference"], entry["p_sign"]) == (4, 0, 1)
    earlier = run / "checkpoints" / "step-00000004"
    found = answer(capsys, run, "--text", corpus, "--baseline", earlier)
    before = answer(capsys, earlier, "--text", corpus)
    entry = found["comparison"]["bits_per_byte"]
    assert entry["a"] == pytest.approx(found["bits_per_byte"]) and entry["b"] == pytest.approx(before["bits_per_byte"])
    assert entry["difference"] == pytest.approx(entry["a"] - entry["b"]) and entry["difference"] < 0
    assert main(["evaluate", str(run), "--text", str(corpus), "--baseline", str(earlier)]) == 0
    assert "bits per byte" in capsys.readouterr().out.splitlines()[-1]


def test_a_tokenizer_without_an_end_of_document_scores_data_alone(subject):
    import dataclasses

    assert subject.prefix == 256
    with pytest.raises(UserError, match="with --data"):
        dataclasses.replace(subject, first=None).prefix  # noqa: B018


def test_all_checkpoints_make_a_table_and_curves(run, corpus, capsys, tmp_path):
    argv = [run, "--all-checkpoints", "--text", corpus, "--memorised", "k=4,l=2", "--samples", "20"]
    rows = answer(capsys, *argv, "--output", tmp_path / "out")["rows"]
    assert [row["step"] for row in rows] == [4, 8, 12] and rows[-1]["tokens"] == 12 * 8 * 48
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert "memorised_unseen" in rows[0] and "memorised_unseen" not in rows[-1]
    with (tmp_path / "out" / "dynamics.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [float(r["loss"]) for r in read] == pytest.approx([row["loss"] for row in rows])
    assert json.loads((tmp_path / "out" / "dynamics.json").read_text())["rows"] == rows
    html = (tmp_path / "out" / "dynamics.html").read_text()
    assert html.count("<figure") == len(rows[0]) - 2 and "bits per byte" in html


def test_what_is_extractable_is_what_generation_gives(run):
    """The scan's one forward pass against greedy generation from each prompt."""
    from castalia import generate

    subject, data = open_subject(run), open_data_run([str(run)])
    found = scan(str(run), subject, 12, 3, samples=24, steps=[0, 5, 11])
    assert [(row.step, row.seen, row.sequences) for row in found] == [(0, True, 8), (5, True, 8), (11, True, 8)]
    for row in found:
        spec = data.plan.at(row.step)
        hits = 0
        for i in range(spec.first_sample, spec.first_sample + 8):
            ids = data.dataset[i][:15].tolist()
            made = generate(
                subject.model, subject.tokenizer, [ids[:12]], max_tokens=3, temperature=0, stop_at_eod=False
            )
            hits += made[0].tokens == ids[12:]
        assert row.extractable == hits
    assert sum(row.extractable for row in found) > 0


def test_steps_that_were_not_reached_are_the_control(run):
    found = scan(str(run), open_subject(run, step=8), 4, 2, samples=40, steps=[7, 8])
    assert [row.seen for row in found] == [True, False]


def test_processes_share_the_requests(run, corpus, capsys):
    alone = answer(capsys, run, "--text", corpus)
    command = [sys.executable, "-m", "castalia", "evaluate", str(run), "--text", str(corpus), "--json", "--procs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    shared = json.loads(done.stdout)
    assert shared["nll"] == pytest.approx(alone["nll"], rel=1e-6) and shared["tokens"] == alone["tokens"]


@pytest.mark.parametrize("layout", ["parallel.tensor=2", "parallel.pipeline=2"])
def test_ranks_share_the_model(wide_run, layout):
    """In workers, which are there already; below the same by the command."""
    asked = [Request(list(b"the cat"), list(b" sat")), Request([256], list(b"zebra quiz"))] * 3
    expected = open_subject(wide_run).score(asked, 4)
    for found in run_in_processes(2, score_part, str(wide_run), layout, asked):
        assert [s.logprob for s in found] == pytest.approx([s.logprob for s in expected], rel=1e-5)
        assert [s.greedy for s in found] == [s.greedy for s in expected]


def score_part(world, run, layout, asked):
    with opened(run, parallel=parallel_of([layout]), world=world) as (decoder, tokenizer):
        return make_subject(run, decoder, tokenizer).score(asked, 4)


def test_processes_share_the_model(wide_run, corpus, capsys, tmp_path):
    layout = "parallel.tensor=2"
    alone = answer(capsys, wide_run, "--text", corpus)
    command = [sys.executable, "-m", "castalia", "evaluate", str(wide_run), layout, "--text", str(corpus), "--json"]
    command += ["--procs", "2", "--output", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["nll"] == pytest.approx(alone["nll"], rel=1e-5) and found["tokens"] == alone["tokens"]
    assert done.stderr.count("out.json") == 1


class Pair:
    """Two processes in one: the other's share is known beforehand."""

    rank, size = 0, 2

    def __init__(self, others):
        self.others = others

    def total(self, values):
        values[1::2] = self.others
        return values


def test_every_second_request_is_ones_own(subject):
    import dataclasses

    import torch

    asked = [Request([1, 2], [i]) for i in range(5)]
    everything = subject.score(asked, 2)
    team = Pair(torch.tensor(everything[1::2], dtype=torch.float64))
    found = dataclasses.replace(subject, team=team).score(asked, 2)
    assert [s.logprob for s in found] == pytest.approx([s.logprob for s in everything])
    assert [s.greedy for s in found] == [s.greedy for s in everything]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "nothing to measure"),
        (["--text", "a", "--data", "b"], "are two evaluations"),
        (["--text", "a", "--limit", "3"], "--limit is of use with --tasks alone"),
        (["--data", "a", "--by", "x"], "--by is of use with --text alone"),
        (["--memorised", "32"], "as k=32,l=32"),
        (["--memorised", "k=60,l=60"], "fewer than k + l = 120"),
        (["--memorised", "k=4,l=2", "--steps", "99"], "the run has steps 0 to 11"),
        (["--memorised", "k=4,l=2", "--steps", "a"], "give whole numbers"),
        (["--data", "a", "--baseline", "b"], "--baseline compares items"),
        (["--text", "none.txt", "--batch-size", "0"], "--batch-size 0 must be at least 1"),
    ],
)
def test_what_does_not_go_together_says_so(run, capsys, flags, words):
    assert main(["evaluate", str(run), *flags]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
