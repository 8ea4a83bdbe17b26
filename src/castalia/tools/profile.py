"""One step of a user's own model and batch, measured: time, FLOPs, memory and parameters by module.

    config ─> model, store, engine (as `train` makes them, on one process)
    data of step 1, or random tokens ─> micro-batches ─┬─ a step to warm up, one with no clocks inside
                                                       ├─ some with a clock in every module: the middle one counts
                                                       ├─ one that counts FLOPs and what is kept
                                                       └─ one in torch's profiler, if a trace or memory is wanted

Nothing of the run's folder is read or written. A step is whole, the update included, so that its phases
compare; weights move a little from pass to pass, which changes no shape.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path

import torch

from castalia.config import Config
from castalia.config.derive import derive
from castalia.config.load import check_values
from castalia.config.schema_parallel import ParallelConfig
from castalia.data.loader import Batch, Loader, Shard
from castalia.errors import UserError
from castalia.model.kernels import choose_fp32_matmul, choose_matmul, flushes_denormals
from castalia.model.size import ModelSize, model_size
from castalia.optim import learning_rate
from castalia.optim.loss_scale import LossScaler
from castalia.optim.weights import working_dtype
from castalia.parallel.layout import layout_of
from castalia.parallel.mesh import Mesh
from castalia.parallel.world import World, enter_world, peak_memory
from castalia.tools.plan import tokenizer_vocabulary
from castalia.train.assemble import Assembled, assemble
from castalia.train.data import open_data, open_tokenizer, run_plan
from castalia.train.preflight import check_memory
from castalia.train.profile_modules import ModuleWatch
from castalia.train.profile_record import Recorder
from castalia.train.profile_timers import Timers
from castalia.train.profile_tree import Profile, state_of, tree


def profile(config: Config, repeat: int = 3, trace: Path | None = None, memory: Path | None = None) -> Profile:
    """Measure a step.

    Args:
        config: of a run, as `load` gives it.
        repeat: steps with clocks, of which the one in the middle is taken.
        trace, memory: files to write torch's trace and the record of memory of one step to.

    Raises:
        UserError: the configuration, the data or the machine does not allow it.
    """
    config, notes = _alone(config)
    world = enter_world(config.performance.device)
    if world.size > 1:
        raise UserError(
            "castalia profile looks at one process: start it without a launcher; to profile processes that train "
            "together, set profile.start or profile.modules and use castalia train"
        )
    config, batches, data = _batches(config)
    size = model_size(config)
    check_memory(config, size, world.device)
    with ExitStack() as undo:
        undo.callback(torch.set_num_threads, torch.get_num_threads())
        undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        undo.callback(torch.set_flush_denormal, flushes_denormals())
        if config.performance.threads:
            torch.set_num_threads(config.performance.threads)
        torch.set_float32_matmul_precision(choose_fp32_matmul(world.device))
        return _measured(config, batches, data, world, size, notes, repeat, trace, memory)


def _measured(
    config: Config,
    batches: Sequence[Batch],
    data: str,
    world: World,
    size: ModelSize,
    notes: list[str],
    repeat: int,
    trace: Path | None,
    memory: Path | None,
) -> Profile:
    matmul = choose_matmul(world.device, working_dtype(config.training.precision), config.performance.matmul)
    parts = assemble(config, Mesh(layout_of(config.parallel, 1), world), matmul)
    timers = parts.engine.timers = Timers(world.device)
    step = _Stepper(config, parts, batches)
    step()
    timers.take()
    started = time.perf_counter()
    step()
    plain = _since(started, world.device)
    timers.take()
    passes = []
    for _ in range(max(repeat, 1)):
        started = time.perf_counter()
        with ModuleWatch(parts.model, parts.engine, timers.clock) as timed:
            step()
        passes.append((_since(started, world.device), timers.take(), timed))
    clocked, phases, timed = sorted(passes, key=lambda p: p[0])[(len(passes) - 1) // 2]
    peak = peak_memory(world.device)
    with ModuleWatch(parts.model, parts.engine, None) as counted:
        step()
    if trace is not None or memory is not None:
        recorder = Recorder(world.device, trace is not None, memory is not None)
        recorder.prepare()
        step()
        recorder.start()
        recorder.step(1)
        with ModuleWatch(parts.model, parts.engine, timers.clock, ranges=True):
            step()
        notes += [f"written: {path}" for path in recorder.finish(trace, memory)]
    sequences = sum(len(batch.tokens) for batch in batches)
    tokens = sequences * batches[0].tokens.shape[1]
    return Profile(
        config.name,
        str(world.device),
        config.training.precision,
        data,
        len(batches),
        sequences,
        tokens,
        tree(parts.model, timed, counted),
        phases,
        plain,
        clocked,
        tokens * size.flops_per_token,
        state_of(size),
        peak,
        notes + _remarks(config, size, tokens, counted),
    )


class _Stepper:
    """Makes one and the same step, again and again."""

    def __init__(self, config: Config, parts: Assembled, batches: Sequence[Batch]) -> None:
        self._config, self._parts, self._batches = config, parts, batches
        self._scaler = LossScaler(config.training) if config.training.precision == "fp16" else None
        self._rate = learning_rate(1, config.optimizer.lr, config.schedule, config.training.steps or 1)

    def __call__(self) -> None:
        config, (engine, store) = self._config, (self._parts.engine, self._parts.store)
        if self._scaler is not None:
            engine.loss_scale = self._scaler.scale
        engine.forward_backward(self._batches, sum(batch.num_tokens for batch in self._batches), 0)
        with engine.timers("clip"):
            if self._scaler is not None:
                self._scaler.unscale(store.gradient_buffers())
            norm = store.gradient_norm()
            finite, clip = bool(norm.isfinite()), config.optimizer.clip_grad
            clipped = clip > 0 and norm.item() > clip
        with engine.timers("optimizer") if finite else nullcontext():
            if finite:
                store.step(self._rate, divisor=(norm + 1e-6) / clip if clipped else None)
            else:
                store.discard()
        if self._scaler is not None:
            self._scaler.update(finite)


def _since(started: float, device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def _alone(config: Config) -> tuple[Config, list[str]]:
    """The same run on one process and not compiled, and what that changes."""
    values, notes = config.model_dump(), []
    alone = ParallelConfig()
    if config.parallel != alone:
        values["parallel"] = alone.model_dump()
        values["training"]["batch_size"] = config.training.batch_size
        notes.append("parallel: left out, as one process holds the whole model here")
    if config.performance.compile:
        values["performance"]["compile"] = False
        notes.append("performance.compile: left out, as compiled code has no modules; it is faster than this")
    values["logging"]["noise_scale"] = False
    return check_values(values, "the configuration"), notes


def _batches(config: Config) -> tuple[Config, list[Batch], str]:
    """The complete configuration, the first step's micro-batches and what their tokens are."""
    cfg = config.data
    named = [p for p in (cfg.path, *(cfg.train_paths or [])) if p is not None]
    if named and all(Path(f"{prefix}.idx").exists() for prefix in named):
        tokenizer = open_tokenizer(config)
        full, _ = derive(config, tokenizer.vocab_size if tokenizer else None)
        steps = full.training.steps or 1
        data = open_data(full, steps, tokenizer)
        plan = run_plan(full, steps, ())
        loader = Loader(
            data.datasets["train"],
            plan,
            Shard(),
            full.micro_batch_size,
            0,
            tokenizer.eod if tokenizer else None,
            full.data.mask_loss_at_eod,
            vocab_size=full.model.vocab_size,
            document_mask=full.data.document_mask,
        )
        return full, loader.batch(plan.at(steps - 1)), f"the tokens of step {steps}"
    full, _ = derive(config, tokenizer_vocabulary(config))
    size, rows, length = full.training.batch_size, full.micro_batch_size, full.data.seq_length
    if full.model.vocab_size is None:
        raise UserError("model.vocab_size is not set and there is no data to take it from: give model.vocab_size")
    draw = torch.Generator().manual_seed(full.training.seed)
    ids = torch.randint(0, full.model.vocab_size, (size, length + 1), generator=draw)
    batches = []
    for first in range(0, size - size % rows, rows):
        some = ids[first : first + rows]
        numbers = torch.arange(first, first + len(some))
        places = torch.arange(length).repeat(len(some), 1)
        documents = torch.zeros_like(places, dtype=torch.int32) if cfg.document_mask else None
        tokens, labels = some[:, :-1].contiguous(), some[:, 1:].contiguous()
        batches.append(Batch(tokens, labels, places, documents, sample_ids=numbers))
    why = f"{named[0]} is not here" if named else "no data is named"
    return full, batches, f"random tokens, as {why}"


def _remarks(config: Config, size: ModelSize, tokens: int, counted: ModuleWatch) -> list[str]:
    lines = []
    if config.performance.recompute == "selective":
        lines.append("performance.recompute selective: results that it keeps are not seen, so kept bytes lack them")
    if config.performance.offload_activations:
        lines.append("performance.offload_activations: what waits in the host's memory is not counted as kept")
    again = sum(n for (_, phase), n in counted.flops.items() if phase == "recompute")
    found = sum(counted.flops.values()) - again
    lines.append(
        f"matrix products: {found / tokens:,.0f} FLOPs per token; castalia plan reckons {size.flops_per_token:,}, "
        "with 6 for each bias and gain" + (f"; computed again: {again / tokens:,.0f}" if again else "")
    )
    return lines
