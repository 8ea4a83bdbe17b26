"""A machine, described in YAML -> rates in bytes, FLOP and seconds, for predictions.

    src/castalia/machines/NAME.yml, or the user's file ─base: merged─> checked ─> Machine
    Machine.exchange(ranks, stride, bytes) ─> seconds of a ring over devices that lie so many apart

A device is what a rank of the job has: an accelerator, or a share of a CPU's cores. Peaks are the makers', what is
achieved of them is a share beside. Nothing here imports torch.
"""

from __future__ import annotations

from functools import cached_property
from math import ceil, log2
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from castalia.config.section import Section
from castalia.config.yaml12 import read_yaml
from castalia.errors import UserError

SHIPPED = Path(__file__).parent.parent / "machines"


class Links(Section):
    """Bytes per second and direction that a device reaches others with, and seconds until they begin to arrive."""

    within: float = Field(gt=0)
    between: float = Field(gt=0)
    within_latency: float = Field(ge=0)
    between_latency: float = Field(ge=0)


class Achieved(Section):
    """Shares of the peaks that large operations reach."""

    matmul: float = Field(gt=0, le=1)
    attention: float = Field(gt=0, le=1)
    memory: float = Field(gt=0, le=1)
    links: float = Field(gt=0, le=1)


class Host(Section):
    """A node's own memory: bytes per second to a device and of the memory, bytes."""

    link: float = Field(gt=0)
    memory_bandwidth: float = Field(gt=0)
    memory: float = Field(gt=0)


class Machine(Section):
    """Nodes of some devices each, as many as a job wants.

    Attributes:
        kind: `accelerator`: its memory is its own, exchanges hide behind computing; `cpu`: neither.
        memory: bytes of a device.
        flops: FLOP/s of matrix products by `training.precision`.
        memory_bandwidth: bytes per second of a device's memory.
        operation_seconds: to start an operation; where kernels are shorter than that, it counts.
    """

    version: Literal[1]
    name: str
    kind: Literal["accelerator", "cpu"]
    devices_per_node: int = Field(ge=1)
    memory: float = Field(gt=0)
    flops: dict[Literal["fp32", "bf16", "fp16", "fp8"], float]
    memory_bandwidth: float = Field(gt=0)
    links: Links
    achieved: Achieved
    operation_seconds: float = Field(ge=0)
    host: Host

    def rate(self, precision: str) -> float:
        """FLOP/s that large matrix products reach.

        Raises:
            UserError: the machine has no such products.
        """
        known = {str(word): rate for word, rate in self.flops.items()}
        if precision not in known:
            raise UserError(
                f"{self.name} has no products for training.precision {precision}: set one of {', '.join(known)}"
            )
        return known[precision] * self.achieved.matmul

    @cached_property
    def bandwidth(self) -> float:
        """Bytes per second that operations reach which only read and write."""
        return self.memory_bandwidth * self.achieved.memory

    def shared(self, devices: int) -> Machine:
        """The same, where a CPU's node has fewer ranks than it is described for: idle cores help the others."""
        if self.kind != "cpu" or devices >= self.devices_per_node:
            return self
        more = self.devices_per_node / devices
        flops = {precision: more * rate for precision, rate in self.flops.items()}
        changes = {"devices_per_node": devices, "flops": flops, "memory": more * self.memory}
        return self.model_copy(update=changes | {"memory_bandwidth": more * self.memory_bandwidth})

    def exchange(self, kind: str, ranks: int, stride: int, size: float, times: int = 1) -> float:
        """Seconds of collective operations over devices `stride` apart, as rings with logarithmic latency.

        Args:
            kind: `all_reduce`, `gather` (also its mirror image, and all-to-all) or `send`.
            size: bytes of the whole tensor, all operations together.
            times: operations, each of which waits for a latency.
        """
        if ranks == 1 or size <= 0:
            return 0.0
        per_node, links = self.devices_per_node, self.links
        inside = stride * ranks <= per_node
        rate, latency = links.within, links.within_latency
        if not inside:
            # As many rings as lie between two neighbours share what the node has of the network.
            rings = min(stride, per_node)
            rate, latency = min(links.within, links.between * per_node / rings), links.between_latency
        share = {"all_reduce": 2 * (ranks - 1) / ranks, "gather": (ranks - 1) / ranks, "send": 1.0}[kind]
        hops = 1 if kind == "send" else ceil(log2(ranks)) * (2 if kind == "all_reduce" else 1)
        return share * size / (rate * self.achieved.links) + times * hops * latency


def machine_names() -> list[str]:
    """Names of the machines that are shipped."""
    return sorted(path.stem for path in SHIPPED.glob("*.yml"))


def read_machine(name: str) -> Machine:
    """A machine by its shipped name, or from the user's own file.

    Raises:
        UserError: there is none, or the file does not describe one.
    """
    values = _read(name, ())
    try:
        return Machine.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(
            f"{name}: {key}: {first['msg'].lower()}; docs/plan.md says what a machine's file holds"
        ) from None


def _read(name: str, seen: tuple[str, ...]) -> dict[str, Any]:
    path = SHIPPED / f"{name}.yml"
    if not path.is_file():
        path = Path(name)
        if path.suffix not in (".yml", ".yaml") or not path.is_file():
            raise UserError(
                f"--machine {name}: is neither a file (.yml) nor one of {', '.join(machine_names())}; "
                "`castalia plan --measure FILE` describes this machine"
            )
    if name in seen:
        raise UserError(f"{name}: is based on itself")
    values = dict(read_yaml(path).values)
    base = values.pop("base", None)
    if base is None:
        return values
    merged = _read(str(base), (*seen, name))
    for key, value in values.items():
        merged[key] = (
            {**merged[key], **value} if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
        )
    return merged
