"""Who started this process: Slurm, an MPI, torchrun, nobody."""

import pytest

from castalia.errors import UserError
from castalia.parallel.schedulers import first_host, scheduler_variables


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu-[03-05,9],login", "gpu-03"),
        ("a,b", "a"),
        ("node7", "node7"),
        ("r[1,4]-ib", "r1-ib"),
        ("", None),
    ],
)
def test_first_host_of_a_compressed_list(nodes, first):
    assert first_host(nodes) == first


def test_slurm_step():
    step = {"SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "n[10-13]"}
    assert scheduler_variables(step) == {}, "the batch script, in which no step has been started"
    assert scheduler_variables(step | {"SLURM_STEP_ID": "0"}) == {
        "RANK": "5",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "n10",
        "MASTER_PORT": "29500",
    }


def test_mpi_inside_slurm_is_mpi():
    both = {
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_ID": "0",
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "1234",
    }
    found = scheduler_variables(both)
    assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"], found["MASTER_PORT"]) == (
        "3",
        "4",
        "10.0.0.1",
        "1234",
    )


@pytest.mark.parametrize(
    "names",
    [
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
        ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ],
)
def test_an_mpi_on_one_host_meets_there_and_on_several_must_say_where(names):
    rank, size, local, local_size = names
    environment = {rank: "1", size: "2", local: "1"}
    assert scheduler_variables(environment | {local_size: "2"})["MASTER_ADDR"] == "127.0.0.1"
    with pytest.raises(UserError, match="MASTER_ADDR is not set"):
        scheduler_variables(environment | {local_size: "1"})


def test_torchrun_comes_first_and_single_processes_need_nothing():
    assert scheduler_variables({"RANK": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}) == {}
    assert scheduler_variables({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}) == {}
    assert scheduler_variables({}) == {}
