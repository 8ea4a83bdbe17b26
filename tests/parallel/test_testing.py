"""The helper that runs a function in several processes, and the operations that go through autograd."""

import operator
import os
import signal

import pytest
import torch
import torch.distributed as dist

from castalia.parallel import collectives
from castalia.parallel.testing import WorkerFailed, run_in_processes


def total_of_ranks(world, add):
    value = torch.tensor(float(world.rank + add))
    dist.all_reduce(value)
    return world.rank, value.item()


def fail(world, how):
    if world.rank == 1:
        if how == "raise":
            raise ArithmeticError("rank one has had enough")
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def never_end(world):
    if world.rank == 1:
        signal.pause()


def mirrored(world):
    """Each operation with a sum after it: the gradient of all ranks' sums together, by each rank's input."""
    group, out = dist.group.WORLD, {}
    for name in ("copy", "total", "gather_partial", "scatter_sum", "split", "gather"):
        x = (torch.arange(8.0).view(4, 2) + world.rank).requires_grad_()
        weight = torch.arange(1.0, 17.0).view(8, 2) * (world.rank + 1)
        operation = getattr(collectives, name)
        y = operation(x, group) if name in ("copy", "total") else operation(x, 0, group)
        (y * weight[: len(y)]).sum().backward()
        out[name] = (y.detach().tolist(), x.grad.tolist())
    return out


def test_results_come_by_rank():
    assert run_in_processes(2, total_of_ranks, 1) == [(0, 3.0), (1, 3.0)]


@pytest.mark.parametrize(
    ("how", "text"), [("raise", "ArithmeticError: rank one has had enough"), ("die", "exit code -9")]
)
def test_a_failing_rank_ends_the_others_and_is_named(how, text):
    with pytest.raises(WorkerFailed, match="rank 1 of 2 failed") as caught:
        run_in_processes(2, fail, how)
    assert text in str(caught.value) and caught.value.rank == 1


def test_a_rank_that_does_not_end_is_ended():
    with pytest.raises(WorkerFailed, match="rank 1 of 2 has not ended after 1 s"):
        run_in_processes(2, never_end, timeout=1)


def test_collectives_and_their_mirror_images():
    first, second = run_in_processes(2, mirrored)
    x = [torch.arange(8.0).view(4, 2) + r for r in range(2)]
    w = [torch.arange(1.0, 17.0).view(8, 2) * (r + 1) for r in range(2)]
    both = torch.cat(x)
    expected = {
        "copy": ([x[0], x[1]], [w[0][:4] + w[1][:4]] * 2),
        "total": ([x[0] + x[1]] * 2, [w[0][:4], w[1][:4]]),
        "gather_partial": ([both, both], [(w[0] + w[1])[:4], (w[0] + w[1])[4:]]),
        "scatter_sum": ([(x[0] + x[1])[:2], (x[0] + x[1])[2:]], [torch.cat([w[0][:2], w[1][:2]])] * 2),
        "split": ([x[0][:2], x[1][2:]], [torch.cat([w[0][:2], w[1][:2]])] * 2),
        "gather": ([both, both], [w[0][:4], w[1][4:]]),
    }
    for name, (values, gradients) in expected.items():
        for rank, got in enumerate((first, second)):
            assert torch.equal(torch.tensor(got[name][0]), values[rank]), (name, rank)
            assert torch.equal(torch.tensor(got[name][1]), gradients[rank]), (name, rank)


def test_one_process_needs_no_group():
    x = torch.ones(3)
    assert all(map(operator.is_, [collectives.copy(x, None), collectives.split(x, 0, None)], [x, x]))
