"""Comet, MLflow and Trackio: records -> their metrics, by GPT-NeoX's names as in `sinks.py`.

Each keeps one run of its own for one run of ours, over all its sittings: the id is made up once and kept in
the run's folder. All three can work without a network: Comet writes an archive for `comet upload`, MLflow
databases.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from castalia.config import Config
from castalia.config.fields import flat
from castalia.errors import UserError
from castalia.train.metrics import MetricsSink, Record

Scalars = Callable[[Record], dict[str, float]]
Samples = Sequence[Mapping[str, Any]]


def make_trackers(config: Config, directory: Path, scalars: Scalars) -> list[MetricsSink]:
    """The trackers that the configuration asks for, on the process that speaks for all.

    Raises:
        UserError: a package is missing, or the service refuses.
    """
    cfg, out = config.logging, list[MetricsSink]()
    for wanted, kind in ((cfg.comet_project, Comet), (cfg.mlflow_experiment, MLflow), (cfg.trackio_project, Trackio)):
        if wanted is not None:
            out.append(_Tracker(kind(config, directory), scalars))
    return out


class _Tracker:
    """See MetricsSink."""

    def __init__(self, service: Any, scalars: Scalars) -> None:
        self._service, self._scalars = service, scalars

    def write(self, record: Record) -> None:
        """See MetricsSink."""
        values = self._scalars(record)
        if values:
            self._service.log(values, record["step"])
        if record["kind"] == "samples":
            self._service.log_samples(record["samples"], record["step"])

    def close(self, failed: bool = False) -> None:
        """See MetricsSink."""
        self._service.finish(failed)


class Comet:
    """An experiment at comet.com, or an archive of one in the run's folder."""

    def __init__(self, config: Config, directory: Path) -> None:
        comet = _package("comet_ml", "comet", "logging.comet_project")
        cfg = config.logging
        common = {
            "project_name": cfg.comet_project,
            "workspace": cfg.comet_workspace,
            "experiment_key": kept_id(directory / "comet_id.txt", 16),
            "log_code": False,
            "parse_args": False,
            "auto_metric_logging": False,
            "auto_param_logging": False,
            "display_summary_level": 0,
        }
        begun = (directory / "comet_begun").exists()
        try:
            if cfg.comet_mode == "offline":
                archive = directory / "comet"
                archive.mkdir(exist_ok=True)
                kind = comet.ExistingOfflineExperiment if begun else comet.OfflineExperiment
                key = "previous_experiment" if begun else "experiment_key"
                common[key] = common.pop("experiment_key")
                self._run: Any = kind(offline_directory=str(archive), **common)
            else:
                kind = comet.ExistingExperiment if begun else comet.Experiment
                self._run = kind(**common)
        except (ValueError, OSError) as error:
            raise _refused("logging.comet_project", "Comet", error, "logging.comet_mode=offline") from error
        (directory / "comet_begun").touch()
        self._run.set_name(cfg.comet_name or config.name)
        for tag in cfg.comet_tags:
            self._run.add_tag(tag)
        self._run.log_parameters(_settings(config))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Some numbers of a step."""
        self._run.log_metrics(dict(values), step=step)

    def log_samples(self, samples: Samples, step: int) -> None:
        """Texts that the model wrote."""
        for sample in samples:
            self._run.log_text(sample["prompt"] + sample["text"], step=step, metadata=dict(sample))

    def finish(self, failed: bool) -> None:
        """The run ends."""
        self._run.log_other("failed", failed)
        self._run.end()


class MLflow:
    """A run of an experiment at `logging.mlflow_uri`: a server, a database, or a folder."""

    def __init__(self, config: Config, directory: Path) -> None:
        mlflow = _package("mlflow", "mlflow", "logging.mlflow_experiment")
        cfg = config.logging
        from mlflow.exceptions import MlflowException

        uri = cfg.mlflow_uri or f"sqlite:///{directory.resolve() / 'mlflow.db'}"
        file = directory / "mlflow_id.txt"
        try:
            self._client: Any = mlflow.MlflowClient(tracking_uri=uri)
            found = self._client.get_experiment_by_name(cfg.mlflow_experiment)
            # Without a server, artifacts lie beside the database, not in whatever folder is the present one.
            place = None if cfg.mlflow_uri else str(directory.resolve() / "mlflow")
            experiment = found.experiment_id if found else self._client.create_experiment(cfg.mlflow_experiment, place)
            if file.exists():
                self._id = file.read_text(encoding="utf-8").strip()
                self._client.update_run(self._id, status="RUNNING")
                return
            run = self._client.create_run(experiment, run_name=config.name)
            self._id = run.info.run_id
            for key, value in _settings(config).items():
                self._client.log_param(self._id, key, str(value)[:6000])
        except (MlflowException, OSError, ImportError) as error:
            raise _refused("logging.mlflow_experiment", "MLflow", error, "logging.mlflow_uri") from error
        file.write_text(f"{self._id}\n", encoding="utf-8")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Some numbers of a step."""
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        self._client.log_batch(self._id, metrics=[Metric(n, float(v), now, step) for n, v in values.items()])

    def log_samples(self, samples: Samples, step: int) -> None:
        """Texts that the model wrote, as an artifact."""
        text = json.dumps(list(samples), ensure_ascii=False, indent=1)
        self._client.log_text(self._id, text, f"samples/step-{step:08d}.json")

    def finish(self, failed: bool) -> None:
        """The run ends."""
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


class Trackio:
    """A run in Trackio's database on this machine (TRACKIO_DIR), to be shown with `trackio show`."""

    def __init__(self, config: Config, directory: Path) -> None:
        trackio = _package("trackio", "trackio", "logging.trackio_project")
        cfg = config.logging
        self._trackio = trackio
        try:
            trackio.init(
                project=cfg.trackio_project,
                name=f"{config.name}-{kept_id(directory / 'trackio_id.txt', 3)}",
                config=_settings(config),
                resume="allow",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )
        except (ValueError, OSError, RuntimeError) as error:
            raise _refused("logging.trackio_project", "Trackio", error, "TRACKIO_DIR") from error

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Some numbers of a step."""
        self._trackio.log(dict(values), step=step)

    def log_samples(self, samples: Samples, step: int) -> None:
        """Texts that the model wrote."""
        texts = {f"samples/{n}": self._trackio.Markdown(s["prompt"] + s["text"]) for n, s in enumerate(samples)}
        self._trackio.log(texts, step=step)

    def finish(self, failed: bool) -> None:
        """The run ends."""
        self._trackio.finish()


def kept_id(file: Path, size: int) -> str:
    """An id of `size` random bytes in hexadecimal, made up once and kept in a file."""
    if not file.exists():
        file.write_text(f"{secrets.token_hex(size)}\n", encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


def _settings(config: Config) -> dict[str, Any]:
    return {key: value for key, value in flat(config).items() if not key.startswith(("logging.", "launch."))}


def _package(name: str, extra: str, key: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        raise UserError(f"{key}: the package {name} is not installed: pip install 'castalia[{extra}]'") from None


def _refused(key: str, who: str, error: Exception, instead: str) -> UserError:
    first = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return UserError(f"{key}: {who} refuses ({first}): mend that, or set {instead}")
