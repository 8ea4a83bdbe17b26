"""1-bit Adam among simulated workers, each a thread, against the paper's recurrence written out in numpy."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

from castalia.config import OptimizerConfig
from castalia.optim.one_bit import SKETCH, OneBitAdam, compress, expand, reach, sketch
from castalia.optim.optimizers import optimizer_kind, prepare_state

A = np.ndarray
BETAS, EPS, DECAY, FREEZE, STEPS = (0.5, 0.99), 1e-8, 0.1, 20, 50


class Table:
    """Where so many workers meet: each lays something down, and takes what all have laid down."""

    def __init__(self, ranks: int) -> None:
        self.barrier, self.laid = threading.Barrier(ranks, timeout=60), dict[int, torch.Tensor]()


class Worker:
    """Peers in one process."""

    def __init__(self, table: Table, rank: int, ranks: int) -> None:
        self._table, self.rank, self.ranks = table, rank, ranks

    def _all(self, mine: torch.Tensor) -> list[torch.Tensor]:
        self._table.laid[self.rank] = mine
        self._table.barrier.wait()
        found = [self._table.laid[i] for i in range(self.ranks)]
        self._table.barrier.wait()
        return found

    def swap(self, parts: torch.Tensor) -> torch.Tensor:
        return torch.stack([theirs[self.rank] for theirs in self._all(parts)])

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._all(part))


def gradient(p: A, worker: int, step: int) -> A:
    """A bowl's, with noise of the worker's own."""
    noise = np.random.default_rng([worker, step]).normal(size=p.shape)
    return p + 0.3 + noise


def start(shape: tuple[int, ...]) -> A:
    return np.random.default_rng(0).normal(size=shape)


def rate(step: int) -> float:
    return 0.01 * (1 + step % 3)


def compressed(x: A) -> A:
    """Of each row the signs, times the row's root mean square."""
    return np.where(x >= 0, 1.0, -1.0) * np.sqrt((x**2).mean(-1, keepdims=True))


def paper(p: A, workers: int) -> list[A]:
    """Algorithm 1 of Tang et al. 2021. All servers together hold one error, shaped as the matrix."""
    b1, b2 = BETAS
    m, v, path = np.zeros_like(p), np.zeros_like(p), []
    errors, server = [np.zeros_like(p) for _ in range(workers)], np.zeros_like(p)
    for t in range(STEPS):
        grads = [gradient(p, i, t) for i in range(workers)]
        if t < FREEZE:
            g = sum(grads) / workers
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        else:
            sent = []
            for i, g in enumerate(grads):
                local = b1 * m + (1 - b1) * g + errors[i]
                sent.append(compressed(local))
                errors[i] = local - sent[i]
            mean = sum(sent) / workers + server
            m = compressed(mean)
            server = mean - m
        update = m / (np.sqrt(v) + EPS)
        assert np.abs(update).max() < reach(*BETAS)  # else this is no longer the paper's
        p = p - rate(t) * (update + DECAY * p)
        path.append(p)
    return path


def made(p: torch.nn.Parameter, **settings: Any) -> OneBitAdam:
    cfg = OptimizerConfig(type="onebit_adam", betas=list(BETAS), eps=EPS, freeze_step=FREEZE, **settings)
    kind = optimizer_kind(cfg)
    optimizer = kind.make([{"params": [p], "weight_decay": DECAY, "matrix": p.ndim > 1}], cfg)
    prepare_state(optimizer, kind)
    assert isinstance(optimizer, OneBitAdam)
    return optimizer


def simulated(shape: tuple[int, ...], workers: int) -> tuple[list[list[A]], list[OneBitAdam]]:
    """The paths of all workers, and their optimizers in the end."""
    table, paths, optimizers, raised = Table(workers), [[] for _ in range(workers)], {}, []

    def work(rank: int) -> None:
        try:
            p = torch.nn.Parameter(torch.from_numpy(start(shape).copy()))
            optimizer = optimizers[rank] = made(p)
            optimizer.connect(Worker(table, rank, workers))
            for t in range(STEPS):
                shares = [gradient(p.detach().numpy(), i, t) / workers for i in range(workers)]
                p.grad = torch.from_numpy(shares[rank] if p in optimizer.exchanged else sum(shares))
                optimizer.param_groups[0]["lr"] = rate(t)
                optimizer.step()
                paths[rank].append(p.detach().numpy().copy())
        except BaseException as error:
            raised.append(error)
            table.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]
    return paths, [optimizers[rank] for rank in range(workers)]


