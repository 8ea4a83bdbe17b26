"""Does a model train in another layout as it does on one process? Run both, small, and compare everything.

    configuration ─shrink─> tiny model of the same kinds ─┬─ one process ──> losses, gradients, weights
                                                          └─ N processes ──> each rank's parts of them
                                                                   └─ compare each part with its rectangle

Every rank's every part is compared, so copies that drift apart are found too. The first step's
gradients are compared before clipping, weights after some updates. Where something differs, both run
again under watch, and the module that makes the difference is named (verify_modules.py).
"""

from __future__ import annotations

import itertools
import os
import signal
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from castalia.config import Config
from castalia.config.derive import derive
from castalia.config.fields import flat
from castalia.config.load import Tree, check
from castalia.config.schema_parallel import ParallelConfig
from castalia.data.sample import SourcePiece
from castalia.errors import CheckFailed, UserError
from castalia.parallel.layout import held_tokens, layout_of
from castalia.parallel.parallelize import check_model
from castalia.parallel.testing import WorkerFailed, run_in_processes
from castalia.parallel.world import World
from castalia.tools.verify_compare import Trace, Verdict, compare
from castalia.tools.verify_faults import FAULTS
from castalia.tools.verify_modules import Watched, guilty

TOLERANCE = 1e-5
STEPS = 3
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "dp4": (4, {}),
    "zero1": (2, {"zero": 1}),
    "zero2": (2, {"zero": 2}),
    "zero3": (2, {"zero": 3}),
    "zero3x4": (4, {"zero": 3}),
    "hsdp": (4, {"zero": 3, "shard": 2}),
    "tp2": (2, {"tensor": 2}),
    "tp4": (4, {"tensor": 4}),
    "tp2sp": (2, {"tensor": 2, "sequence": True}),
    "cp2": (2, {"context": 2}),
    "cp2contiguous": (2, {"context": 2, "context_balance": False}),
    "cp4": (4, {"context": 4}),
    "cp2tp2": (4, {"context": 2, "tensor": 2, "sequence": True}),
    "cp2pp2": (4, {"context": 2, "pipeline": 2}),
    "zero3cp2tp2": (4, {"context": 2, "tensor": 2, "sequence": True, "zero": 3}),
    "pp2": (2, {"pipeline": 2}),
    "pp2gpipe": (2, {"pipeline": 2, "schedule": "gpipe"}),
    "pp2interleaved": (2, {"pipeline": 2, "schedule": "interleaved"}),
    "pp2zerobubble": (2, {"pipeline": 2, "schedule": "zero_bubble"}),
    "pp4": (4, {"pipeline": 4}),
    "tp2pp2": (4, {"tensor": 2, "sequence": True, "pipeline": 2}),
    "zero3pp2": (4, {"zero": 3, "pipeline": 2}),
    "zero3tp2pp2": (8, {"zero": 3, "tensor": 2, "pipeline": 2}),
    "ep2": (2, {"expert": 2}),
    "ep2x2": (4, {"expert": 2}),
    "ep2tp2": (4, {"expert": 2, "tensor": 2, "sequence": True}),
    "ep2cp2": (4, {"expert": 2, "context": 2}),
    "ep2pp2": (4, {"expert": 2, "pipeline": 2}),
    "dp2tp2": (4, {"tensor": 2}),
    "zero3tp2": (4, {"tensor": 2, "zero": 3}),
}
"""Name -> processes and settings of `parallel:`."""


def verify_layouts(
    config: Config, names: Sequence[str], tolerance: float = TOLERANCE, fault: str | None = None, timeout: float = 120.0
) -> list[Verdict]:
    """Compare layouts with one process.

    Args:
        config: the user's own; it is shrunk.
        names: of LAYOUTS, or such as `tensor=2,sequence=true,procs=4`.
        tolerance: largest relative difference.
        fault: one of FAULTS to plant, to see that it is found.

    Raises:
        UserError: a layout is unknown, or the model cannot have it.
    """
    wanted = [(name, *layout_named(name)) for name in names]
    small = shrink(config)
    for _, processes, settings in wanted:
        spread = with_settings(small, settings)
        check_model(spread, layout_of(spread.parallel, processes))
    expected = run_in_processes(1, train_small, small, STEPS, timeout=timeout, joined=False)[0]
    verdicts = []
    for name, processes, settings in wanted:
        spread = with_settings(small, settings)
        traces = run_in_processes(processes, train_small, spread, STEPS, fault, timeout=timeout)
        verdict = compare(name, expected, traces, tolerance)
        if not verdict.good:  # again, with a look at every module
            more = (STEPS, fault, None, None, True)
            alone = run_in_processes(
                1, train_small, small, STEPS, None, None, None, True, timeout=timeout, joined=False
            )
            watched = run_in_processes(processes, train_small, spread, *more, timeout=timeout)
            verdict = replace(verdict, guilty=guilty(alone[0], watched, tolerance))
        verdicts.append(verdict)
    return verdicts


