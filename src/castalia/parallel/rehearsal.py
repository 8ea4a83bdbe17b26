"""One rank of a world that does not exist: torch's fake processes and fake tensors, and what passes between ranks.

    rehearsed(rank, layout) ──> Mesh, as if 1,024 processes had met    tensors have shapes, dtypes, no data
       code of the engine ──> every operation of torch.distributed ──> Traffic by kind, group and dtype
                          ──> every tensor's storage ──> bytes alive, and the most of them

Collectives of the fake backend return at once and change nothing, which is right where nothing has a value.
What the code reads off a tensor (a loss, a count of tokens) is 1. A pipeline's stages are told the shapes that
their neighbours would have sent, and no initial weights are drawn: everything else is the code that trains.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from castalia.parallel.layout import Layout
from castalia.parallel.mesh import Mesh
from castalia.parallel.world import World

# Operation -> its name, and the share of its bytes that a rank sends in a ring of n (a send: all of them).
OPERATIONS: dict[str, tuple[str, Callable[[int], float]]] = {
    "allreduce_": ("all-reduce", lambda n: 2 * (n - 1) / n),
    "_allgather_base_": ("all-gather", lambda n: (n - 1) / n),
    "_reduce_scatter_base_": ("reduce-scatter", lambda n: (n - 1) / n),
    "alltoall_base_": ("all-to-all", lambda n: (n - 1) / n),
    "broadcast_": ("broadcast", lambda n: 1.0),
    "send": ("send", lambda n: 1.0),
}


@dataclass(frozen=True, order=True)
class Exchange:
    """What a group does together.

    Attributes:
        kind: of the operation.
        ranks: all ranks of the group.
        dtype: of its tensors, without `torch.`.
    """

    kind: str
    ranks: tuple[int, ...]
    dtype: str


@dataclass
class Traffic:
    """How often, and how much.

    Attributes:
        operations: issued.
        bytes: of the larger of input and output, summed over operations.
        sent: bytes of them that this rank sends, in a ring.
    """

    operations: int = 0
    bytes: int = 0
    sent: float = 0.0


class Counted(TorchDispatchMode):
    """Notes what passes between this rank and others; the tensors may be real or fake.

    Attributes:
        traffic: by what is exchanged, in the order of first use.
    """

    def __init__(self) -> None:
        super().__init__()
        self.traffic: dict[Exchange, Traffic] = {}

    @property
    def sent(self) -> float:
        """Bytes that this rank sends."""
        return sum(traffic.sent for traffic in self.traffic.values())

    @property
    def operations(self) -> int:
        """Operations in all."""
        return sum(traffic.operations for traffic in self.traffic.values())

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch wraps each call once more, which costs as much as the call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it turns itself into operations on its local tensor, which come here again
        if func.namespace == "c10d":
            self._note(func.__name__.split(".")[0], args)
        return self._call(func, args, kwargs or {})

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def _note(self, name: str, args: Any) -> None:
        if name not in OPERATIONS:
            return
        kind, share = OPERATIONS[name]
        tensors = [t for a in args[:2] for t in _flat(a) if isinstance(t, Tensor)]
        group = next(a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
        ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(group)))
        largest = max(tensors, key=lambda t: t.numel() * t.element_size())
        size = largest.numel() * largest.element_size()
        exchange = Exchange(kind, ranks, str(largest.dtype).removeprefix("torch."))
        traffic = self.traffic.setdefault(exchange, Traffic())
        traffic.operations += 1
        traffic.bytes += size
        traffic.sent += share(len(ranks)) * size


class Rehearsal(Counted):
    """A rank that is rehearsed.

    Attributes:
        mesh: the rank's groups.
        alive: bytes of all tensors' storages at this moment.
        peak: the most that there were at once since `begin`.
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.mesh, self.alive, self.peak = mesh, 0, 0
        self._held: dict[int, tuple[Any, int]] = {}

    def begin(self) -> None:
        """Forget the traffic and the peak of what was before: a step begins."""
        self.traffic = {}
        self.peak = self.alive

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is torch.ops.prim.device.default and type(args[0]) is FakeTensor:
            return args[0].fake_device
        tensors = [t for a in args for t in _flat(a) if isinstance(t, Tensor)]
        if tensors and not any(isinstance(t, FakeTensor) for t in tensors):  # a mesh's table of ranks
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return _one(args[0])
        out = func(*args, **kwargs)
        for item in _flat(out):
            for tensor in _flat(item):
                # What a sparse tensor holds was noted as the dense tensors that it was made of.
                if isinstance(tensor, Tensor) and tensor.device.type != "meta" and tensor.layout is torch.strided:
                    self.note(tensor.untyped_storage())
        return out

    def note(self, storage: Any) -> None:
        """A storage exists, or has another size."""
        key, size = storage._cdata, storage.nbytes()
        known = self._held.get(key)
        if known is None:
            self._held[key] = (weakref.ref(storage, lambda _: self._freed(key)), size)
            self.alive += size
        elif known[1] != size:
            self._held[key] = (known[0], size)
            self.alive += size - known[1]
        self.peak = max(self.peak, self.alive)

    def _freed(self, key: int) -> None:
        self.alive -= self._held.pop(key)[1]


