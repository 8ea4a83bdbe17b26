"""A model, a machine and a number of devices -> every layout: why not, or how much memory and how long, ranked.

    pipeline x tensor x context ─check_layout─> ZeRO, shards, experts, schedule ─check_layout─> least memory?
        ─> micro-batches x recomputation x offload ─check_layout─> memory of the fullest rank ─fits─> step time ─> rank

What is legal is asked of the same function that a run asks. Where a choice can only be slower and is needed for its
memory alone (recomputation, offloading, larger micro-batches than fit, gpipe beside 1f1b), it is looked at where
the other does not fit; sequence parallelism, which costs nothing, goes with tensor parallelism wherever it is legal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from castalia.config import Config
from castalia.config.schema_parallel import ParallelConfig
from castalia.errors import UserError
from castalia.parallel.auto import FILLED
from castalia.parallel.layout import Layout, check_layout, layout_of
from castalia.parallel.memory import Memory, MemoryModel
from castalia.tools.plan_machine import Machine
from castalia.tools.plan_time import StepTime, TimeModel

MOST_MICRO_BATCH = 64
RECOMPUTE = ("none", "selective", "full")
OFFLOAD = ("none", "optimizer", "parameters")
VIRTUAL = (2, 4)


@dataclass(frozen=True)
class Candidate:
    """One way to run.

    Attributes:
        settings: values by key, such as `parallel.tensor`: 2; they differ from the configuration's, or not.
        config: the configuration with these settings.
        layout: of the devices.
        memory: of the fullest rank.
        time: of a step.
    """

    settings: dict[str, Any]
    config: Config = field(repr=False)
    layout: Layout
    memory: Memory
    time: StepTime

    @property
    def overrides(self) -> list[str]:
        """The settings as they are given on a command line."""
        words = {True: "true", False: "false", None: "null"}
        return [
            f"{key}={words[value] if value is None or isinstance(value, bool) else value}"
            for key, value in self.settings.items()
        ]


@dataclass
class Found:
    """What a search came upon.

    Attributes:
        ranked: candidates that fit, the quickest first.
        closest: the one that needs least memory, where none fits.
        as_given: the configuration's own settings, whether they fit or not; None: they are not legal.
        refused: why layouts are not legal -> how many of them.
        too_large: layouts, with their micro-batches, that do not fit.
        legal: those looked at that are legal, fitting or not.
        budget: bytes that were planned for on each device.
    """

    ranked: list[Candidate] = field(default_factory=list)
    closest: Candidate | None = None
    as_given: Candidate | None = None
    given_refused: str | None = None
    refused: Counter[str] = field(default_factory=Counter)
    too_large: int = 0
    legal: int = 0
    budget: float = 0.0


def find_candidates(config: Config, machine: Machine, devices: int, fixed: Collection[str] = ()) -> Found:
    """Rank the layouts of a model on some devices of a machine.

    Args:
        config: complete (derived), with the vocabulary.
        machine: as described; on a CPU that has more devices to a node, idle ones help.
        devices: ranks.
        fixed: keys whose values the configuration keeps, of `parallel.*`, `training.micro_batch_size` and
            `performance.recompute`; all other keys are kept in any case.

    Raises:
        UserError: the machine cannot compute in this precision.
    """
    return _Search(config, machine.shared(devices), devices, frozenset(fixed)).run()


class _Search:
    """See find_candidates."""

    def __init__(self, config: Config, machine: Machine, devices: int, fixed: frozenset[str]) -> None:
        machine.rate(config.training.precision)
        self._config, self._machine, self._devices, self._fixed = config, machine, devices, fixed
        self._memory = MemoryModel(config, machine.kind == "accelerator")
        self._time = TimeModel(config, machine, self._memory)
        self._found = Found(budget=FILLED * machine.memory)
        self._performance = {
            word: config.performance.model_copy(update={"recompute": word, **_plain(word)}) for word in RECOMPUTE
        }
        self._training: dict[int, Any] = {}
        self._parallel: dict[Any, ParallelConfig] = {}
        """The last one that was made: neighbours share it."""

    def run(self) -> Found:
        """Look at all of them."""
        self._given()
        for sizes in self._sizes():
            variants = list(self._variants(sizes))
            if variants and (why := self._why(variants[0], self._least(variants[0]), "none")):
                self._found.refused[why] += len(variants)
                continue
            for variant in variants:
                self._look(variant)
        self._found.ranked.sort(key=lambda c: (c.time.total, c.memory.total))
        return self._found

    def _choices(self, key: str, values: Collection[Any]) -> list[Any]:
        """Values of a key to try: the configuration's own where it is fixed."""
        section, name = key.split(".")
        return [getattr(getattr(self._config, section), name)] if key in self._fixed else list(values)

    def _sizes(self) -> Iterator[dict[str, int]]:
        n = self._devices
        for pipeline in self._choices("parallel.pipeline", _divisors(n)):
            for tensor in self._choices("parallel.tensor", _divisors(n)):
                for context in self._choices("parallel.context", _divisors(n)):
                    if n % (pipeline * tensor * context) == 0:
                        yield {"pipeline": pipeline, "tensor": tensor, "context": context}

    def _variants(self, sizes: dict[str, int]) -> Iterator[dict[str, Any]]:
        """What else `parallel:` may say, the plainest first."""
        data = self._devices // (sizes["pipeline"] * sizes["tensor"] * sizes["context"])
        sequences = self._choices("parallel.sequence", [True] if sizes["tensor"] > 1 else [False])
        schedules: list[dict[str, Any]] = [{"schedule": "1f1b"}]
        if sizes["pipeline"] > 1:
            schedules += [{"schedule": s, "virtual_stages": v} for s in ("interleaved", "zero_bubble") for v in VIRTUAL]
        schedules = [
            s
            for s in schedules
            if ("parallel.schedule" not in self._fixed or s["schedule"] == self._config.parallel.schedule)
            and (
                "parallel.virtual_stages" not in self._fixed or s.get("virtual_stages", self._virtual) == self._virtual
            )
        ] or [{"schedule": self._config.parallel.schedule, "virtual_stages": self._virtual}]
        for schedule in schedules:
            for sequence in sequences:
                for spread in self._spreads(data, sizes["tensor"], sizes["context"]):
                    yield {**sizes, "sequence": sequence, **schedule, **spread}

    @property
    def _virtual(self) -> int:
        return self._config.parallel.virtual_stages

    def _spreads(self, data: int, tensor: int, context: int) -> Iterator[dict[str, Any]]:
        """ZeRO's stages over all data-parallel ranks or those of a node, or experts over some."""
        experts = self._config.model.moe_num_experts
        sizes = [n for n in _divisors(data) if n <= max(experts, 1)]
        zeros = self._choices("parallel.zero", range(4))
        if 0 in zeros:
            for expert in self._choices("parallel.expert", sizes):
                yield {"zero": 0, "expert": expert}
            if data * context == 1:  # nobody to share the state with
                return
        node = max(self._machine.devices_per_node // (tensor * context), 1)
        shards: list[int | None] = [None]
        shards += [node] if 1 < node < data and data % node == 0 else []
        for zero in (z for z in zeros if z):
            for shard in self._choices("parallel.shard", shards):
                yield {"zero": zero, "expert": 1, "shard": shard}

    def _with(self, variant: dict[str, Any], micro: int, recompute: str, offload: str) -> tuple[Config, Layout]:
        """A configuration of these settings; raises what is wrong with them."""
        if micro not in self._training:
            self._training[micro] = self._config.training.model_copy(update={"micro_batch_size": micro})
        key = (*variant.values(), offload)
        if key not in self._parallel:
            kept = self._config.parallel.model_dump() | {"layout": "given", "offload": offload}
            self._parallel = {key: ParallelConfig.model_validate(kept | {"shard": None} | variant)}
        parallel = self._parallel[key]
        changes = {"parallel": parallel, "training": self._training[micro], "performance": self._performance[recompute]}
        config, layout = self._config.model_copy(update=changes), layout_of(parallel, self._devices)
        check_layout(config, layout)
        return config, layout

    def _why(self, variant: dict[str, Any], micro: int, recompute: str) -> str | None:
        """Why these settings are not legal; None: they are."""
        try:
            self._with(variant, micro, recompute, "none")
        except (UserError, ValueError) as error:  # pydantic's are ValueErrors
            return _grouped(error)
        return None

    def _least(self, variant: dict[str, Any]) -> int:
        micro: int = self._choices("training.micro_batch_size", [1])[0]
        return micro

    def _micros(self, data: int) -> list[int]:
        each = self._config.training.batch_size // max(data, 1)
        sizes = [n for n in _divisors(each) if n <= MOST_MICRO_BATCH]
        return self._choices("training.micro_batch_size", sizes)

    def _look(self, variant: dict[str, Any]) -> None:
        """Every micro-batch of a layout: with the least recomputation and offloading that fits."""
        first = self._choices("performance.recompute", RECOMPUTE)[0]
        if why := self._why(variant, self._least(variant), first):
            self._found.refused[why] += 1
            return
        data = self._devices // (variant["pipeline"] * variant["tensor"] * variant["context"])
        micros = self._micros(data)
        for offload in self._choices("parallel.offload", OFFLOAD if self._memory.accelerator else OFFLOAD[:1]):
            fitted = False
            for micro in micros:
                if not self._fitting(variant, micro, offload):
                    self._found.too_large += micro != micros[0] or not fitted
                    break
                fitted = True
            if fitted:
                return

    def _fitting(self, variant: dict[str, Any], micro: int, offload: str) -> bool:
        for recompute in self._choices("performance.recompute", RECOMPUTE):
            try:
                config, layout = self._with(variant, micro, recompute, offload)
            except (UserError, ValueError) as error:
                self._found.refused[_grouped(error)] += 1
                continue
            self._found.legal += 1
            if self._memory.least(config, layout) > self._found.budget and self._found.closest:
                return False
            memory = self._memory.worst(config, layout)
            if memory.total <= self._found.budget:
                self._found.ranked.append(self._candidate(config, layout, memory))
                return True
            closest = self._found.closest
            if closest is None or memory.total < closest.memory.total:
                self._found.closest = self._candidate(config, layout, memory)
        return False

    def _candidate(self, config: Config, layout: Layout, memory: Memory) -> Candidate:
        cfg = config.parallel
        names = ["pipeline", "tensor", "context", "zero", "sequence"]
        further = ("shard", "expert", "schedule", "virtual_stages", "offload")
        given = self._config.parallel
        names += [n for n in further if _says(cfg, n) or getattr(cfg, n) != getattr(given, n)]
        settings = {f"parallel.{name}": getattr(cfg, name) for name in names}
        settings |= {
            "training.micro_batch_size": config.micro_batch_size,
            "performance.recompute": config.performance.recompute,
        }
        return Candidate(settings, config, layout, memory, self._time.step(config, layout))

    def _given(self) -> None:
        """The configuration as it stands."""
        try:
            layout = layout_of(self._config.parallel, self._devices)
            check_layout(self._config, layout)
        except UserError as error:
            self._found.given_refused = str(error)
            return
        memory = self._memory.worst(self._config, layout)
        self._found.as_given = self._candidate(self._config, layout, memory)


def _says(cfg: ParallelConfig, name: str) -> bool:
    """Whether a further setting has something to say."""
    if name == "virtual_stages":
        return cfg.pipeline > 1 and cfg.schedule in ("interleaved", "zero_bubble")
    if name == "schedule":
        return cfg.pipeline > 1
    return bool(getattr(cfg, name) != ParallelConfig.model_fields[name].default)


def _plain(word: str) -> dict[str, Any]:
    """What goes with no recomputation."""
    return {"offload_activations": False} if word == "none" else {}


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _grouped(error: Exception) -> str:
    """The reason without the numbers of one layout, so that layouts share it."""
    import re

    text = str(error)
    if not isinstance(error, UserError):
        errors: Any = getattr(error, "errors", lambda: [{"msg": text}])()
        text = str(errors[0]["msg"]).removeprefix("Value error, ")
    return re.sub(r"(?<![\w.])\d+(?![\w.])", "N", text)
