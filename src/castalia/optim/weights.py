"""What holds the weights while they are trained.

A store owns the fp32 master weights (which are the module's own parameters), the gradients
and the optimizer. It lends *working* weights for a forward pass and takes their gradients:

    masters fp32 ──refresh──> working weights ──forward, backward──> their .grad
       ^                     (16-bit copies of the matrices)              │ collect()
       └──────── optimizer <──── gradients fp32 <─────────────────────────┘

`PlainStore` works parameter by parameter, and is what a sharded run uses. `ArenaStore` keeps
masters, gradients and moments as views into a few flat buffers, one per segment (parameters
that share decay, learning rate and dtype of their working copy), so that clipping and the update are a
handful of long kernels. The two agree to the rounding of a sum's order; a test holds them to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from castalia.config import OptimizerConfig
from castalia.errors import UserError
from castalia.optim.eight_bit import AdamW8bit
from castalia.optim.matrix import MatrixOptimizer, Whole
from castalia.optim.optimizers import Groups, Rule, by_rule, optimizer_kind, prepare_state

_NORM_ROW = 1 << 10
_ADD_CHUNK = 1 << 18


class WeightStore(Protocol):
    """What the step needs of whoever holds the weights."""

    optimizer: torch.optim.Optimizer

    def working(self) -> dict[str, Tensor]:
        """Weights for a forward pass, by canonical name; differentiable where gradients are on."""
        ...

    def prepare(self, first: bool, last: bool) -> None:
        """Say that the first, or the last, micro-batch of a step comes next."""
        ...

    def collect(self) -> None:
        """Add the gradients of the working weights to the accumulated ones."""
        ...

    def reduce(self) -> None:
        """After the last micro-batch: make the accumulated gradients those of the batch over all ranks."""
        ...

    def gradient_norm(self) -> Tensor:
        """Global L2 norm of the accumulated gradients, a fp32 scalar."""
        ...

    def step(self, lr: float, divisor: Tensor | None = None) -> None:
        """Update the masters with the accumulated gradients / divisor (clipping), then forget those."""
        ...

    def discard(self) -> None:
        """Forget the accumulated gradients; neither masters nor moments change."""
        ...

    def refresh(self) -> None:
        """Make the working copies agree with the masters, after those were written from outside."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """`model.<name>` and `optimizer.<name>.<moment>`: what a checkpoint holds, to read and to write in place."""
        ...

    def sink(self, name: str) -> Sink | None:
        """What takes a weight's gradient beside autograd, see Sink; None: this store has none for it."""
        ...

    def gradients(self) -> dict[str, Tensor]:
        """Accumulated gradients by name (views or copies), for inspection."""
        ...

    def so_far(self) -> dict[str, Tensor]:
        """This rank's part of the gradients accumulated so far, by name, in the middle of a step."""
        ...

    def squares_so_far(self) -> dict[str, float]:
        """Squared L2 norm of the gradients accumulated so far, by parameter, of this rank's replica of the model."""
        ...

    def squares(self) -> dict[str, float]:
        """Squared L2 norm of the accumulated gradients of the whole batch, by parameter."""
        ...

    def watch_first(self) -> None:
        """Say that `squares_so_far` will be asked for after the first micro-batch of each step."""
        ...

    def gradient_buffers(self) -> list[Tensor]:
        """The accumulated gradients in as few tensors as there are, to be summed over ranks in place."""
        ...

    def set_updates(self, done: int) -> None:
        """Tell the optimizer how many updates its moments have seen (bias correction)."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """While it lasts, the weights are their averages, where the optimizer keeps any."""
        ...

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What the optimizer changes, by name."""
        ...

    def reach(self, wholes: Mapping[Tensor, Whole]) -> None:
        """Say how parameters of which this store has a part are reached as a whole, before the first update."""
        ...


def make_store(model: nn.Module, cfg: OptimizerConfig, precision: str, arena: bool) -> WeightStore:
    """The store that the configuration asks for."""
    arena = arena and optimizer_kind(cfg).elementwise
    low = working_dtype(precision)
    return ArenaStore(model, cfg, low) if arena else PlainStore(model, cfg, low)


