"""The same numbers in Comet's archive, MLflow's database and Trackio's, over two sittings; each if installed."""

from __future__ import annotations

import json
import zipfile

import pytest

from castalia.config import Config
from castalia.errors import UserError
from castalia.train.loop import Stopped
from castalia.train.metrics import read_metrics
from castalia.train.run import train
from castalia.train.sinks import scalars


def two_sittings(values, **logging):
    """A run that stops in the middle and goes on; every number of its records, by name and step."""
    values = values | {"logging": {"interval": 1, **logging}}
    stop = values | {"training": values["training"] | {"exit_interval": 5}}
    with pytest.raises(Stopped):
        train(Config.model_validate(stop), quiet=True)
    run = train(Config.model_validate(values), quiet=True)
    records = read_metrics(run.directory / "metrics.jsonl")
    return run, {(name, r["step"]): value for r in records for name, value in scalars(r).items()}


def test_mlflow_holds_every_number(tiny_values):
    mlflow = pytest.importorskip("mlflow")
    run, expected = two_sittings(tiny_values, mlflow_experiment="tests")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{run.directory / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert found.info.status == "FINISHED" and found.data.params["optimizer.lr"] == "0.01"
    kept = {
        (name, m.step): m.value
        for name in {name for name, _ in expected}
        for m in client.get_metric_history(found.info.run_id, name)
    }
    assert kept == pytest.approx(expected)


def test_comet_keeps_an_archive_of_each_sitting(tiny_values):
    pytest.importorskip("comet_ml")
    run, expected = two_sittings(tiny_values, comet_project="tests", comet_mode="offline", comet_tags=["a"])
    archives = list((run.directory / "comet").glob("*.zip"))
    assert len(archives) == 2
    kept = {}
    for path in archives:
        with zipfile.ZipFile(path) as archive:
            for line in archive.read("messages.json").decode().splitlines():
                message = json.loads(line)
                metric = message.get("payload", {}).get("metric")
                if metric:
                    kept[metric["metricName"], message["payload"]["metric"]["step"]] = float(metric["metricValue"])
    assert {k: v for k, v in kept.items() if k in expected} == pytest.approx(expected)


def test_trackio_holds_every_number(tiny_values, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    import trackio.sqlite_storage as storage
    import trackio.utils

    for module in (storage, trackio.utils):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    run, expected = two_sittings(tiny_values, trackio_project="tests")
    (name,) = storage.SQLiteStorage.get_runs("tests")
    assert name.startswith("tiny-")
    kept = {}
    for row in storage.SQLiteStorage.get_logs("tests", name):
        kept |= {(key, row["step"]): value for key, value in row.items() if key not in ("step", "timestamp")}
    assert {k: v for k, v in kept.items() if k in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("logging", "message"),
    [
        ({"comet_name": "x"}, "comet_project"),
        ({"mlflow_uri": "x"}, "mlflow_experiment"),
        ({"comet_tags": ["a"]}, "comet"),
    ],
)
def test_settings_without_their_tracker_are_refused(tiny_values, logging, message):
    with pytest.raises(ValueError, match=message):
        Config.model_validate(tiny_values | {"logging": logging})


def test_a_missing_package_is_named(tiny_values, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "comet_ml", None)
    with pytest.raises(UserError, match=r"pip install 'castalia\[comet\]'"):
        train(Config.model_validate(tiny_values | {"logging": {"comet_project": "x"}}), quiet=True)
