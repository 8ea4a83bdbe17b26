"""One run logged to every tracker at once, and the numbers read back out of each.

    train, stopped half way, and again ──┬─> metrics.jsonl ──sinks.scalars──> (name, step) -> value ─┐
                                         └─> TensorBoard, W&B, Comet, MLflow, Trackio ──read back────┴─> the same?

Nothing goes over a network: W&B, Comet, MLflow and Trackio work with files here. Each is read as its maker reads it
(TensorBoard's accumulator, MLflow's client, Trackio's storage), or, where only an upload is foreseen, out of what
would be uploaded: W&B's file of protocol buffers, Comet's archive of messages.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from castalia.config import Config
from castalia.errors import CheckFailed
from castalia.train.loop import Stopped
from castalia.train.metrics import read_metrics
from castalia.train.run import train
from castalia.train.sinks import scalars

Numbers = dict[tuple[str, int], float]
"""(name, step) -> value."""
PROJECT = "waters"
CLOSE = 1e-6
"""Largest relative difference: TensorBoard keeps 32 bits of a number."""


@dataclass(frozen=True)
class Tracker:
    """One of them.

    Attributes:
        package: that Python imports.
        settings: of `logging`, for a run in a folder.
        read: that folder -> all numbers.
    """

    package: str
    settings: Callable[[Path], dict[str, Any]]
    read: Callable[[Path], Numbers]


def installed() -> list[str]:
    """The trackers whose packages are there."""
    return [name for name, tracker in TRACKERS.items() if find_spec(tracker.package) is not None]


def log_everywhere(values: Mapping[str, Any], names: list[str]) -> tuple[Numbers, dict[str, Numbers]]:
    """Train in two sittings with these trackers on, and read them back.

    Args:
        values: of a configuration with an `output` and an even number of steps.
        names: of TRACKERS.

    Returns:
        What `metrics.jsonl` holds, and what each tracker holds.
    """
    folder = Path(values["output"])
    logging: dict[str, Any] = {"interval": 1, "norms": ["gradient", "parameter"]}
    for name in names:
        logging |= TRACKERS[name].settings(folder)
    values = {**values, "logging": logging}
    half = values | {"training": values["training"] | {"exit_interval": values["training"]["steps"] // 2}}
    with _trackio_at(folder / "trackio"):
        with suppress(Stopped):
            train(Config.model_validate(half), quiet=True)
        train(Config.model_validate(values), quiet=True)
        if "W&B" in names:
            import wandb

            wandb.teardown()  # W&B's own process writes the files: wait for its end
        held = {name: TRACKERS[name].read(folder) for name in names}
    records = read_metrics(folder / "metrics.jsonl")
    return {(name, r["step"]): float(value) for r in records for name, value in scalars(r).items()}, held


def largest_difference(expected: Numbers, held: Numbers) -> float:
    """Largest relative difference.

    Raises:
        CheckFailed: a number is missing, or is off by more than CLOSE.
    """
    missing = [key for key in expected if key not in held]
    if missing:
        raise CheckFailed(f"{len(missing)} of {len(expected)} numbers are missing, the first is {missing[0]}")
    largest = 0.0
    for key, value in expected.items():
        off = abs(held[key] - value) / max(abs(value), 1e-30) if held[key] != value else 0.0
        if not off <= CLOSE:
            raise CheckFailed(f"{key} is {held[key]}, not {value}")
        largest = max(largest, off)
    return largest


# Reading back -------------------------------------------------------------------------------


def tensorboard_scalars(folder: Path) -> tuple[Numbers, list[str]]:
    """All event files as TensorBoard shows them (what a resumed run purged is left out), and the names of texts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    numbers = {(tag, e.step): float(e.value) for tag in tags["scalars"] for e in events.Scalars(tag)}
    return numbers, [tag.removesuffix("/text_summary") for tag in tags["tensors"]]


def wandb_records(file: Path) -> list[Any]:
    """What an offline run's file holds: protocol buffers in LevelDB's log format, after seven bytes of W&B's own.

    Blocks of 32 KiB; a piece has a checksum (4 bytes), a length (2) and a kind (1): whole, first, middle, last.
    """
    format_: Any = import_module("wandb.proto.wandb_internal_pb2")
    data, at, whole, records = file.read_bytes(), 7, b"", []
    if data[:4] != b":W&B":
        raise CheckFailed(f"{file}: does not begin as W&B's files do")
    while at < len(data):
        if 32768 - at % 32768 < 7:  # too little is left in the block for a piece's head
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            records.append(format_.Record.FromString(whole))
            whole = b""
    return records


def wandb_numbers(file: Path) -> Numbers:
    """The numbers of one sitting's file."""
    numbers: Numbers = {}
    for record in wandb_records(file):
        if record.HasField("history"):
            items = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            values = {k: v for k, v in items.items() if isinstance(v, (int, float)) and not k.startswith("_")}
            numbers |= {(k, int(items["_step"])): float(v) for k, v in values.items()}
    return numbers


def _wandb(folder: Path) -> Numbers:
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    if len({file.name for file in files}) != 1:
        raise CheckFailed(f"the sittings are {len({file.name for file in files})} runs of W&B's, not one")
    return {key: value for file in files for key, value in wandb_numbers(file).items()}


def _comet(folder: Path) -> Numbers:
    numbers: Numbers = {}
    for path in sorted((folder / "comet").glob("*.zip")):
        with zipfile.ZipFile(path) as archive:
            for line in archive.read("messages.json").decode().splitlines():
                payload = json.loads(line).get("payload", {})
                metric = payload.get("metric")
                if metric and payload.get("metric", {}).get("step") is not None:
                    numbers[metric["metricName"], int(metric["step"])] = float(metric["metricValue"])
    return numbers


