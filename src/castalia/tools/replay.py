"""A step of the past, computed again on this machine from the nearest checkpoint, and held against the record.

    checkpoints/step-C ─> weights, moments ─┐
    journal, data order ─> batches C ... N ─┴─> steps C+1 ... N ──> loss, gradient norm  =?  metrics.jsonl
                                                        └─ not finite? ──> autopsy: module, operation, documents

The run is not touched. Whatever layout it had, one process computes it, which by the rules of layouts is the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from castalia.checkpoint import find_checkpoint, load_checkpoint
from castalia.checkpoint.layout import step_of
from castalia.config import Config
from castalia.config.load import check_values
from castalia.data.exclusions import Exclusions
from castalia.data.loader import Loader, Shard
from castalia.errors import UserError
from castalia.model.soft_prompt import prompt_from_tokens
from castalia.optim import learning_rate
from castalia.optim.loss_scale import LossScaler
from castalia.parallel.mesh import local_mesh
from castalia.tools.autopsy import Finding, examine
from castalia.tools.data_view import DataRun, open_data_run
from castalia.train.assemble import assemble
from castalia.train.metrics import read_metrics
from castalia.train.resume import rank_states


@dataclass
class Replayed:
    """What came of it.

    Attributes:
        start: step of the checkpoint that was begun from; 0: initial weights.
        rows: for each step from there on `step`, `loss`, `grad_norm`, and `logged_loss`, `logged_grad_norm` where the
            run recorded them.
        finding: of the autopsy of the last step, where it was asked for or something was not finite.
        documents: what the finding's sample is made of.
    """

    start: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    finding: Finding | None = None
    documents: list[dict[str, Any]] = field(default_factory=list)

    def largest_difference(self) -> float:
        """Largest relative difference of a loss or norm from its record; 0 where nothing was recorded."""
        found = [0.0]
        for row in self.rows:
            for key in ("loss", "grad_norm"):
                logged = row.get(f"logged_{key}")
                if logged is not None:
                    value = row[key]
                    found.append(
                        abs(value - logged) / max(abs(logged), 1e-12) if math.isfinite(value) else float("inf")
                    )
        return max(found)


def replay(folder: Path, step: int, autopsy: bool = False) -> Replayed:
    """Compute a run's step again.

    Args:
        folder: the run's.
        step: counted from 1, as in its records; one step beyond the newest record may be asked for.
        autopsy: look at every operation of that step, even if all is finite.

    Raises:
        UserError: there is no such run or step, or what it began from cannot be had.
    """
    data = open_data_run([str(folder)])
    if not 1 <= step <= data.plan.steps:
        raise UserError(f"--step {step}: the run has steps 1 to {data.plan.steps}")
    config = _alone(data.config)
    parts = assemble(config, local_mesh())
    start = _begin(folder, step, parts.store, config.optimizer.freeze_step)
    scaler = LossScaler(config.training) if config.training.precision == "fp16" else None
    updates = 0
    if start is not None:
        state = start.state
        updates = state["updates"]
        if scaler is not None:
            scaler.restore(state.get("loss_scale"))
    elif config.start.path is not None:
        raise UserError(f"{folder}: began from {config.start.path}, and no checkpoint lies before step {step}")
    elif config.model.soft_prompt_text is not None and data.tokenizer is not None:
        prompt_from_tokens(parts.model, data.tokenizer.encode(config.model.soft_prompt_text))
        parts.store.refresh()
    out = Replayed(0 if start is None else start.step)
    logged = {r["step"]: r for r in read_metrics(folder / "metrics.jsonl") if r.get("kind") == "train"}
    loader = _loader(data, config)
    clip = config.optimizer.clip_grad
    for number in range(out.start, step):
        batches = loader.batch(data.plan.at(number))
        tokens = parts.count(sum(batch.num_tokens for batch in batches))
        if scaler is not None:
            parts.engine.loss_scale = scaler.scale
        if number == step - 1 and autopsy:
            out.finding = examine(parts.engine, parts.model, batches, tokens, number)
        stats = parts.engine.forward_backward(batches, tokens, number)
        if scaler is not None:
            scaler.unscale(parts.store.gradient_buffers())
        norm = parts.store.gradient_norm()
        row: dict[str, Any] = {"step": number + 1, "loss": stats.loss, "grad_norm": norm.item()}
        record = logged.get(number + 1, {})
        row |= {f"logged_{key}": record.get(key) for key in ("loss", "grad_norm")}
        out.rows.append(row)
        finite = math.isfinite(stats.loss) and math.isfinite(row["grad_norm"])
        if scaler is not None:
            scaler.update(finite)
        if finite:
            lr = learning_rate(updates, config.optimizer.lr, config.schedule, data.plan.steps)
            clipped = clip > 0 and row["grad_norm"] > clip
            parts.store.step(lr, divisor=(norm + 1e-6) / clip if clipped else None)
            parts.engine.updated()
            updates += 1
            continue
        parts.store.discard()
        if scaler is None and out.finding is None:
            out.finding = examine(parts.engine, parts.model, batches, tokens, number)
        if scaler is None and config.training.nonfinite == "stop":
            break
    if out.finding is not None and out.finding.sample is not None:
        out.documents = [
            {"data": p.prefix, "document": int(p.sequence), "offset": int(p.offset), "length": int(p.length)}
            for p in data.dataset.pieces(out.finding.sample)
        ]
    return out


def _alone(config: Config) -> Config:
    """The same run on one process."""
    from castalia.config.schema_parallel import ParallelConfig

    values = config.model_dump()
    values["parallel"] = ParallelConfig().model_dump()
    values["performance"] |= {"compile": False}
    return check_values(values, "the run's config.yaml")


def _begin(folder: Path, step: int, store: Any, freeze_step: int) -> Any:
    """Load the newest whole checkpoint that lies before the step; None: there is none, and weights are initial."""
    steps = sorted((step_of(p.name) for p in (folder / "checkpoints").glob("step-*")), key=lambda s: s or 0)
    for at in reversed([s for s in steps if s is not None and s < step]):
        try:
            found = find_checkpoint(folder / "checkpoints", at)
        except UserError:
            continue
        assert found is not None
        tensors, leave, _ = rank_states(store.tensors(), found.path)
        if leave and step > freeze_step:
            raise UserError(
                f"{folder}: from step {freeze_step + 1} on updates need what several processes exchanged "
                "(onebit_adam), and replay is one: choose an earlier step"
            )
        load_checkpoint(found.path, tensors, leave=leave)
        store.refresh()
        store.set_updates(found.state["updates"])
        return found
    return None


def _loader(data: DataRun, config: Config) -> Loader:
    eod = data.tokenizer.eod if data.tokenizer else None
    return Loader(
        data.dataset,
        data.plan,
        Shard(0, 1),
        config.micro_batch_size,
        0,
        eod,
        config.data.mask_loss_at_eod,
        vocab_size=config.model.vocab_size,
        document_mask=config.data.document_mask,
        exclusions=Exclusions(data.plan.journal, data.prefixes),
    )
