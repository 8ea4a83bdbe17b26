"""The same records reach the file, the console, TensorBoard and W&B; what a logger cannot do does not stop a run."""

from __future__ import annotations

import builtins
import io
import json
import socket
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from castalia.config import Config
from castalia.errors import UserError
from castalia.tools.tracker_numbers import tensorboard_scalars, wandb_records
from castalia.train.console import Console
from castalia.train.loop import Stopped
from castalia.train.metrics import Metrics, MetricsFile, read_metrics
from castalia.train.output import copied_output
from castalia.train.run import Run, train
from castalia.train.sinks import scalars

TRAIN = {"v": 1, "kind": "train", "step": 3, "loss": 2.5, "lr": 0.1, "mfu": 0.25, "grad_norm": 1.5, "skipped": 2}


def logging(values, **settings):
    return Config.model_validate(values | {"logging": {"interval": 1, **settings}})


def all_scalars(run):
    """Every number of the run's records, by name and step."""
    records = read_metrics(run.directory / "metrics.jsonl")
    return {(name, r["step"]): value for r in records for name, value in scalars(r).items()}


def test_names_are_gptneox_s():
    assert scalars(TRAIN) == {
        "train/lm_loss": 2.5,
        "train/learning_rate": 0.1,
        "runtime/model_flops_utilization": 25.0,
        "train/grad_norm": 1.5,
        "train/skipped": 2,
    }
    valid = {"v": 1, "kind": "valid", "step": 3, "loss": 1.0, "perplexity": 2.7, "char_perplexity": 1.3}
    assert scalars(valid) == {
        "validation/lm_loss": 1.0,
        "validation/lm_loss_ppl": 2.7,
        "validation/lm_loss_char_lvl_ppl": 1.3,
    }
    assert scalars(valid | {"kind": "test"}).keys() == {
        f"test/{n}" for n in ("lm_loss", "lm_loss_ppl", "lm_loss_char_lvl_ppl")
    }
    norms = {"v": 1, "kind": "norms", "step": 3, "gradient": {"a": 1.0}, "parameter": {"a": 2.0}}
    norms |= {"optimizer": {"a_exp_avg": 3.0}, "zero_gradients": {"a": 0.5}}
    assert scalars(norms) == {
        "gradient_norms/a": 1.0,
        "parameter_norms/a": 2.0,
        "optimizer_state_norms/a_exp_avg": 3.0,
        "pct_grad_zeros/a": 50.0,
    }
    assert scalars({"v": 1, "kind": "event", "step": 3, "event": "end", "text": "x"}) == {}


def test_what_json_cannot_say_is_left_out(tmp_path):
    with Metrics(MetricsFile(tmp_path / "m.jsonl"), [], print) as metrics:
        record = metrics.write("train", 1, loss=float("nan"), lr=0.1, mfu=None, gradient={"a": float("inf"), "b": 1.0})
    assert record == {"v": 1, "kind": "train", "step": 1, "lr": 0.1, "gradient": {"b": 1.0}}
    assert read_metrics(tmp_path / "m.jsonl") == [record]


class Failing:
    """A logger whose server goes away at the second record."""

    def __init__(self):
        self.seen = []
        self.closed = None

    def write(self, record):
        if self.seen:
            raise ConnectionError("no route to host")
        self.seen.append(record["step"])

    def close(self, failed=False):
        self.closed = failed


def test_a_logger_that_fails_is_left_out_and_said_once(tmp_path):
    said, failing, other = [], Failing(), Failing()
    with pytest.raises(KeyError), Metrics(MetricsFile(tmp_path / "m.jsonl"), [failing, other], said.append) as metrics:
        for step in range(1, 4):
            metrics.write("train", step, loss=1.0)
        raise KeyError
    assert failing.seen == [1] and len(said) == 2 and "Failing" in said[0] and "no route to host" in said[0]
    assert [r["step"] for r in read_metrics(tmp_path / "m.jsonl")] == [1, 2, 3]


