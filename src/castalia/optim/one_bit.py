"""1-bit Adam (Tang et al. 2021): after some updates of Adam, ranks exchange signs of momenta and a scale for each row.

    rank i   b1 M + (1 - b1) g_i, + its error ──signs, scales──> rows of rank r ──┐  all-to-all
    rank r   mean over all ranks, + its error ──signs, scales──> all ranks: M   <─┘  all-gather
    update   p <- (1 - lr wd) p - lr M / (sqrt(v) + eps), v as it was after `freeze_step` updates

What a compression loses is added before the next one, at both ends. As in the paper there is no bias correction.
Two things keep it safe where a variance says little. Rows have scales of their own, so that a rare token's row is not
moved by the size of others. And M / (sqrt(v) + eps) is held within what Adam itself can reach, whose v would have
grown: without that, an element whose gradient was zero in the warm-up would leap. Vectors, which weigh
nothing, are averaged in fp32 and stay with Adam.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from math import prod, sqrt
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from castalia.optim.elementwise import Group, RecurrentOptimizer, State

ERRORS = ("worker_error", "server_error")
"""States that are each rank's own: `[1, *shape]` of its momenta, `[rows it serves, columns]` of the means it makes."""

SKETCH = 1 << 12
"""Numbers that stand for a gradient in `sketch`: its norm is then right to about 1 / sqrt(2 * this), a percent."""
_SIGNS = 1 << 20


class Peers(Protocol):
    """The ranks that see other tokens with the same weights."""

    ranks: int
    rank: int

    def swap(self, parts: Tensor) -> Tensor:
        """uint8 `[ranks, n]`, a row for each rank -> uint8 `[ranks, n]`, a row from each rank."""
        ...

    def gather(self, part: Tensor) -> Tensor:
        """uint8 `[n]` -> uint8 `[ranks, n]`, the parts of all ranks on each."""
        ...


def compress(x: Tensor) -> Tensor:
    """Rows as signs and one scale, their root mean square, which keeps their norm.

    Args:
        x: `[..., rows, columns]`.

    Returns:
        uint8 `[..., rows * (bytes of a number + columns / 8)]`: all scales in x's dtype, then a bit for each
        element, the first one highest; 1 means not negative.
    """
    scale = x.square().mean(-1).sqrt().contiguous().view(torch.uint8)
    bits = F.pad((x >= 0).to(torch.uint8), (0, -x.shape[-1] % 8)).unflatten(-1, (-1, 8))
    packed = (bits << _places(x.device)).sum(-1, dtype=torch.uint8)
    return torch.cat([scale, packed.flatten(-2)], -1)


def expand(packed: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """What `compress` kept: `[..., rows, columns]`."""
    size = dtype.itemsize
    rows = packed.shape[-1] // (size + -(-columns // 8))
    scale = packed[..., : rows * size].clone(memory_format=torch.contiguous_format).view(dtype)
    bits = (packed[..., rows * size :].unflatten(-1, (rows, -1)).unsqueeze(-1) >> _places(packed.device)) & 1
    return (2 * bits.flatten(-2)[..., :columns].to(dtype) - 1) * scale.unsqueeze(-1)


def _places(device: torch.device) -> Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=device)