def _mlflow(folder: Path) -> Numbers:
    mlflow: Any = import_module("mlflow")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder.resolve() / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name(PROJECT).experiment_id])
    if len(runs) != 1 or runs[0].info.status != "FINISHED":
        raise CheckFailed(f"MLflow has {len(runs)} runs, of which one that is finished was expected")
    of = runs[0].info.run_id
    return {(name, m.step): m.value for name in runs[0].data.metrics for m in client.get_metric_history(of, name)}


def _trackio(folder: Path) -> Numbers:
    from trackio.sqlite_storage import SQLiteStorage

    names = SQLiteStorage.get_runs(PROJECT)
    if len(names) != 1:
        raise CheckFailed(f"Trackio has {len(names)} runs, of which one was expected")
    rows = SQLiteStorage.get_logs(PROJECT, names[0])
    return {(k, row["step"]): float(v) for row in rows for k, v in row.items() if k not in ("step", "timestamp")}


@contextmanager
def _trackio_at(folder: Path) -> Iterator[None]:
    """Trackio's database in a folder; it looks at the variable only when it is imported first."""
    before = os.environ.get("TRACKIO_DIR")
    os.environ["TRACKIO_DIR"] = str(folder)
    kept: list[tuple[Any, Any]] = []
    if find_spec("trackio") is not None:
        for name in ("trackio.sqlite_storage", "trackio.utils"):
            module: Any = import_module(name)
            kept.append((module, module.TRACKIO_DIR))
            module.TRACKIO_DIR = folder
    try:
        yield
    finally:
        for module, value in kept:
            module.TRACKIO_DIR = value
        if before is None:
            del os.environ["TRACKIO_DIR"]
        else:
            os.environ["TRACKIO_DIR"] = before


TRACKERS: dict[str, Tracker] = {
    "TensorBoard": Tracker(
        "tensorboard",
        lambda folder: {"tensorboard": str(folder / "tensorboard")},
        lambda folder: tensorboard_scalars(folder / "tensorboard")[0],
    ),
    "W&B": Tracker(
        "wandb", lambda folder: {"wandb_project": PROJECT, "wandb_group": "springs", "wandb_mode": "offline"}, _wandb
    ),
    "Comet": Tracker("comet_ml", lambda folder: {"comet_project": PROJECT, "comet_mode": "offline"}, _comet),
    "MLflow": Tracker("mlflow", lambda folder: {"mlflow_experiment": PROJECT}, _mlflow),
    "Trackio": Tracker("trackio", lambda folder: {"trackio_project": PROJECT}, _trackio),
}


# The certificate ----------------------------------------------------------------------------


def certify_trackers(folder: Path) -> str:
    """The same run in every tracker, over two sittings, read back; and every rank's own run in W&B.

    Raises:
        CheckFailed: a package is missing, or a tracker holds other numbers.
    """
    from importlib.metadata import version

    from castalia.tools.certify import small_run, table

    missing = [t.package for name, t in TRACKERS.items() if name not in installed()]
    if missing:
        raise CheckFailed(
            f"{', '.join(missing)}: not installed: pip install 'castalia[tensorboard,wandb,comet,mlflow,trackio]'"
        )
    values = small_run(folder) | {"output": str(folder / "run")}
    values["training"] |= {"steps": 20}
    expected, held = log_everywhere(values, list(TRACKERS))
    rows = []
    for name, numbers in held.items():
        package = {"comet_ml": "comet-ml", "mlflow": "mlflow-skinny"}.get(
            TRACKERS[name].package, TRACKERS[name].package
        )
        off = largest_difference(expected, numbers)
        rows.append((name, version(package), f"{len(expected):,}", "equal" if off == 0 else f"{off:.1e}"))
    said = table(("tracker", "version", "numbers of metrics.jsonl, all found", "largest relative difference"), rows)
    return said + f"\nW&B with `logging.wandb_all_ranks` on two processes: {_all_ranks(folder, values)}.\n"


def _all_ranks(folder: Path, values: dict[str, Any]) -> str:
    import subprocess
    import sys

    path, output = folder / "ranks.yml", folder / "ranks"
    logging = TRACKERS["W&B"].settings(output) | {"interval": 1, "wandb_all_ranks": True}
    path.write_text(json.dumps(values | {"output": str(output), "logging": logging}), encoding="utf-8")
    command = [sys.executable, "-m", "castalia", "train", str(path), "--quiet", "--no-report", "--procs", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CheckFailed(f"two processes with wandb_all_ranks: exit code {done.returncode}: {done.stderr[-2000:]}")
    names, losses = set(), []
    for file in sorted((output / "wandb").glob("offline-run-*/*.wandb")):
        for record in wandb_records(file):
            if record.HasField("run"):
                names.add((record.run.run_group, record.run.display_name))
        losses.append({step: v for (name, step), v in wandb_numbers(file).items() if name == "train/lm_loss"})
    steps = values["training"]["steps"]
    if len(names) != 2 or any(len(found) != steps or not all(map(math.isfinite, found.values())) for found in losses):
        raise CheckFailed(f"two processes with wandb_all_ranks made the runs {sorted(names)}")
    groups, called = {group for group, _ in names}, ", ".join(sorted(name for _, name in names))
    return f"{len(names)} runs ({called}) in the group {groups.pop()}, each with {steps} steps"