def test_every_sink_is_closed_and_told_of_a_failure(tmp_path):
    sinks = [Failing(), Failing()]
    with pytest.raises(KeyError), Metrics(MetricsFile(tmp_path / "m.jsonl"), sinks, print):
        raise KeyError
    assert [s.closed for s in sinks] == [True, True]
    for ending in (None, Stopped("by a signal")):
        sinks = [Failing()]
        with suppress(Stopped), Metrics(MetricsFile(tmp_path / "m.jsonl"), sinks, print):
            if ending is not None:
                raise ending
        assert sinks[0].closed is False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full is Linux's")
def test_a_full_disk_is_one_sentence():
    file = MetricsFile.__new__(MetricsFile)
    file._path, file._file = Path("/dev/full"), open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(UserError, match="/dev/full: cannot be written .No space left"):
        file.write({"step": 1})
    file.close(failed=True)


def test_the_console_tells_a_skipped_step():
    out = io.StringIO()
    console = Console(10, 100, out)
    console.write({k: v for k, v in TRAIN.items() if k != "loss"} | {"tokens_per_second": 50.0})
    console.write({"kind": "event", "step": 3, "event": "start", "text": "x"})
    assert out.getvalue() == (
        "step  3/10  loss nan  lr 1.00e-01  |g| 1.500  50 tokens/s  MFU 25%  2 skipped  ETA 0:14\n"
    )


def test_tensorboard_has_every_number(tiny_values, tmp_path):
    pytest.importorskip("tensorboard", reason="pip install 'castalia[tensorboard]'")
    folder = tmp_path / "events"
    run = train(logging(tiny_values, tensorboard=str(folder), norms=["gradient"]), quiet=True)
    numbers, texts = tensorboard_scalars(folder)
    expected = all_scalars(run)
    assert numbers.keys() == expected.keys()
    assert all(numbers[key] == pytest.approx(value, rel=1e-6) for key, value in expected.items())
    assert {"configuration", "event/start", "event/end", "event/checkpoint"} <= set(texts)


def test_tensorboard_goes_on_after_a_kill(tiny_values, tmp_path, monkeypatch):
    """The run dies at step 7, after the checkpoint of step 4: steps 5 and 6 are seen once."""
    pytest.importorskip("tensorboard", reason="pip install 'castalia[tensorboard]'")
    folder = tmp_path / "events"
    config = logging(tiny_values, tensorboard=str(folder))

    def die(run):
        if run.step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, quiet=True, callbacks=[die])
    run = train(config, quiet=True)
    numbers, _ = tensorboard_scalars(folder)
    losses = {s: v for (name, s), v in numbers.items() if name == "train/lm_loss"}
    assert sorted(losses) == list(range(1, 13))
    assert numbers.keys() == all_scalars(run).keys()


