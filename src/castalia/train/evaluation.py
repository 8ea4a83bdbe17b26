"""A split's samples -> one record: loss, perplexity, bits per byte and, if asked for, per character.

Bits per byte and the perplexity per character divide the same sum of nats by what the labels
stand for, bytes or characters, so that they compare between tokenizers. Ids that stand for
no text (the end of a document) count in the loss and in neither of the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from castalia.config import Config
from castalia.data.loader import Batch
from castalia.data.plan import RunPlan, StepSpec, evaluation_spec
from castalia.data.tokenizer import Tokenizer
from castalia.errors import UserError
from castalia.evaluate.harness import find_tasks, metrics_of, run_tasks
from castalia.evaluate.subject import Subject
from castalia.evaluate.team import Ranks
from castalia.parallel.layout import Layout
from castalia.train.metrics import Record

if TYPE_CHECKING:
    from castalia.train.run import Run


def evaluate(run: Run, split: str) -> Record | None:
    """Evaluate on a split, write the record and return it; None if the split has no data. Tasks go with validations.

    Args:
        split: `valid` or `test`.
    """
    record = _evaluate_split(run, split)
    cfg = run.config.evaluation
    every = cfg.tasks_interval
    if cfg.tasks and split == "valid" and (every is None or run.step % every == 0 or run.step == run.steps):
        _evaluate_tasks(run)
    return record


def check_tasks(config: Config, layout: Layout, tokenizer: Tokenizer | None) -> None:
    """Refuse tasks that could not be evaluated, before the run begins.

    Raises:
        UserError: the harness is not installed, a task is not known, there is no tokenizer, or no process has the
            whole weights.
    """
    cfg = config.evaluation
    if not cfg.tasks:
        return
    if layout.pipeline * layout.tensor * layout.context * layout.expert > 1 or layout.zero:
        raise UserError(
            "evaluation.tasks needs the whole model in each process, which parallel.tensor, parallel.pipeline, "
            "parallel.context, parallel.expert and parallel.zero take away: leave evaluation.tasks out, and evaluate "
            "the checkpoints with `castalia evaluate RUN --all-checkpoints --tasks ...`"
        )
    if tokenizer is None:
        raise UserError("evaluation.tasks: there is no tokenizer to read them with: name it in tokenizer.path")
    if tokenizer.eod is None:
        raise UserError("evaluation.tasks: the tokenizer has no end-of-document token to begin from: leave them out")
    find_tasks(cfg.tasks, cfg.tasks_path)


def _evaluate_tasks(run: Run) -> None:
    """Evaluate on the tasks and write the record; each process has the whole model and takes its share."""
    cfg, tokenizer, model = run.config.evaluation, run.tokenizer, run.model
    assert tokenizer is not None, "check_tasks has asked for one"
    length = run.config.data.seq_length
    team = Ranks(run.mesh) if run.world.size > 1 else None
    subject = Subject(run.config.name, model, tokenizer, length, tokenizer.eod, step=run.step, team=team)
    run.beat("evaluating tasks")
    with run.store.averaged():
        results = run_tasks(
            subject,
            find_tasks(cfg.tasks, cfg.tasks_path),
            cfg.tasks_few_shot,
            cfg.tasks_limit,
            run.config.micro_batch_size,
            bootstrap=0,
            progress=lambda done, of: run.beat("evaluating tasks"),
        )
    run.metrics.write("tasks", run.step, **{f"eval/{name}": value for name, value in metrics_of(results).items()})


def _evaluate_split(run: Run, split: str) -> Record | None:
    dataset = run.data.datasets.get(split)
    if dataset is None:
        return None
    cfg = run.config
    loader = run.loader_of(dataset, RunPlan(cfg.training.batch_size, cfg.data.seq_length, 0))
    count = TextCount(run.data.token_bytes, run.tokenizer if cfg.evaluation.characters else None)

    def batches() -> Iterator[Batch]:
        for micro_batches in loader.stream_specs(samples(run, split).parts(cfg.training.batch_size)):
            for batch in micro_batches:
                run.beat("evaluating")
                count.add(batch)
                yield batch

    with run.store.averaged():
        stats = run.engine.evaluate(batches())
    count.bytes, count.characters = map(int, run.mesh.sum([count.bytes, count.characters], "replicate", "shard"))
    record = run.metrics.write(
        split,
        run.step,
        loss=stats.loss,
        bits_per_byte=stats.nll_sum / math.log(2) / count.bytes if count.bytes else None,
        perplexity=_exp(stats.loss),
        char_perplexity=_exp(stats.nll_sum / count.characters) if count.characters else None,
        tokens=stats.tokens,
    )
    run.last[split] = record
    return record


def samples(run: Run, split: str) -> StepSpec:
    """Which samples this evaluation reads; the test set is read from its start whenever it is read."""
    cfg = run.config
    interval = cfg.evaluation.interval
    # How many validations came before: one at each multiple of the interval; the one at the end may come between two.
    index = (run.step - 1) // interval if interval and split == "valid" and run.step else 0
    return evaluation_spec(
        index,
        cfg.evaluation.batches,
        cfg.training.batch_size,
        cfg.data.seq_length,
        cfg.evaluation.continuing,
    )


class TextCount:
    """How much text the labels stand for.

    Args:
        token_bytes: int32 [vocab], bytes behind each id; None: nothing is counted.
        tokenizer: to count characters; None: only bytes are counted.
    """

    def __init__(self, token_bytes: np.ndarray | None, tokenizer: Tokenizer | None) -> None:
        self.bytes = self.characters = 0
        self._table = None if token_bytes is None else torch.from_numpy(token_bytes)
        self._tokenizer = tokenizer

    def add(self, batch: Batch) -> None:
        """Count a batch's labels. A character that a sample's edge cuts counts on either side of it."""
        if self._table is None:
            return
        for row in batch.labels:
            sizes = self._table[row.clamp(min=0)] * (row >= 0)
            self.bytes += int(sizes.sum())
            if self._tokenizer is not None:
                self.characters += len(self._tokenizer.decode(row[sizes > 0].tolist()))


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # beyond that a double overflows