def verify_resume(
    config: Config, before: str, after: str, tolerance: float = TOLERANCE, timeout: float = 120.0
) -> Verdict:
    """Train under one layout, kill a process of it after a save, go on under another, and compare with one process.

    Args:
        config: the user's own; it is shrunk.
        before, after: layouts, as for `verify_layouts`.
        tolerance: largest relative difference.

    Raises:
        UserError: a layout is unknown, or the model cannot have it.
        CheckFailed: the samples of the steps after the resumption are not those of one process.
    """
    small, half = shrink(config), STEPS // 2 + 1
    jobs = []
    for name in (before, after):
        processes, settings = layout_named(name)
        spread = with_settings(small, settings)
        check_model(spread, layout_of(spread.parallel, processes))
        jobs.append((processes, spread))
    expected = run_in_processes(1, train_small, small, STEPS, timeout=timeout, joined=False)[0]
    with tempfile.TemporaryDirectory(prefix="castalia-verify-") as folder:
        processes, spread = jobs[0]
        try:
            run_in_processes(processes, train_small, spread, half + 1, None, Path(folder), half, timeout=timeout)
        except WorkerFailed as failure:
            if "exit code -9" not in str(failure):
                raise
        processes, spread = jobs[1]
        traces = run_in_processes(processes, train_small, spread, STEPS, None, Path(folder), timeout=timeout)
    for step, wanted in enumerate(expected.samples[half:]):
        if {i for trace in traces for i in trace.samples[step]} != set(wanted):
            raise CheckFailed(f"{before} -> {after}: step {half + step} reads other samples than one process does")
    rest = replace(expected, losses=expected.losses[half:], norms=expected.norms[half:], gradients={})
    return compare(f"{before} -> {after}", rest, [replace(t, gradients={}) for t in traces], tolerance)


def refusal(config: Config, name: str) -> str | None:
    """Why the model of a configuration cannot have a layout; None if it can."""
    processes, settings = layout_named(name)
    try:
        spread = with_settings(shrink(config), settings)
        check_model(spread, layout_of(spread.parallel, processes))
    except UserError as error:
        return str(error)
    return None


def layout_named(name: str) -> tuple[int, dict[str, Any]]:
    """Processes and settings of `parallel:` for a layout's name or its settings.

    Raises:
        UserError: neither.
    """
    if name in LAYOUTS:
        return LAYOUTS[name]
    settings: dict[str, Any] = {}
    for item in name.split(","):
        key, equals, value = item.partition("=")
        if not equals or (key != "procs" and key not in ParallelConfig.model_fields):
            raise UserError(
                f"layout '{name}' is not known; known: {', '.join(LAYOUTS)}; or give such as tensor=2,procs=4"
            )
        settings[key] = {"true": True, "false": False}.get(value, int(value) if value.isdecimal() else value)
    return int(settings.pop("procs", 2)), settings


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """The same run with other settings of `parallel:`; those of other sections are given by dotted name."""
    values = flat(config) | {k if "." in k else f"parallel.{k}": v for k, v in settings.items()}
    return check(Tree(values, {}, []))


