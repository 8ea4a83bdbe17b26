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

from castalia.data.loader import Batch
from castalia.data.plan import RunPlan, StepSpec, evaluation_spec
from castalia.data.tokenizer import Tokenizer
from castalia.train.metrics import Record

if TYPE_CHECKING:
    from castalia.train.run import Run


def evaluate(run: Run, split: str) -> Record | None:
    """Evaluate on a split, write the record and return it; None if the split has no data.

    Args:
        split: `valid` or `test`.
    """
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
