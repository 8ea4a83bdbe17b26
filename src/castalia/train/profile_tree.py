"""What the watches of a step have seen -> a tree of modules with sums, as text and as JSON.

    seconds, FLOPs, bytes, parameters of each module by itself ─> Part(own + parts below) ─> lines, an object

`merged` makes one of the layers that have the same modules, which is what a page of a terminal holds: the tree then has
the parts of a layer, summed over all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from castalia.model.size import ModelSize
from castalia.train.profile_modules import HEAD, PHASES, ModuleWatch

Amounts = dict[str, float]


@dataclass
class Part:
    """A module of the model, with all that it holds.

    Attributes:
        path: its name in the model; "" is the model.
        kind: its class.
        parameters: numbers that are trained or frozen in it, shared ones once.
        calls: of its forward pass in the step, those that compute again not counted.
        seconds, flops: in the step, by phase: forward, backward, recompute.
        kept: bytes that wait for the backward pass, of one micro-batch.
        parts: the modules inside; what they lack of the sums is the module's own.
    """

    path: str
    kind: str
    parameters: int = 0
    calls: int = 0
    seconds: Amounts = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    flops: Amounts = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    kept: int = 0
    parts: list[Part] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The last of its path."""
        return self.path.rsplit(".", 1)[-1] or "model"

    def measure(self, what: str) -> float:
        """One number: a column of the table, such as `seconds`, `forward_seconds`, `flops`, `kept`."""
        if what in ("seconds", "flops"):
            return sum(getattr(self, what).values())
        phase, _, rest = what.partition("_")
        return float(getattr(self, rest)[phase] if rest else getattr(self, what))

    def walk(self, depth: int | None = None, level: int = 0) -> Iterator[tuple[int, Part]]:
        """This and everything below, down to a depth, each with its level."""
        yield level, self
        if depth is None or level < depth:
            for part in self.parts:
                yield from part.walk(depth, level + 1)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "path": self.path,
            "kind": self.kind,
            "parameters": self.parameters,
            "calls": self.calls,
            "seconds": self.seconds,
            "flops": self.flops,
            "kept_bytes": self.kept,
            "parts": [part.as_dict() for part in self.parts],
        }


def part_of(values: dict[str, Any]) -> Part:
    """What `as_dict` has written."""
    more = {"kept": values["kept_bytes"], "parts": [part_of(part) for part in values["parts"]]}
    return Part(**{k: v for k, v in values.items() if k not in ("kept_bytes", "parts")} | more)


@dataclass
class Profile:
    """What was measured of one step.

    Attributes:
        name, device, precision, data: what was run, and over which tokens.
        micro_batches, sequences, tokens: of the step, on this process.
        root: the model.
        phases: seconds of the step by phase.
        step_seconds: of a step with no clocks inside; `clocked_seconds` of the one that was measured.
        plan_flops: of the step, as `castalia plan` reckons them.
        state_bytes: of weights, gradients, optimizer and 16-bit copies.
        peak_bytes: that the process, or the device, has held.
        notes: what else is to be said.
    """

    name: str
    device: str
    precision: str
    data: str
    micro_batches: int
    sequences: int
    tokens: int
    root: Part
    phases: dict[str, float]
    step_seconds: float
    clocked_seconds: float
    plan_flops: int
    state_bytes: dict[str, int]
    peak_bytes: int
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {"profile": 1} | vars(self) | {"root": self.root.as_dict()}


def read_profile(values: dict[str, Any]) -> Profile:
    """What `as_dict` has written."""
    return Profile(**{k: v for k, v in values.items() if k != "profile"} | {"root": part_of(values["root"])})


def state_of(size: ModelSize) -> dict[str, int]:
    """Bytes that are there whatever the batch."""
    return {
        "weights": size.weight_bytes,
        "gradients": size.gradient_bytes,
        "optimizer": size.optimizer_bytes,
        "16-bit copies": size.working_bytes,
    }