def shrink(config: Config) -> Config:
    """A tiny model of the same kinds, with sizes that do not come out even: seconds on a CPU."""
    model = config.model
    heads = 8 if model.num_attention_heads % 8 == 0 else 4
    kv = heads if model.kv_heads == model.num_attention_heads else max(heads // 2, 1)
    values = flat(config) | {
        "model.num_layers": 4,
        "model.num_unique_layers": 2 if model.num_unique_layers else None,
        "model.num_attention_heads": heads,
        "model.num_kv_heads": kv,
        "model.head_dim": 8,
        "model.hidden_size": 8 * heads,
        "model.intermediate_size": 8 * heads * 2 + 2,
        "model.vocab_size": 67,
        "model.max_position_embeddings": 32 + model.position_offset,
        "data.seq_length": 32,
        "model.moe_num_experts": 4 if model.moe_num_experts else 0,
        "model.moe_intermediate_size": 24 if model.moe_intermediate_size else None,
        "model.moe_first_layer": min(model.moe_first_layer, 1),
        "model.mtp_depth": min(model.mtp_depth, 1),
        "training.batch_size": 16,
        "training.micro_batch_size": 4,
        "training.steps": STEPS,
        "training.tokens": None,
        "schedule.decay_steps": STEPS,
        "schedule.warmup": 0.0,
        "schedule.warmup_steps": None,
        "performance.compile": False,
        # An element whose gradient is zero but for rounding must not move by the sign of an error.
        "optimizer.eps": max(config.optimizer.eps, 1e-3) if config.optimizer.uses("eps") else config.optimizer.eps,
    }
    return derive(check(Tree(values, {}, [])))[0]


def train_small(
    world: World,
    config: Config,
    steps: int,
    fault: str | None = None,
    folder: Path | None = None,
    die_at: int | None = None,
    watch: bool = False,
) -> Trace:
    """In each process: train on invented text and note everything.

    Args:
        steps: where to end.
        fault: one of FAULTS to plant.
        folder: of checkpoints: go on from the newest one, if there is one.
        die_at: save after this step, and let the last rank kill itself in the next one.
        watch: also note what every module does in the first step, which takes memory.
    """
    from castalia.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
    from castalia.data.loader import Loader, Shard
    from castalia.data.plan import RunPlan
    from castalia.optim import learning_rate
    from castalia.parallel.mesh import Mesh
    from castalia.train.assemble import assemble

    mesh = Mesh(layout_of(config.parallel, world.size), world)
    parts = assemble(config, mesh)
    if fault is not None:
        FAULTS[fault](parts)
    watched = Watched(parts.model, config.model.hidden_size) if watch else None
    plan = RunPlan(config.training.batch_size, config.data.seq_length, steps)
    shard = Shard(mesh.data_rank, mesh.layout.data)
    source = InventedText(config.data.seq_length, config.model.vocab_size or 2)
    documents = config.data.document_mask
    loader = Loader(
        cast(Any, source), plan, shard, config.micro_batch_size, 0, eod=0, eod_mask_loss=True, document_mask=documents
    )
    trace = Trace()
    found = find_checkpoint(folder) if folder else None
    if found is not None:
        load_checkpoint(found.path, parts.store.tensors())
        parts.store.refresh()
        parts.store.set_updates(found.step)
    first = found.step if found else 0
    for step in range(first, steps):
        if step == die_at and folder is not None:
            save_checkpoint(folder, step, parts.store.tensors(), {})
            if world.rank == world.size - 1:
                os.kill(os.getpid(), signal.SIGKILL)
        batches = loader.batch(plan.at(step))
        trace.samples.append([int(i) for batch in batches for i in cast(Any, batch.sample_ids)])
        tokens = parts.count(sum(batch.num_tokens for batch in batches))
        stats = parts.engine.forward_backward(batches, tokens, step)
        norm = parts.store.gradient_norm()
        if step == first:
            trace.gradients = {n: parts.part(n, g) for n, g in parts.store.gradients().items()}
            if watched is not None:
                where = mesh.layout.context, mesh.index("context"), mesh.layout.balanced
                held = np.concatenate([np.array(c) for c in held_tokens(config.data.seq_length, *where)])
                trace.modules, watched = watched.seen(len(batches), held, mesh.index("tensor")), None
        trace.losses.append(stats.loss)
        trace.norms.append(norm.item())
        lr = learning_rate(step, config.optimizer.lr, config.schedule, steps)
        clip = config.optimizer.clip_grad
        parts.store.step(lr, (norm + 1e-6) / clip if clip and norm > clip else None)
        parts.engine.updated()
    for name, tensor in parts.store.tensors().items():
        if name.startswith("model.") and getattr(tensor, "local", tensor).numel():
            short = name.removeprefix("model.")
            trace.shapes[short] = tuple(tensor.shape)
            trace.weights[short] = parts.part(short, getattr(tensor, "local", tensor))
    return trace


class InventedText:
    """Samples that can be learned, with ends of documents (id 0) more frequent in some than in others.

    Args:
        seq_length: tokens the model sees; a sample has one more.
        vocab_size: ids lie below it.
    """

    def __init__(self, seq_length: int, vocab_size: int) -> None:
        self.seq_length, self._vocab_size = seq_length, vocab_size

    def __getitem__(self, number: int) -> np.ndarray:
        """int64 `[seq_length + 1]`."""
        draw = np.random.default_rng(number)
        ids = (draw.integers(1, self._vocab_size) + 3 * np.arange(self.seq_length + 1)) % self._vocab_size
        ids[draw.random(self.seq_length + 1) < 0.1 * (number % 6)] = 0
        return ids.astype(np.int64)

    def pieces(self, number: int) -> list[SourcePiece]:
        """See SampleSource: documents end with id 0."""
        ends = (np.flatnonzero(self[number] == 0) + 1).tolist()
        cuts = sorted({0, *ends, self.seq_length + 1})
        return [SourcePiece("invented", i, 0, b - a) for i, (a, b) in enumerate(itertools.pairwise(cuts))]

    def labels(self, number: int) -> None:
        """None: the next token is the label."""

    def __len__(self) -> int:
        return 1 << 30