def working_dtype(precision: str) -> torch.dtype | None:
    """Dtype of the working copies of matrices under a `training.precision`; None: there are none, masters serve."""
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}[precision]


def low_precision_names(model: nn.Module) -> list[str]:
    """The matrices that matrix products read in low precision.

    Every one but embeddings that are only looked up, and the routers of experts: small, and a token whose
    best experts lie close would change its mind by rounding.
    """
    cfg = getattr(model, "cfg", None)  # a part of a model may lack the head
    tied = cfg.tie_embeddings if cfg else not any(name.startswith("head.") for name, _ in model.named_parameters())
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    if tied:
        tables.discard("embedding.weight")
    return [
        n for n, p in model.named_parameters() if p.ndim > 1 and n not in tables and not n.endswith("router.weight")
    ]


@torch.no_grad()
def l2_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Global L2 norm of some tensors, fp32.

    In short rows whose squares are summed in fp64: torch's own fp32 norm of a long vector on a CPU
    errs by up to a percent, which would clip differently from layout to layout.
    """
    total = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
    for tensor in tensors:
        total += sum_of_squares(tensor)
    return total.sqrt().float()


def sum_of_squares(tensor: Tensor) -> Tensor:
    """Of all elements: a fp64 scalar, as `l2_norm` takes it."""
    flat = tensor.reshape(-1)
    whole = flat.numel() // _NORM_ROW * _NORM_ROW
    total = flat[whole:].double().square().sum()
    if whole:
        total += torch.linalg.vector_norm(flat[:whole].view(-1, _NORM_ROW), dim=1).double().square().sum()
    return total


@torch.no_grad()
def squares_of(parts: Mapping[str, Tensor]) -> dict[str, float]:
    """Squared L2 norm of each tensor; a device is waited for once."""
    found = [sum_of_squares(part) for part in parts.values()]
    return dict(zip(parts, torch.stack(found).tolist() if found else [], strict=True))


def _add(total: Tensor, part: Tensor) -> None:
    """total += part, by way of a small fp32 scratch: torch's mixed-dtype add is three times slower on CPUs."""
    if part.dtype == total.dtype or total.device.type != "cpu":
        total.add_(part)
        return
    into, source = total.view(-1), part.reshape(-1)
    scratch = torch.empty(min(_ADD_CHUNK, into.numel()), dtype=total.dtype)
    for start in range(0, into.numel(), _ADD_CHUNK):
        piece = source[start : start + _ADD_CHUNK]
        into[start : start + _ADD_CHUNK].add_(scratch[: piece.numel()].copy_(piece))


class Sink:
    """Adds products to a matrix's accumulated gradient as they are made, without a copy on the way.

    Args:
        total: `[V, h]`, where the gradient accumulates.
    """

    def __init__(self, total: Tensor) -> None:
        self.total, self.empty, self.filled = total, True, False

    def add(self, e: Tensor, h: Tensor) -> None:
        """Add e^T h; e `[t, V]`, h `[t, hidden]`."""
        torch.addmm(self.total, e.T, h, beta=0 if self.empty else 1, out=self.total)
        self.empty, self.filled = False, True