def tree(model: nn.Module, timed: ModuleWatch, counted: ModuleWatch) -> Part:
    """The model's tree from a pass with a clock and one that counted, without modules that were not called."""
    found = {name: Part(name, type(module).__name__) for name, module in model.named_modules()}
    found.setdefault(HEAD, Part(HEAD, "Linear"))
    found[HEAD].kind += " + loss"
    for name, parameter in model.named_parameters():
        found[name.rpartition(".")[0]].parameters += parameter.numel()
    for name, calls in timed.calls.items():
        found[name].calls = calls
    for (name, phase), seconds in timed.seconds().items():
        found[name].seconds[phase] += seconds
    for (name, phase), flops in counted.flops.items():
        found[name].flops[phase] += int(flops)
    for name, kept in counted.kept.items():
        found[name].kept += kept
    # Deepest first, so that what is added to a module's parent is complete.
    for name in sorted(found, key=lambda n: (-n.count("."), not n)):
        part = found[name]
        if name and (part.calls or part.parts or part.parameters):
            above = found[name.rpartition(".")[0]]
            above.parts.append(part)
            _add(above, part)
    order = {name: i for i, name in enumerate(found)}
    for part in found.values():
        part.parts.sort(key=lambda inner: order[inner.path] if inner.path != HEAD else len(order))
    return found[""]


def _add(to: Part, part: Part) -> None:
    to.parameters += part.parameters
    to.kept += part.kept
    for phase in PHASES:
        to.seconds[phase] += part.seconds[phase]
        to.flops[phase] += part.flops[phase]


def merged(part: Part) -> Part:
    """The same tree, where modules of a list that are alike are one, called `first-last`."""
    inner = [merged(p) for p in part.parts]
    if part.kind == "ModuleList":
        groups: dict[Any, list[Part]] = {}
        for p in inner:
            groups.setdefault(_shape(p), []).append(p)
        inner = [_together(alike) for alike in groups.values()]
    out = Part(part.path, part.kind, part.parameters, part.calls, dict(part.seconds), dict(part.flops), part.kept)
    out.parts = inner
    return out


def _shape(part: Part) -> Any:
    return part.kind, part.parameters, tuple((p.name, _shape(p)) for p in part.parts)


def _together(alike: Sequence[Part]) -> Part:
    """One part of several with the same modules."""
    if len(alike) == 1:
        return alike[0]
    head, _, first = alike[0].path.rpartition(".")
    out = _sum(alike, f"{head}.{first}-{alike[-1].name}")
    out.kind = f"{len(alike)} x {out.kind}"
    return out


def _sum(alike: Sequence[Part], path: str) -> Part:
    out = Part(path, alike[0].kind, calls=sum(part.calls for part in alike))
    for part in alike:
        _add(out, part)
    rows = zip(*(part.parts for part in alike), strict=True)
    out.parts = [_sum(row, f"{path}.{row[0].name}") for row in rows]
    return out


HEADINGS = ("parameters", "share", "forward", "backward", "GFLOPs fwd", "bwd", "GFLOP/s", "kept MiB")


def lines(root: Part, depth: int | None = None) -> list[str]:
    """The tree for a terminal: parameters, share of the time, ms and FLOPs forward and backward, rate, bytes kept.

    What a layer computes again counts as backward there, where it happens.
    """
    rows = [(("  " * level) + part.name, part) for level, part in root.walk(depth)]
    width = max(max(len(label) for label, _ in rows), len("module"))
    kinds = max(len(part.kind) for _, part in rows)
    out = [f"{'module':<{width}}  {'':<{kinds}}" + "".join(f"  {h:>10}" for h in HEADINGS)]
    whole = root.measure("seconds") or 1.0
    for label, part in rows:
        seconds, flops = part.measure("seconds"), part.measure("flops")
        cells = (
            f"{part.parameters:,}" if part.parameters < 1e9 else f"{part.parameters / 1e9:.2f}G",
            f"{100 * seconds / whole:.1f}%",
            f"{1e3 * part.seconds['forward']:.2f} ms",
            f"{1e3 * (seconds - part.seconds['forward']):.2f} ms",
            _giga(part.flops["forward"]),
            _giga(flops - part.flops["forward"]),
            f"{flops / seconds / 1e9:.1f}" if seconds and flops else "",
            f"{part.kept / 2**20:.1f}" if part.kept else "",
        )
        out.append(f"{label:<{width}}  {part.kind:<{kinds}}" + "".join(f"  {cell:>10}" for cell in cells))
    return out


def top(root: Part, count: int) -> list[str]:
    """The modules whose own work takes most of the time, those that only hold others left out."""
    whole = root.measure("seconds") or 1.0
    own = [(part.measure("seconds") - sum(p.measure("seconds") for p in part.parts), part) for _, part in root.walk()]
    chosen = sorted(own, key=lambda pair: -pair[0])[:count]
    return [f"{100 * s / whole:5.1f}%  {1e3 * s:10.2f} ms  {p.path or 'model'} ({p.kind})" for s, p in chosen]


def _giga(flops: float) -> str:
    return f"{flops / 1e9:.3g}" if flops else ""