class OneBitAdam(RecurrentOptimizer):
    """See above. Alone it exchanges nothing, and so compresses nothing: Adam with a variance that is frozen.

    Gradients are this rank's share of the mean gradient: once `compresses`, not summed over ranks, but for vectors.

    Attributes:
        sent: bytes that this rank has given to others in exchanges of compressed momenta.
    """

    def __init__(self, groups: list[dict[str, Any]], **defaults: Any) -> None:
        super().__init__(groups, **{"matrix": True, **defaults})
        self._peers: Peers | None = None
        self.sent = 0

    def connect(self, peers: Peers) -> None:
        """Say who the others are, before a checkpoint is read and before the first update."""
        self._peers = peers
        for parameter, _ in self._matrices():
            columns, each = parameter.shape[-1], self._rows_each(parameter)
            self.state[parameter] |= {
                "worker_error": torch.zeros_like(parameter).unsqueeze(0),
                "server_error": torch.zeros(each, columns, dtype=parameter.dtype, device=parameter.device),
            }

    @property
    def compresses(self) -> bool:
        """Whether the next update exchanges compressed momenta."""
        if self._peers is None:
            return False
        return any(float(self.state[p]["step"]) >= group["freeze_step"] for p, group in self._matrices())

    @property
    def exchanged(self) -> set[Tensor]:
        """The parameters whose gradients the next update expects to be this rank's alone."""
        return {p for p, _ in self._matrices()} if self.compresses else set()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter; a collective operation once it compresses."""
        if self.compresses:
            self._exchange()
        super().step()

    def update(self, parameter: Tensor, gradient: Tensor, state: State, group: Group) -> None:
        """See RecurrentOptimizer; exchanged momenta are already the new ones."""
        first, second = group["betas"]
        frozen = group["matrix"] and float(state["step"]) > group["freeze_step"]
        if not frozen or self._peers is None:
            state["exp_avg"].lerp_(gradient, 1 - first)
        if not frozen:
            state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        towards = state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(group["eps"])
        if frozen:
            most = reach(first, second)
            towards.clamp_(-most, most)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(towards, alpha=-group["lr"])

    def _matrices(self) -> list[tuple[Tensor, Group]]:
        return [(p, group) for group in self.param_groups if group["matrix"] for p in group["params"]]

    def _rows_each(self, parameter: Tensor) -> int:
        """Rows that each rank serves; the last ranks' may be padding."""
        return -(-prod(parameter.shape[:-1]) // self._peers.ranks) if self._peers else 0

    def _exchange(self) -> None:
        """Replace each matrix's momentum by the compressed mean of all ranks' new ones."""
        assert self._peers is not None
        ranks, matrices = self._peers.ranks, self._matrices()
        parts = [self._compress_own(p, group["betas"][0]) for p, group in matrices]
        sizes = [part.shape[-1] for part in parts]
        arrived = self._peers.swap(torch.cat(parts, -1))
        means = [self._compress_mean(p, a) for (p, _), a in zip(matrices, arrived.split(sizes, -1), strict=True)]
        mine = torch.cat(means)
        everywhere = self._peers.gather(mine)
        for (parameter, _), packed in zip(matrices, everywhere.split(sizes, -1), strict=True):
            self.state[parameter]["exp_avg"].copy_(self._whole(parameter, packed))
        self.sent += 2 * (ranks - 1) * mine.numel()

    def _compress_own(self, parameter: Tensor, first: float) -> Tensor:
        """This rank's new momentum, `[ranks, bytes]`; what is lost of it is kept."""
        assert self._peers is not None
        state, ranks = self.state[parameter], self._peers.ranks
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        exact = torch.lerp(ranks * gradient, state["exp_avg"], first).add_(state["worker_error"][0])
        rows = exact.reshape(-1, parameter.shape[-1])
        padded = F.pad(rows, (0, 0, 0, ranks * self._rows_each(parameter) - len(rows)))
        packed = compress(padded.unflatten(0, (ranks, -1)))
        state["worker_error"][0].copy_(exact.sub_(self._whole(parameter, packed)))
        return packed

    def _compress_mean(self, parameter: Tensor, arrived: Tensor) -> Tensor:
        """The mean of what all ranks have sent of the rows served here, `[bytes]`; what is lost of it is kept."""
        error, columns = self.state[parameter]["server_error"], parameter.shape[-1]
        exact = error.clone()
        for theirs in arrived:
            exact.add_(expand(theirs, columns, error.dtype), alpha=1 / len(arrived))
        packed = compress(exact)
        error.copy_(exact.sub_(expand(packed, columns, error.dtype)))
        return packed

    def _whole(self, parameter: Tensor, packed: Tensor) -> Tensor:
        """All rows, `[ranks, bytes]`, in the parameter's shape."""
        rows = expand(packed, parameter.shape[-1], parameter.dtype).flatten(0, 1)
        return rows[: prod(parameter.shape[:-1])].view(parameter.shape)


def reach(first: float, second: float) -> float:
    """The largest m / sqrt(v) of Adam without bias correction, by Cauchy and Schwarz: finite as first^2 < second."""
    return (1 - first) / sqrt((1 - second) * (1 - first**2 / second))


@torch.no_grad()
def sketch(tensors: Iterable[Tensor]) -> Tensor:
    """fp64 `[SKETCH]`, a linear function of the tensors whose squared norm estimates theirs without bias.

    Each element is added to one of the numbers under a pseudo-random sign (Alon, Matias & Szegedy 1996; Charikar et
    al. 2002). Being linear, sketches of ranks' shares add up to that of the whole gradient, which no rank has.
    """
    draw, signs, total = random.Random(0), torch.empty(0), torch.empty(0)
    for tensor in tensors:
        if not len(signs):
            generator = torch.Generator().manual_seed(0)
            signs = (2.0 * torch.randint(2, (_SIGNS,), generator=generator) - 1).to(tensor.device)
            total = torch.zeros(SKETCH, dtype=torch.float64, device=tensor.device)
        for block in tensor.reshape(-1).split(_SIGNS):
            signed = F.pad(block * signs[: len(block)], (0, -len(block) % SKETCH))
            # Blocks share their signs, so each is turned and flipped as no other one.
            sums = signed.view(-1, SKETCH).sum(0, dtype=torch.float64).roll(draw.randrange(SKETCH))
            total.add_(sums, alpha=draw.choice((-1, 1)))
    return total
