"""Variables of Slurm and MPI -> those of torch.distributed.

    SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID            srun
    OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK             Open MPI
    MV2_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK              MVAPICH2
    PMI_RANK, PMI_SIZE, MPI_LOCALRANKID                  MPICH and Intel MPI (Hydra)
    PALS_RANKID, PALS_LOCAL_RANKID, PMI_SIZE             HPE PALS

They are looked at only where RANK and WORLD_SIZE are not set, since torchrun may itself run
inside a Slurm job. Without MASTER_ADDR, Slurm's first host is the meeting place, and this host
where all processes are on one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from castalia.errors import UserError

PORT = 29500  # torchrun's default


@dataclass(frozen=True)
class _Scheduler:
    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str


_SCHEDULERS = (
    _Scheduler("Open MPI", *(f"OMPI_COMM_WORLD_{part}" for part in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
    _Scheduler("MVAPICH", *(f"MV2_COMM_WORLD_{part}" for part in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
    _Scheduler("PALS", "PALS_RANKID", "PMI_SIZE", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),
    _Scheduler("MPI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    # Last, since mpirun inside a Slurm allocation sets its own variables beside Slurm's.
    _Scheduler("Slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)


def scheduler_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What torch.distributed's variables should be, as far as a scheduler says; empty where it says nothing.

    Raises:
        UserError: several processes were started and nothing says where they meet.
    """
    if environment.get("RANK") or environment.get("WORLD_SIZE"):
        return {}
    for scheduler in _SCHEDULERS:
        size = environment.get(scheduler.size, "1")
        if size == "1" or scheduler.rank not in environment:
            continue
        if scheduler.name == "Slurm" and "SLURM_STEP_ID" not in environment:
            continue  # the batch script itself, which has Slurm's variables too
        address = environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_STEP_NODELIST", ""))
        if not address and environment.get(scheduler.local_size) == size:
            address = "127.0.0.1"
        if not address:
            raise UserError(
                f"{scheduler.name} started {size} processes on several hosts, but MASTER_ADDR is not set: "
                "export the address of the first host, or start with `castalia launch`"
            )
        return {
            "RANK": environment[scheduler.rank],
            "WORLD_SIZE": size,
            "LOCAL_RANK": environment.get(scheduler.local_rank, "0"),
            "MASTER_ADDR": address,
            "MASTER_PORT": environment.get("MASTER_PORT") or str(PORT),
        }
    return {}


def first_host(nodelist: str) -> str | None:
    """The first host of Slurm's compressed list: `gpu-[03-05,9],login` is gpu-03; None if it is empty."""
    match = re.match(r"([^,\[]+)(?:\[([^\]]*)\]([^,]*))?", nodelist)
    if match is None:
        return None
    prefix, ranges, suffix = match[1], match[2], match[3] or ""
    return prefix if ranges is None else prefix + re.split(r"[-,]", ranges)[0] + suffix
