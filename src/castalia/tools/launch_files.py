"""A configuration and its `launch` section -> the file that a scheduler wants.

    sbatch_file        Slurm: a batch script that starts a process for each task by srun
    kubernetes_file    a headless Service and an Indexed Job, each pod a torchrun agent

Both run `castalia train` with the files and overrides that were given. A job that is about to
be ended gets SIGTERM two minutes before, saves its state, and goes on from there when it is
started again.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from castalia.config import Config
from castalia.errors import UserError
from castalia.tools.launch import job_name, slurm_list, train_command

_WARNING = 120  # seconds before the time limit at which Slurm asks a run to save


def sbatch_file(config: Config, arguments: Sequence[str]) -> str:
    """The text of a batch script.

    Raises:
        UserError: launch.nodes or launch.procs_per_node is not set.
    """
    launch = config.launch
    nodes, procs = _shape(config)
    asked = {
        "job-name": config.name,
        "nodes": nodes,
        "ntasks-per-node": procs,
        "gres": launch.gres,
        "partition": launch.partition,
        "account": launch.account,
        "comment": launch.comment,
        "time": launch.time,
        "nodelist": slurm_list("include", launch.include),
        "exclude": slurm_list("exclude", launch.exclude),
        "output": f"{config.run_dir}/launch/slurm-%j.out",
        "signal": f"TERM@{_WARNING}",
        "requeue": True,
        "open-mode": "append",
    }
    options = [f"--{name}" if value is True else f"--{name}={value}" for name, value in asked.items() if value]
    # Slurm splits such a line as a shell does.
    lines = ["#!/bin/bash", *(f"#SBATCH {shlex.quote(option)}" for option in options)]
    step = ["srun", "--kill-on-bad-exit=1"]
    step += [f"--{name}={asked[name]}" for name in ("account", "comment") if asked[name]]
    step += shlex.split(launch.launcher_args)
    command = shlex.join([*step, *train_command(config, arguments)])
    address = launch.master_addr or '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
    return "\n".join(
        [
            *lines,
            "set -eu",
            f"cd {shlex.quote(launch.folder or os.getcwd())}",
            f"export MASTER_ADDR={address}",
            f"export MASTER_PORT={launch.master_port}",
            *launch.setup,
            f"exec {command}",
            "",
        ]
    )


def kubernetes_file(config: Config, arguments: Sequence[str], files: dict[str, str]) -> str:
    """The text of a manifest.

    Args:
        config: the run.
        arguments: for `castalia train`; files of the configuration are named as in `files`.
        files: name and content of each configuration file, which go into a ConfigMap at /config.

    Raises:
        UserError: launch.nodes, launch.procs_per_node or launch.image is not set.
    """
    launch = config.launch
    nodes, procs = _shape(config)
    if launch.image is None:
        raise UserError("launch.image is not set: name the container image, for example one built from containers/")
    name = job_name(config).replace("_", "-")[:52].strip("-")
    run = [
        *("python", "-m", "castalia.parallel.agent", "--nnodes", str(nodes), "--nproc-per-node", str(procs)),
        *("--node-rank", "$(JOB_COMPLETION_INDEX)", "--master-addr", f"{name}-0.{name}"),
        *("--master-port", str(launch.master_port), "--max-restarts", str(launch.max_restarts)),
        *("-m", *train_command(config, arguments, "torchrun")),
    ]
    mounts: list[dict[str, Any]] = [
        {"name": "config", "mountPath": "/config"},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    volumes: list[dict[str, Any]] = [
        {"name": "config", "configMap": {"name": name}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},  # a pod has 64 MB otherwise, too little for NCCL
    ]
    if launch.volume_claim is not None:
        mounts.append({"name": "work", "mountPath": launch.folder or "/work"})
        volumes.append({"name": "work", "persistentVolumeClaim": {"claimName": launch.volume_claim}})
    container: dict[str, Any] = {
        "name": "castalia",
        "image": launch.image,
        "command": run,
        "workingDir": launch.folder or "/work",
        "ports": [{"containerPort": launch.master_port}],
        "volumeMounts": mounts,
    }
    if launch.device_resource is not None:
        container["resources"] = {"limits": {launch.device_resource: procs}}
    pod = {
        "subdomain": name,
        "restartPolicy": "OnFailure",
        "terminationGracePeriodSeconds": _WARNING,
        "containers": [container],
        "volumes": volumes,
    }
    labels = {"app": name}
    return yaml.safe_dump_all(
        [
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": files},
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": name},
                "spec": {"clusterIP": "None", "selector": labels, "publishNotReadyAddresses": True},
            },
            {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "metadata": {"name": name},
                "spec": {
                    "completions": nodes,
                    "parallelism": nodes,
                    "completionMode": "Indexed",
                    "backoffLimit": launch.max_restarts,
                    "template": {"metadata": {"labels": labels}, "spec": pod},
                },
            },
        ],
        sort_keys=False,
    )


def _shape(config: Config) -> tuple[int, int]:
    """Hosts, and processes on each."""
    for name in ("nodes", "procs_per_node"):
        if getattr(config.launch, name) is None:
            raise UserError(f"launch.{name} is not set: say it, for example launch.{name}=2")
    assert config.launch.nodes is not None and config.launch.procs_per_node is not None
    return config.launch.nodes, config.launch.procs_per_node