def test_wandb_has_every_number(tiny_values, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="pip install 'castalia[wandb]'")
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = {"wandb_project": "waters", "wandb_group": "springs", "wandb_name": "first", "wandb_mode": "offline"}
    values = tiny_values | {"training": {"steps": 12, "batch_size": 8, "exit_interval": 6}}
    with pytest.raises(Stopped):
        train(logging(values, **settings), quiet=True)
    run = train(logging(values, **settings), quiet=True)
    wandb.teardown()  # W&B's own process writes the files: wait for its end
    files = sorted((run.directory / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1  # two sittings, one run
    numbers = {}
    for record in (r for file in files for r in wandb_records(file)):
        if record.HasField("run"):
            assert (record.run.project, record.run.run_group, record.run.display_name) == ("waters", "springs", "first")
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            assert config["optimizer"]["lr"] == 1e-2
        if record.HasField("history"):
            items = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            numbers |= {(name, items["_step"]): value for name, value in items.items() if not name.startswith("_")}
    assert numbers == pytest.approx(all_scalars(run))


@pytest.mark.parametrize(
    ("package", "settings"), [("tensorboard", {"tensorboard": "t"}), ("wandb", {"wandb_project": "p"})]
)
def test_a_missing_package_is_one_sentence(package, settings, tiny_values, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == package or name == f"torch.utils.{package}":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=rf"pip install 'castalia\[{package}\]'"), Run(logging(tiny_values, **settings)):
        pass


def test_wandb_that_refuses_is_one_sentence(tiny_values, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="pip install 'castalia[wandb]'")

    def refuse(**kwargs):
        raise wandb.errors.UsageError("api_key not configured (no-tty).\nmore")

    monkeypatch.setattr(wandb, "init", refuse)
    match = r"refuses \(api_key not configured \(no-tty\)\): run `wandb login`, or set logging.wandb_mode=offline"
    with pytest.raises(UserError, match=match), Run(logging(tiny_values, wandb_project="p")):
        pass


def test_wandb_is_told_of_team_group_and_host(tiny_values, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="pip install 'castalia[wandb]'")
    told = {}

    def look(**kwargs):
        told.update(kwargs)
        raise wandb.errors.UsageError("that is all")

    monkeypatch.setattr(wandb, "init", look)
    given = {"wandb_entity": "team", "wandb_group": "springs", "wandb_host": "https://wandb.example", "wandb_name": "n"}
    with pytest.raises(UserError, match="that is all"), Run(logging(tiny_values, wandb_project="p", **given)):
        pass
    assert (told["project"], told["entity"], told["group"], told["name"]) == ("p", "team", "springs", "n")
    assert told["settings"].base_url == "https://wandb.example"


def test_nothing_optional_is_imported_unasked(tiny_config):
    before = set(sys.modules)
    train(tiny_config, quiet=True)
    assert not {m for m in set(sys.modules) - before if m.split(".")[0] in ("wandb", "tensorboard")}


def test_what_is_printed_is_copied(tiny_values, tmp_path, capsys):
    streams = sys.stdout, sys.stderr
    config = logging(tiny_values, log_dir=str(tmp_path / "logs"))
    train(config, callbacks=[lambda run: print("step", run.step)])
    assert (sys.stdout, sys.stderr) == streams
    printed = capsys.readouterr()
    host = socket.gethostname()
    out = (tmp_path / "logs" / f"{host}_stdout.txt").read_text()
    assert out == printed.out == "".join(f"step {i}\n" for i in range(1, 13))
    assert "follow from others" in printed.err and "translated" not in printed.err
    assert (tmp_path / "logs" / f"{host}_stderr.txt").read_text() == printed.err != ""
    train(config)
    assert (tmp_path / "logs" / f"{host}_stdout.txt").read_text() == out  # appended to, not begun anew


def test_an_error_is_in_the_copy(tmp_path, capsys):
    file = tmp_path / f"{socket.gethostname()}_rank3_stderr.txt"
    with pytest.raises(UserError), copied_output(str(tmp_path), rank=3):
        raise UserError("a sentence")
    with pytest.raises(Stopped), copied_output(str(tmp_path), rank=3):
        raise Stopped("by a signal")
    with pytest.raises(ZeroDivisionError), copied_output(str(tmp_path), rank=3):
        print(1 // 0)
    first, second, *rest = file.read_text().splitlines()
    assert (first, second) == ("castalia: a sentence", "castalia: by a signal")
    assert rest[0].startswith("Traceback") and "ZeroDivisionError" in rest[-1]


def test_a_folder_that_cannot_be_written_is_one_sentence(tiny_values, tmp_path):
    (tmp_path / "file").touch()
    config = logging(tiny_values, log_dir=str(tmp_path / "file" / "logs"))
    with pytest.raises(UserError, match="logging.log_dir: .*cannot be written to"), Run(config, quiet=True):
        pass
