"""The `launch` section: who starts the processes of a run that is spread over hosts.

`castalia launch` alone reads it; what is trained does not depend on it, so that a run may be
started in one way and continued in another.
"""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from castalia.config.section import Section, setting

_KIND: Literal["cosmetic"] = "cosmetic"


class LaunchConfig(Section):
    """How `castalia launch` starts processes on other hosts; `train` alone does not look at it."""

    launcher: Literal["ssh", "pdsh", "openmpi", "mpich", "mvapich", "impi", "slurm", "kubernetes"] = setting(
        "ssh", "what starts processes on other hosts", _KIND
    )
    hostfile: str | None = setting(None, "file with a line `HOST slots=N` for each host", _KIND)
    include: str | None = setting(None, "hosts and slots that take part: HOST:0,1@HOST2; null: all", _KIND)
    exclude: str | None = setting(None, "hosts and slots that do not: HOST@HOST2:3", _KIND)
    nodes: int | None = setting(None, "how many hosts; null: all of the hostfile", _KIND, ge=1)
    procs_per_node: int | None = setting(None, "processes on each host; null: the hostfile's slots", _KIND, ge=1)
    force_multi: bool = setting(False, "use the launcher for a single host too", _KIND)
    master_addr: str | None = setting(None, "where the processes meet; null: the first host", _KIND)
    master_port: int = setting(29500, "port there", _KIND, ge=1, le=65535)
    ssh_check: bool = setting(True, "try the first host by ssh before anything starts", _KIND)
    ssh_args: str = setting("", "further arguments of ssh", _KIND)
    launcher_args: str = setting("", "further arguments of mpirun, mpiexec or srun", _KIND)
    python: str | None = setting(None, "interpreter on the hosts; null: the path of this one", _KIND)
    folder: str | None = setting(None, "folder on the hosts; null: the path of this one", _KIND)
    setup: list[str] = setting([], "shell lines that each host runs first", _KIND)
    env: list[str] = setting(
        ["NCCL_", "GLOO_", "OMP_", "TORCH_", "UCX_", "MV2_", "FI_", "PYTHON", "HF_"],
        "beginnings of the names of variables that the hosts get",
        _KIND,
    )
    env_file: str | None = setting(None, "file of NAME=VALUE lines that the hosts get too", _KIND)
    visible_devices: str | None = setting(
        "CUDA_VISIBLE_DEVICES", "variable that names the slots that include or exclude leave; null: none", _KIND
    )
    max_restarts: int = setting(0, "how often processes are started anew after one has died", _KIND, ge=0)
    account: str | None = setting(None, "Slurm: whom the job is charged to", _KIND)
    comment: str | None = setting(None, "Slurm: a remark on the job", _KIND)
    partition: str | None = setting(None, "Slurm: the queue", _KIND)
    time: str | None = setting(None, "Slurm: the time limit, such as 24:00:00", _KIND)
    gres: str | None = setting(None, "Slurm: devices of each host, such as gpu:8", _KIND)
    image: str | None = setting(None, "Kubernetes: the container image", _KIND)
    device_resource: str | None = setting(None, "Kubernetes: the devices' name, such as nvidia.com/gpu", _KIND)
    volume_claim: str | None = setting(None, "Kubernetes: the volume claim that is mounted at `folder`", _KIND)

    @model_validator(mode="after")
    def _filters(self) -> LaunchConfig:
        if self.include and self.exclude:
            raise ValueError("launch.include and launch.exclude are both given: keep one")
        return self
