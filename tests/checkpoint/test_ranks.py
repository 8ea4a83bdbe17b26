"""Several processes save and load together, in layouts that need not be the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from castalia.checkpoint import find_checkpoint, load_checkpoint, verify_checkpoint

# Both ranks are forked from one process, so that torch is imported once.
RANKS = """
import os, resource, sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from castalia.checkpoint import CheckpointNotSaved, find_checkpoint, load_checkpoint, save_checkpoint

folder = Path(sys.argv[1])

def run(rank):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/rendezvous")
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(80.0).view(10, 8)
    def sharded(tensor, dim):
        return distribute_tensor(tensor, mesh, [Shard(dim)])
    tensors = {"a": sharded(whole, 0), "b": torch.ones(3)}
    path = save_checkpoint(folder / "c", 3, tensors, {"x": 1}, keep_last=1)
    target = {"a": sharded(torch.zeros(10, 8), 1), "b": torch.zeros(3)}
    load_checkpoint(path, target)
    assert torch.equal(target["a"].full_tensor(), whole) and target["b"].sum() == 3
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))
    try:
        save_checkpoint(folder / "c", 4, {"a": sharded(torch.randn(1000, 100), 0)}, {})
    except CheckpointNotSaved as error:
        assert "File too large" in str(error)
    else:
        raise AssertionError("rank 1 was refused, and nobody has heard of it")
    dist.destroy_process_group()

children = []
for rank in range(2):
    child = os.fork()
    if child == 0:
        try:
            run(rank)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    children.append(child)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def test_two_ranks(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", RANKS, str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    directory = tmp_path / "c"
    assert sorted(p.name for p in directory.iterdir()) == ["latest", "step-00000003"], "no trace of the failed one"
    found = find_checkpoint(directory)
    assert found is not None and found.state == {"x": 1} and verify_checkpoint(found.path) == []
    assert len(list(found.path.glob("*.distcp"))) == 2
    alone = {"a": torch.zeros(10, 8), "b": torch.zeros(3)}
    load_checkpoint(found.path, alone)
    assert torch.equal(alone["a"], torch.arange(80.0).view(10, 8))