@contextmanager
def rehearsed(
    rank: int, layout: Layout, hidden: tuple[int, int, int], dtype: torch.dtype = torch.float32
) -> Iterator[Rehearsal]:
    """Be one of so many processes for the time of the block; nothing else may have joined a job.

    Args:
        rank: of the process.
        layout: of the job, so also how many processes there are.
        hidden: shape of the hidden states that stages of a pipeline hand on, `[b, s, h]` of whole sequences.
        dtype: of these.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    resize = torch.UntypedStorage.resize_

    def resized(storage: Any, size: int) -> Any:
        out = resize(storage, size)
        if storage._cdata in here._held:
            here.note(storage)
        return out

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world)
    try:
        here = Rehearsal(Mesh(layout, World(rank, layout.world, torch.device("cpu"))))  # of numbers, not of fakes
        with ExitStack() as opened:
            opened.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")  # fake ones always do
            opened.enter_context(FakeTensorMode(allow_non_fake_inputs=True))  # slopes of ALiBi come from NumPy
            opened.enter_context(here)
            # Not a dispatched operation, and how FSDP2 frees gathered weights.
            opened.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", resized))
            opened.enter_context(mock.patch("castalia.parallel.parallelize.fill"))
            opened.enter_context(mock.patch.object(nn.Module, "to_empty", _to_empty))
            opened.enter_context(mock.patch.object(dist, "all_gather_object", _alike))
            if layout.pipeline > 1:
                _tell_shapes(opened, layout, hidden, dtype)
            yield here
    finally:
        dist.destroy_process_group()


def _tell_shapes(opened: ExitStack, layout: Layout, hidden: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Give the stages of a pipeline the shapes that each else learns from the one before, in a pass of its own."""
    from torch.distributed import pipelining
    from torch.distributed.pipelining import schedules
    from torch.distributed.pipelining._utils import InferenceMode

    rows, tokens, width = hidden
    tokens //= layout.context
    passed = torch.empty(rows, tokens // (layout.tensor if layout.sequence else 1), width, dtype=dtype)
    ids = torch.empty(rows, tokens, dtype=torch.int64)
    stage_class = pipelining.PipelineStage

    def stage(module: Any, number: int, total: int, device: torch.device, group: Any) -> Any:
        first, last = number == 0, number == total - 1
        given = ids if first else passed.detach().requires_grad_()
        # Behind the last norm the sequence is whole again.
        out = passed.new_empty(rows, tokens, width) if last else passed.detach()
        return stage_class(module, number, total, device, given, out.requires_grad_(), group=group)

    def agreed(schedule: Any, stages: Any, *_: Any) -> None:
        for stage in stages:
            stage._inference_mode = InferenceMode.STATIC

    opened.enter_context(mock.patch.object(pipelining, "PipelineStage", stage))
    opened.enter_context(mock.patch.object(schedules._PipelineSchedule, "_warmup_p2p", agreed))


def _to_empty(module: nn.Module, *, device: Any, recurse: bool = True) -> nn.Module:
    """As torch's, which would swap a fake parameter for another and cannot."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(module, FSDPModule):
        return module._apply(lambda t: torch.empty_like(t, device=device))
    for inner in module.modules():
        for name, p in inner._parameters.items():
            if p is not None:
                inner._parameters[name] = nn.Parameter(torch.empty_like(p, device=device), p.requires_grad)
        for name, b in inner._buffers.items():
            if b is not None:
                inner._buffers[name] = torch.empty_like(b, device=device)
    return module


def _alike(gathered: list[Any], value: Any, group: Any = None) -> None:
    """What all ranks of a group give, if they give what this one does."""
    gathered[:] = [value] * len(gathered)


def _one(tensor: Any) -> Any:
    """What is read off a tensor: the number that the code has put there itself, else 1."""
    known = getattr(tensor, "constant", None)
    if known is not None:
        return known.item()
    if tensor.dtype is torch.bool:
        return True
    return 1.0 if tensor.dtype.is_floating_point else 1


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