class _Store:
    """What the two stores share."""

    def __init__(self, model: nn.Module, cfg: OptimizerConfig, low: torch.dtype | None) -> None:
        self._model, self._cfg, self._kind, self._low = model, cfg, optimizer_kind(cfg), low
        everything = dict(model.named_parameters())
        self._parameters = {n: p for n, p in everything.items() if p.requires_grad}
        if not self._parameters:
            raise UserError("every weight of the model is frozen: there is nothing to train")
        self._frozen = {n: p for n, p in everything.items() if not p.requires_grad}
        self._low_names = low_precision_names(model) if low else []
        self._refresh_frozen()
        self._rules = by_rule(self._parameters, cfg, getattr(model, "cfg", None))
        self.optimizer: torch.optim.Optimizer

    def prepare(self, first: bool, last: bool) -> None:
        """Nothing to do: one process gathers nothing."""

    def reduce(self) -> None:
        """Nothing to do: one process has the whole gradient."""

    def gradients(self) -> dict[str, Tensor]:
        """See WeightStore."""
        raise NotImplementedError

    def sink(self, name: str) -> Sink | None:
        """See WeightStore."""
        return None

    def watch_first(self) -> None:
        """Nothing to do: gradients accumulate here."""

    def so_far(self) -> dict[str, Tensor]:
        """See WeightStore."""
        return self.gradients()

    def squares_so_far(self) -> dict[str, float]:
        """See WeightStore."""
        return squares_of(self.so_far())

    def squares(self) -> dict[str, float]:
        """See WeightStore."""
        return squares_of(self.gradients())

    @torch.no_grad()
    def _refresh_frozen(self) -> None:
        """Working copies of the weights that are not trained; they are no part of the optimizer."""
        low = set(self._low_names)
        self._frozen_working = {n: p.to(self._low) if n in low else p for n, p in self._frozen.items()}

    def _masters(self) -> dict[str, Tensor]:
        """`model.<name>` of every weight, frozen ones too, as a checkpoint holds them."""
        return {f"model.{n}": p.detach() for n, p in (self.trained | self._frozen).items()}

    def _make_optimizer(self, groups: list[tuple[Rule, list[nn.Parameter]]]) -> None:
        made: Groups = [
            {"params": parameters, "weight_decay": rule.decay, "matrix": rule.matrix} for rule, parameters in groups
        ]
        self.optimizer, self._rates = self._kind.make(made, self._cfg), [rule.rate for rule, _ in groups]
        self._updates = 0
        prepare_state(self.optimizer, self._kind, self._cfg.average is not None)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What the optimizer changes, by name."""
        return self._parameters

    def reach(self, wholes: Mapping[Tensor, Whole]) -> None:
        """See WeightStore."""
        if isinstance(self.optimizer, MatrixOptimizer):
            self.optimizer.reach(wholes)
            prepare_state(self.optimizer, self._kind, self._cfg.average is not None)

    def _moments(self, parameter: Tensor) -> list[str]:
        """Names of the states of a parameter that a checkpoint holds."""
        return [n for n in self.optimizer.state[parameter] if n != "step"]

    @torch.no_grad()
    def _add_to_averages(self) -> None:
        """Exponential means of the weights; of the first updates they are plain means."""
        self._updates += 1
        if self._cfg.average is not None:
            share = max(1 - self._cfg.average, 1 / self._updates)
            states = self.optimizer.state
            torch._foreach_lerp_([s["average"] for s in states.values()], [p.detach() for p in states], share)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """See WeightStore."""
        pairs = [(p, s["average"]) for p, s in self.optimizer.state.items() if "average" in s]
        if not pairs or not self._updates:
            yield
            return
        self._exchange(pairs)
        try:
            yield
        finally:
            self._exchange(pairs)

    @torch.no_grad()
    def _exchange(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        for parameter, average in pairs:
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)
        self.refresh()

    def refresh(self) -> None:
        """See WeightStore."""
        raise NotImplementedError

    def _update(self, lr: float, divisor: Tensor | None, gradients: list[Tensor]) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = lr * rate
        divisor = None if divisor is None else divisor.to(gradients[0].device)
        if divisor is not None and getattr(self.optimizer, "_step_supports_amp_scaling", False):
            # Fused kernels divide on the way, as they do for a loss scaler: no extra pass over the gradients.
            self.optimizer.grad_scale = divisor  # type: ignore[attr-defined]
            self.optimizer.found_inf = torch.zeros_like(divisor)  # type: ignore[attr-defined]
            self.optimizer.step()
            del self.optimizer.grad_scale, self.optimizer.found_inf  # type: ignore[attr-defined]
        else:
            if divisor is not None:
                torch._foreach_div_(gradients, divisor)
            self.optimizer.step()
        self._add_to_averages()

    def set_updates(self, done: int) -> None:
        """See WeightStore."""
        self._updates = done
        for state in self.optimizer.state.values():
            state["step"].fill_(float(done))


class PlainStore(_Store):
    """Masters are separate parameters; 16-bit working weights are differentiable casts of them."""

    def __init__(self, model: nn.Module, cfg: OptimizerConfig, low: torch.dtype | None) -> None:
        super().__init__(model, cfg, low)
        self._make_optimizer([(rule, [self._parameters[n] for n in names]) for rule, names in self._rules])

    def working(self) -> dict[str, Tensor]:
        """See WeightStore."""
        low = set(self._low_names)
        trained = {n: p.to(self._low) if n in low else p for n, p in self._parameters.items()}
        return trained | self._frozen_working

    def collect(self) -> None:
        """Nothing to do: backward has accumulated into the masters' own fp32 gradients."""

    def _grads(self) -> list[Tensor]:
        return [p.grad for p in self._parameters.values() if p.grad is not None]

    def gradient_buffers(self) -> list[Tensor]:
        """See WeightStore."""
        return self._grads()

    def gradient_norm(self) -> Tensor:
        """See WeightStore."""
        return l2_norm(self._grads())

    def step(self, lr: float, divisor: Tensor | None = None) -> None:
        """See WeightStore."""
        self._update(lr, divisor, self._grads())
        self.optimizer.zero_grad(set_to_none=True)

    def discard(self) -> None:
        """See WeightStore."""
        self.optimizer.zero_grad(set_to_none=True)

    def refresh(self) -> None:
        """Of use to frozen weights alone: the others' casts are made anew for each forward pass."""
        self._refresh_frozen()

    def tensors(self) -> dict[str, Tensor]:
        """See WeightStore."""
        out = self._masters()
        if isinstance(self.optimizer, AdamW8bit):
            self.optimizer.unpack_states()
        for n, p in self.trained.items():
            out |= {f"optimizer.{n}.{m}": self.optimizer.state[p][m] for m in self._moments(p)}
        return out

    def gradients(self) -> dict[str, Tensor]:
        """See WeightStore."""
        return {n: p.grad for n, p in self._parameters.items() if p.grad is not None}


