"""The quickest of the ways that were tried is written, with its evidence; what was measured is not measured again."""

import json

import pytest

from castalia.cli import main
from castalia.config import load
from castalia.errors import UserError
from castalia.tools import tune as tuning
from castalia.tools.tune import tune
from castalia.tools.tune_trial import Result, trial_config, try_out

CONFIG = """
name: small
data: {seq_length: 32}
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2, vocab_size: 300}
training: {steps: 5, batch_size: 8, micro_batch_size: 2}
evaluation: {interval: 1}
"""
MACHINE = """
version: 1
name: a desk
kind: cpu
devices_per_node: 2
memory: 1.0e+9
flops: {fp32: 1.0e+11}
memory_bandwidth: 1.0e+10
links: {within: 1.0e+9, between: 1.0e+9, within_latency: 1.0e-5, between_latency: 1.0e-5}
achieved: {matmul: 1, attention: 1, memory: 1, links: 1}
operation_seconds: 1.0e-6
host: {link: 1.0e+9, memory_bandwidth: 1.0e+10, memory: 1.0e+9}
"""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a.yml").write_text(CONFIG)
    (tmp_path / "desk.yml").write_text(MACHINE)
    return tmp_path


@pytest.fixture
def tried(monkeypatch):
    """Trials of invented times: a step takes a second, half of it with micro-batches of 8, and less if compiled."""
    seen = []

    def invented(config, processes, counted, folder, seconds):
        seen.append((processes, config.training.micro_batch_size, config.performance.compile))
        if processes == 2:
            return Result(failed="it is too hot here")
        step = 1.0 if config.training.micro_batch_size != 8 else 0.4 if config.performance.compile else 0.5
        return Result((step,) * counted, 3.0, 1 << 20)

    monkeypatch.setattr(tuning, "try_out", invented)
    return seen


def run(files, *overrides, folder="t", said=None):
    say = (lambda text: None) if said is None else said.append
    return tune([str(files / "a.yml")], overrides, files / folder, 9, str(files / "desk.yml"), 8, say)


def test_the_quickest_is_written_with_its_evidence(files, tried):
    answer = run(files)
    assert answer["settings"] == {"training.micro_batch_size": 8, "performance.compile": True}
    assert answer["speed_up"] == {"median": 2.5, "least": 2.5, "most": 2.5}
    written = load([answer["tuned"]])
    assert (written.training.micro_batch_size, written.performance.compile) == (8, True)
    before = load([files / "a.yml"])
    kept = {"training": before.training, "performance": before.performance}
    assert written.model_copy(update=kept).model_dump() == before.model_dump()  # nothing else has changed
    text = (files / "t" / "tuned.yml").read_text()
    assert "# " in text and "micro_batch_size 8, compile true" in text
    rows = {row["says"]: row for row in answer["ways"]}
    assert rows["1 process, as given"]["tokens_per_second"] == 8 * 32 / 1.0
    failed = [row for row in answer["ways"] if row["processes"] == 2]
    assert failed and all(row["failed"] == "it is too hot here" for row in failed)
    # Looked at once, then three rounds in turns with what was given.
    assert tried.count((1, 2, False)) == 4 and tried.count((1, 8, False)) == 4 and tried.count((1, 8, True)) == 4


def test_a_second_sitting_goes_on_where_the_first_ended(files, tried):
    first = run(files)
    number = len(tried)
    journal = files / "t" / "trials.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:-2]) + lines[-2][:30])  # killed in the midst of a line
    assert run(files)["ways"] == first["ways"]
    assert len(tried) == number + 2
    assert run(files) == first and len(tried) == number + 2


def test_trials_of_another_run_are_not_taken(files, tried):
    run(files)
    with pytest.raises(UserError, match=r"another configuration, machine or version.*--folder"):
        run(files, "model.num_layers=3")
    assert run(files, "name=other", folder="t")["ways"]  # a name costs no time


def test_nothing_ran(files, monkeypatch):
    monkeypatch.setattr(tuning, "try_out", lambda *_: Result(failed="no"))
    with pytest.raises(UserError, match="no trial came to its end within 9 minutes: no; give more --minutes"):
        run(files)


def test_a_larger_batch_than_there_is_time_for_is_cut(files, tried):
    said = []
    answer = run(files, "training.batch_size=1048576", said=said)
    assert answer["batch"] < 1048576 and 1048576 % answer["batch"] == 0
    assert any("of the batch's 1048576 sequences" in line for line in said)


def test_a_real_trial(files):
    import numpy as np

    from castalia.data.store import StoreWriter

    with StoreWriter(files / "ids", np.uint16) as writer:
        writer.add_document(np.arange(300).repeat(20))
        writer.finish()
    folder = files / "trial"
    folder.mkdir()
    config = load([files / "a.yml"])
    overrides = {"training.micro_batch_size": 4, "performance.threads": 1}
    found = try_out(trial_config(config, 4, folder, files / "ids", overrides), 1, 2, folder, 100)
    assert found.failed is None and len(found.steps) == 2 and min(found.steps) > 0 and found.start > 0
    assert found.memory > 1 << 20
    written = load([folder / "trial.yml"])
    assert (written.training.batch_size, written.training.micro_batch_size) == (4, 4)
    assert not list((folder / "run").glob("checkpoints/*"))  # nothing is saved


def test_what_cannot_be_meant(files, capsys):
    config = str(files / "a.yml")
    assert main(["tune", config, "--minutes", "0"]) == 2
    assert main(["tune", config, "--candidates", "0"]) == 2
    assert main(["tune", config, "--machine", "nothing"]) == 2
    said = capsys.readouterr().err
    assert "--minutes 0: give more than 0" in said and "--candidates 0" in said and "--machine nothing" in said


def test_progress_and_the_answer_are_apart(files, tried, capsys):
    folder = str(files / "u")
    flags = ["--machine", str(files / "desk.yml"), "--folder", folder, "--json"]
    assert main(["tune", str(files / "a.yml"), *flags]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["processes"] == 1 and "look: 1 process, as given" in err
