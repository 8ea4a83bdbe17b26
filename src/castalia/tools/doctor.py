"""Does this machine compute and communicate as Castalia needs it? Check, and write down what was found.

    this process    every kind of model on the device against the CPU in fp64 arithmetic: kernels
                    training in each precision; compiling
    all processes   collective operations with known results; small models under several layouts
                    against one process on the same device (`verify layouts`, but on these devices)

Each check is tried whatever happened to those before it. The report is meant to be sent back by
people with devices that the project's own tests have never seen.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from castalia.config import Config
from castalia.config.load import check_values
from castalia.parallel.heartbeat import heartbeat
from castalia.parallel.world import World, enter_world, joined, local_devices

_MODELS: dict[str, dict[str, Any]] = {
    "rotary, layernorm, gelu": {},
    "grouped heads, rmsnorm, swiglu": {"num_kv_heads": 2, "norm": "rmsnorm", "activation": "swiglu"},
    "alibi, tied": {"position": "alibi", "tie_embeddings": True},
    "t5-relative": {"position": "rpe"},
    "window": {"attention": "window", "attention_window": 16},
    "block-sparse": {"attention": "sparse_fixed"},
    "experts": {"moe_num_experts": 4, "moe_top_k": 2},
}
_PATIENCE = 300.0
"""Seconds that one check of several processes may take; then the job counts as standing still."""
_LAYOUTS = ("dp", "zero3", "tensor", "pipeline", "context")
_TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}
"""Relative error of hidden states; in fp32 TF32 would show, in bf16 a wrong mask would."""


@dataclass(frozen=True)
class Finding:
    """One check: its name, whether it held, what was seen, and how long it took in seconds."""

    name: str
    good: bool
    detail: str
    seconds: float


def examine(device: str | None, processes: int | None, compiling: bool) -> Iterator[Finding]:
    """All checks, one after the other.

    Args:
        device: as performance.device.
        processes: for the checks of several processes; None: one for each device, 2 on a CPU.
        compiling: also compile a model, which takes up to minutes.
    """
    world = enter_world(device)
    for name, model in _MODELS.items():
        for precision in ("fp32", "bf16"):
            yield _tried(f"{name}, {precision}", partial(_against_cpu, model, precision, world.device))
    for precision in ("fp32", "bf16"):
        yield _tried(f"training, {precision}", partial(_learns, precision, world.device, False))
    if compiling:
        yield _tried("training, compiled", partial(_learns, "fp32", world.device, True))
    many = processes or max(local_devices(device), 2 if world.device.type == "cpu" else 1)
    if many < 2:
        yield Finding("several processes", True, "left out: there is one device", 0.0)
        return
    yield from _together(many, device)


def _tried(name: str, what: Callable[[], str]) -> Finding:
    began = time.monotonic()
    try:
        detail, good = what(), True
    except Exception as error:  # whatever a device does, the other checks go on
        place = traceback.extract_tb(error.__traceback__)[-1]
        lines = str(error).splitlines() or [""]
        detail, good = f"{type(error).__name__}: {lines[0]} ({Path(place.filename).name}:{place.lineno})", False
    return Finding(name, good, detail, round(time.monotonic() - began, 2))


def _small(model: dict[str, Any] | None = None, **more: Any) -> Config:
    values: dict[str, Any] = {
        "data": {"seq_length": 64},
        "model": {
            "num_layers": 2,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "vocab_size": 128,
            **({} if model is None else model),
        },
        "training": {"steps": 40, "batch_size": 8, "micro_batch_size": 1},
        "optimizer": {"lr": 1e-2},
    }
    for section, settings in more.items():
        values[section] = values.get(section, {}) | settings
    return check_values(values, "castalia doctor")


def _against_cpu(model: dict[str, Any], precision: str, device: torch.device) -> str:
    """Hidden states and gradients of one pass on the device and on the CPU, there in fp64."""
    from castalia.model.transformer import build_model

    cfg = _small(model).model
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    tokens = torch.randint(0, 128, (2, 64), generator=torch.Generator().manual_seed(0))
    results = []
    for place, kind in ((torch.device("cpu"), torch.float64), (device, dtype)):
        built = build_model(cfg, 1, "cpu").to(place, kind)
        hidden = built(tokens.to(place))
        (hidden * torch.linspace(-1, 1, hidden.numel(), device=place).view_as(hidden)).sum().backward()
        gradient = built.embedding.weight.grad
        assert gradient is not None
        results.append((hidden.detach().double().cpu(), gradient.double().cpu()))
    worst = max(float((a - b).norm() / a.norm()) for a, b in zip(*results, strict=True))
    if not worst <= _TOLERANCE[precision]:
        raise ArithmeticError(f"off by {worst:.1e} from the CPU in fp64, more than {_TOLERANCE[precision]:g}")
    return f"within {worst:.1e} of the CPU in fp64"


def _learns(precision: str, device: torch.device, compiled: bool) -> str:
    """The loss of a small model falls over 40 steps of one batch."""
    from castalia.data.loader import Batch
    from castalia.model.transformer import build_model
    from castalia.optim import make_store
    from castalia.train.engine import LocalEngine

    config = _small()
    model = build_model(config.model, 1, device)
    store = make_store(model, config.optimizer, precision, arena=True)
    engine = LocalEngine(model, store, config.loss, compiled)
    ids = torch.randint(0, 128, (8, 65), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.arange(64).expand(8, -1)).to(device)
    losses = []
    for step in range(40):
        losses.append(engine.forward_backward([batch], batch.num_tokens, step).loss)
        store.step(1e-2)
    if not losses[-1] < 0.7 * losses[0]:
        raise ArithmeticError(f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f} only")
    return f"loss {losses[0]:.3f} to {losses[-1]:.3f} in 40 steps"


def _together(processes: int, device: str | None) -> Iterator[Finding]:
    """Start a job of this module on the devices, and read what its first rank found."""
    import tempfile

    from castalia.parallel.launch import supervise

    with tempfile.TemporaryDirectory(prefix="castalia-doctor-") as folder:
        findings, began = Path(folder, "findings"), time.monotonic()
        command = [sys.executable, "-m", "castalia.tools.doctor", str(findings), device or ""]
        code = supervise(command, processes, _PATIENCE)
        seen = json.loads(findings.read_text(encoding="utf-8")) if findings.exists() else []
        yield from (Finding(**one) for one in seen)
        if code or not seen:
            detail = f"the job of {processes} processes ended with exit code {code}, before all was tried"
            yield Finding(f"{processes} processes", False, detail, round(time.monotonic() - began, 2))


def _rank(findings: Path, device: str | None) -> None:
    """What each process of that job does."""
    from datetime import timedelta

    rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    seen: list[Finding] = []

    def note(*more: Finding) -> None:
        seen.extend(more)
        if rank == 0:
            findings.with_suffix(".partial").write_text(json.dumps([asdict(f) for f in seen]), encoding="utf-8")
            os.replace(findings.with_suffix(".partial"), findings)

    with ExitStack() as opened:
        beat = opened.enter_context(heartbeat(rank, size, _PATIENCE))
        world = enter_world(device)
        opened.enter_context(joined(world, timedelta(minutes=2)))
        beat("checking collective operations")
        from castalia.parallel.check import collective_faults

        for name, faults in collective_faults(world).items():
            detail = "; ".join(faults) or "right in fp32, bf16, int64"
            note(Finding(f"{name}, {world.size} processes", not faults, detail, 0.0))
        for layout in _LAYOUTS:
            beat(f"training under layout {layout}")
            began = time.monotonic()
            good, detail = _layout(layout, world)  # a failure here leaves the ranks apart, and so ends the job
            name = f"layout {layout}, {world.size} processes"
            note(Finding(name, good, detail, round(time.monotonic() - began, 2)))


def _layout(layout: str, world: World) -> tuple[bool, str]:
    """Train a small model under a layout; the first rank also alone, and compares."""
    from castalia.parallel.check import gather_bytes
    from castalia.tools.verify import STEPS, TOLERANCE, shrink, train_small, with_settings
    from castalia.tools.verify_compare import compare

    n = world.size
    settings: dict[str, Any] = {
        "dp": {},
        "zero3": {"zero": 3},
        "tensor": {"tensor": n},
        "pipeline": {"pipeline": n},
        "context": {"context": n},
    }[layout]
    model = {"num_attention_heads": max(4, n), "hidden_size": 16 * max(4, n), "num_layers": max(2, n)}
    base = shrink(_small(model, training={"batch_size": 2 * n, "micro_batch_size": 1}))
    spread = with_settings(base, settings)
    try:
        mine = train_small(world, spread, STEPS)
    except NotImplementedError as error:
        return False, str(error).splitlines()[0]
    traces = [pickle.loads(data) for data in gather_bytes(pickle.dumps(mine), world)]
    if world.rank:
        return True, ""
    alone = train_small(World(0, 1, world.device), base, STEPS)
    # Sums in another order, on a device whose kernels may add in fp32 throughout.
    tolerance = TOLERANCE if world.device.type == "cpu" else 1e-4
    verdict = compare(layout, alone, traces, tolerance)
    worst = max(verdict.loss, verdict.norm, verdict.gradient, verdict.weight)
    return verdict.good, f"within {worst:.1e} of one process" + ("" if verdict.good else f", first at {verdict.first}")


if __name__ == "__main__":
    _rank(Path(sys.argv[1]), sys.argv[2] or None)