class _Segment:
    """Parameters that share their rule and working dtype, end to end in flat buffers."""

    def __init__(
        self, names: list[str], parameters: dict[str, nn.Parameter], rule: Rule, low: torch.dtype | None, wide: bool
    ) -> None:
        self.names, self.rule, self.low = names, rule, low
        self.shapes = [parameters[n].shape for n in names]
        self.sizes = [parameters[n].numel() for n in names]
        first = parameters[names[0]]
        self.master = nn.Parameter(torch.empty(sum(self.sizes), dtype=torch.float32, device=first.device))
        self.gradient = torch.zeros_like(self.master)
        self.master.grad = self.gradient
        self.copy = None if low is None else torch.empty_like(self.master, dtype=torch.float32 if wide else low)
        with torch.no_grad():
            for name, view in self.views(self.master.detach()):
                view.copy_(parameters[name])
                parameters[name].data = view
        self.working = {
            n: (parameters[n] if self.copy is None else v.requires_grad_())
            for n, v in self.views(self.master.detach() if self.copy is None else self.copy)
        }
        self.gradient_views = [v for _, v in self.views(self.gradient)]

    def refresh(self) -> None:
        """Make the copy that of the master, rounded to 16 bits."""
        if self.copy is None or self.low is None:
            return
        if self.copy.dtype == self.low:
            self.copy.copy_(self.master)
            return
        scratch = torch.empty(min(_ADD_CHUNK, self.copy.numel()), dtype=self.low)
        for into, source in zip(self.copy.split(_ADD_CHUNK), self.master.split(_ADD_CHUNK), strict=True):
            into.copy_(scratch[: len(into)].copy_(source))

    def views(self, flat: Tensor) -> Iterable[tuple[str, Tensor]]:
        """Name and shaped view of each parameter's stretch of a flat buffer."""
        pieces = flat.split(self.sizes)
        return zip(self.names, (p.view(s) for p, s in zip(pieces, self.shapes, strict=True)), strict=True)


