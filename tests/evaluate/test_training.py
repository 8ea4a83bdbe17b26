"""Tasks while training: records of their own, the same weights as without, and refusals before the run begins."""

from __future__ import annotations

import importlib.util
import json

import pytest

from castalia.cli import main
from castalia.config import load
from castalia.data.tokenizer import ByteTokenizer
from castalia.errors import UserError
from castalia.parallel.layout import Layout
from castalia.train.evaluation import check_tasks

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm_eval is not installed: it brings thirty packages, so it is not among those of [dev]",
)


@pytest.fixture
def config(run):
    return load([run / "config.yaml"], ['evaluation.tasks=["tiny"]', "evaluation.interval=4"])


@needs_harness
def test_tasks_are_recorded_and_change_nothing(run, tmp_path, monkeypatch):
    for name, value in (("HF_HOME", str(tmp_path / "cache")), ("HF_DATASETS_OFFLINE", "1"), ("HF_HUB_OFFLINE", "1")):
        monkeypatch.setenv(name, value)
    (tmp_path / "d.jsonl").write_text('{"q": "the cat sat on a", "a": [" mat", " zebra"], "l": 0}\n' * 3)
    head = f"dataset_path: json\ntest_split: test\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'd.jsonl'}}}}}\n"
    body = "doc_to_text: '{{q}}'\ndoc_to_choice: a\ndoc_to_target: l\nmetric_list: [{metric: acc}]\n"
    (tmp_path / "choose.yaml").write_text(f"task: tiny_choose\noutput_type: multiple_choice\n{head}{body}")
    body = "doc_to_text: '{{q}}'\ndoc_to_target: '{{a[0]}}'\nmetric_list: [{metric: exact_match}]\n"
    body += "generation_kwargs: {max_gen_toks: 4, until: [x]}\n"
    (tmp_path / "write.yaml").write_text(f"task: tiny_write\noutput_type: generate_until\n{head}{body}")
    argv = ["train", str(run / "config.yaml"), f"output={tmp_path / 'again'}", "evaluation.interval=4"]
    argv += ['evaluation.tasks=["tiny_*"]', "evaluation.tasks_interval=8", f"evaluation.tasks_path={tmp_path}"]
    assert main([*argv, "evaluation.batches=1", "--quiet", "--no-report"]) == 0
    records = [json.loads(line) for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()]
    found = [r for r in records if r["kind"] == "tasks"]
    assert [r["step"] for r in found] == [8, 12]
    assert all(0 <= r["eval/tiny_choose_acc"] <= 1 and "eval/tiny_write_exact_match" in r for r in found)
    before = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

    def losses(of):
        return [(r["step"], r["loss"]) for r in of if r["kind"] == "train"]

    assert losses(records) == losses(before) != []


@needs_harness
def test_an_unknown_task_is_refused_before_the_run(config, tmp_path):
    with pytest.raises(UserError, match="there is no tokenizer to read them with"):
        check_tasks(config, Layout(), None)


@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(pipeline=2), Layout(shard=2, zero=3)])
def test_layouts_that_spread_the_model_are_refused(config, layout):
    with pytest.raises(UserError, match="castalia evaluate RUN --all-checkpoints"):
        check_tasks(config, layout, ByteTokenizer())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["evaluation.tasks_interval=6", 'evaluation.tasks=["a"]'], "must be a multiple of evaluation.interval 4"),
        (["evaluation.tasks_limit=6"], "evaluation.tasks_limit is of use with evaluation.tasks alone"),
        (["evaluation.interval=null", 'evaluation.tasks=["a"]'], "evaluated at validations"),
    ],
)
def test_settings_that_say_nothing_are_refused(run, settings, words):
    with pytest.raises(UserError, match=words):
        load([run / "config.yaml"], ["evaluation.interval=4", *settings])