@pytest.mark.parametrize(("shape", "workers"), [((5, 12), 2), ((4, 9), 3), ((2, 3, 8), 4), ((3, 10), 5)])
def test_workers_follow_the_paper(shape: tuple[int, ...], workers: int) -> None:
    expected = paper(start(shape), workers)
    for path in simulated(shape, workers)[0]:
        for mine, theirs in zip(path, expected, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-9)


def test_vectors_stay_with_adam() -> None:
    path, _ = simulated((7,), 2)
    p, m, v = start((7,)), np.zeros(7), np.zeros(7)
    for t in range(STEPS):
        g = (gradient(p, 0, t) + gradient(p, 1, t)) / 2
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g**2
        p = p - rate(t) * (m / (np.sqrt(v) + EPS) + DECAY * p)
    np.testing.assert_allclose(path[0][-1], p, rtol=0, atol=1e-12)


def test_a_thirty_second_of_the_bytes_is_sent() -> None:
    """A ring sums 4 bytes an element by sending 2 (n - 1) / n of them; here it is a bit, and a scale for each row."""
    workers, shape = 4, (8, 1024)
    _, optimizers = simulated(shape, workers)
    elements = shape[0] * shape[1]
    summed = 2 * (workers - 1) / workers * 4 * elements * (STEPS - FREEZE)
    scales = 2 * (workers - 1) / workers * 8 * shape[0] * (STEPS - FREEZE)  # fp64 here
    assert {optimizer.sent for optimizer in optimizers} == {summed / 32 + scales}


def test_what_the_warm_up_never_moved_does_not_leap() -> None:
    """A variance of zero would make steps of scale / eps."""
    p = torch.nn.Parameter(torch.zeros(2, 8))
    optimizer = made(p)
    optimizer.param_groups[0] |= {"lr": 0.1, "weight_decay": 0.0}
    for t in range(FREEZE + 1):
        p.grad = torch.ones(2, 8)
        if t < FREEZE:
            p.grad[1] = 0
        before = p.detach().clone()
        optimizer.step()
    torch.testing.assert_close(p.detach()[1], torch.full((8,), -0.1 * reach(*BETAS)))
    assert ((p.detach() - before).abs()[0] < 0.1 * reach(*BETAS)).all()


@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 13), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_compressed_keeps_signs_and_norms_of_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    x[..., 0, 0] = 0.0
    packed = compress(x)
    assert packed.shape == (*shape[:-2], shape[-2] * (dtype.itemsize + -(-shape[-1] // 8)))
    back = expand(packed, shape[-1], dtype)
    np.testing.assert_allclose(back.numpy(), compressed(x.numpy()), rtol=1e-6)


def test_a_sketch_knows_the_norm_of_a_sum_of_which_nobody_has_more_than_a_share() -> None:
    generator = torch.Generator().manual_seed(2)
    shapes = ((700, 900), (1500, 1300), (5000,))
    shares = [[torch.randn(shape, generator=generator) + 0.3 for shape in shapes] for _ in range(2)]
    whole = sum((a + b).double().square().sum() for a, b in zip(*shares, strict=True))
    estimate = (sketch(shares[0]) + sketch(shares[1])).square().sum()
    assert abs(estimate / whole - 1) < 4 * (2 / SKETCH) ** 0.5
    single = torch.zeros(10)
    single[3] = 2.5
    assert sketch([single]).square().sum() == 6.25


def test_betas_that_bound_no_update_are_refused() -> None:
    with pytest.raises(ValueError, match="betas"):
        OptimizerConfig(type="onebit_adam", betas=[0.9, 0.8])
    with pytest.raises(ValueError, match="freeze_step"):
        OptimizerConfig(type="adamw", freeze_step=3)