class ArenaStore(_Store):
    """Masters, gradients, moments and 16-bit copies in flat buffers; parameters are views of the masters.

    Where fp32 products multiply 16-bit matrices (castalia.model.kernels), copies hold the rounded numbers in fp32.
    """

    def __init__(self, model: nn.Module, cfg: OptimizerConfig, low: torch.dtype | None) -> None:
        super().__init__(model, cfg, low)
        low_names = set(self._low_names)
        wide = getattr(model, "matmul", "native") == "fp32"
        self._segments = []
        for rule, names in self._rules:
            for is_low in (True, False):
                members = [n for n in names if (n in low_names) is is_low]
                if members:
                    self._segments.append(_Segment(members, self._parameters, rule, low if is_low else None, wide))
        self._make_optimizer([(s.rule, [s.master]) for s in self._segments])
        self._empty = True
        self._places = {n: (s, i) for s in self._segments for i, n in enumerate(s.names)}
        self._sinks: dict[str, Sink] = {}
        self._rows: list[Tensor] | None = None
        self.refresh()

    @property
    def takes_rows(self) -> bool:
        """Whether the embedding may have a gradient of the rows that were looked up alone: it does nothing else."""
        alone = getattr(self._model, "head", None) is not None and "embedding.weight" in self._places
        return alone and self._segments[0].master.device.type == "cpu"

    def sink(self, name: str) -> Sink | None:
        """See WeightStore: for fp32 matrices on a CPU."""
        segment, number = self._places.get(name, (None, 0))
        if segment is None or segment.master.device.type != "cpu" or segment.working[name].dtype != torch.float32:
            return None
        return self._sinks.setdefault(name, Sink(segment.gradient_views[number]))

    def working(self) -> dict[str, Tensor]:
        """See WeightStore."""
        return {n: w for s in self._segments for n, w in s.working.items()} | self._frozen_working

    @torch.no_grad()
    def collect(self) -> None:
        """See WeightStore; the sum over micro-batches is fp32 whatever the working dtype."""
        totals, parts = [], []
        for segment in self._segments:
            for (name, tensor), total in zip(segment.working.items(), segment.gradient_views, strict=True):
                part, sink = tensor.grad, self._sinks.get(name)
                filled = sink is not None and sink.filled
                if part is None and not filled:
                    raise RuntimeError(f"no gradient reached {name}: a part of the model is not used in its forward")
                tensor.grad = None
                if part is None:
                    pass
                elif part.is_sparse:
                    self._add_rows(total, part)
                elif self._empty and not filled:
                    totals.append(total)
                    parts.append(part)
                else:
                    _add(total, part)
        if totals:
            torch._foreach_copy_(totals, parts)
        self._empty = False
        for sink in self._sinks.values():
            sink.empty = sink.filled = False

    def _add_rows(self, total: Tensor, part: Tensor) -> None:
        """Add a gradient of some rows; those of the step before are emptied, if no one else can have written others."""
        rows, values = part._indices()[0], part._values()
        if self._empty:
            for old in self._rows if self._rows is not None else [slice(None)]:
                total[old] = 0.0
            self._rows = []
        if self._rows is not None:
            self._rows.append(rows)
        total.index_add_(0, rows, values)

    def _forget(self) -> None:
        """The next gradient begins a new sum."""
        self._empty = True
        for sink in self._sinks.values():
            sink.empty, sink.filled = True, False

    def gradient_norm(self) -> Tensor:
        """See WeightStore."""
        return l2_norm([s.gradient for s in self._segments])

    @torch.no_grad()
    def step(self, lr: float, divisor: Tensor | None = None) -> None:
        """See WeightStore."""
        self._update(lr, divisor, [s.gradient for s in self._segments])
        self._forget()
        self._refresh_copies()

    def discard(self) -> None:
        """See WeightStore; the next collect() overwrites what the buffers hold."""
        self._forget()

    def refresh(self) -> None:
        """See WeightStore."""
        self._refresh_copies()
        self._refresh_frozen()

    @torch.no_grad()
    def _refresh_copies(self) -> None:
        for segment in self._segments:
            segment.refresh()

    def tensors(self) -> dict[str, Tensor]:
        """See WeightStore."""
        out = self._masters()
        for segment in self._segments:
            for moment in self._moments(segment.master):
                flat = self.optimizer.state[segment.master][moment]
                out |= {f"optimizer.{n}.{moment}": v for n, v in segment.views(flat)}
        return out

    def gradient_buffers(self) -> list[Tensor]:
        """See WeightStore."""
        self._rows = None  # whoever asks may write
        return [segment.gradient for segment in self._segments]

    def gradients(self) -> dict[str, Tensor]:
        """See WeightStore."""
        self._rows = None
        return {n: v for s in self._segments for n, v in zip(s.names, s.gradient_views, strict=True)}
