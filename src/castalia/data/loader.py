"""From a step's specification to this rank's micro-batches, read ahead in a thread.

    StepSpec ──> sample numbers of this rank ──dataset──> ids [b, L+1] ──> Batch(tokens, labels)

The samples of a step depend on the plan alone. Which rank and micro-step takes which follows
GPT-NeoX's loader: micro-step g of rank r takes the r-th slice of `micro_batch_size` samples
of the g-th global micro-batch.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from castalia.data.exclusions import Exclusions
from castalia.data.plan import RunPlan, StepSpec
from castalia.data.sample import IGNORED, SampleSource, SourcePiece, labels_of
from castalia.errors import UserError


@dataclass
class Batch:
    """One micro-batch of one rank.

    Attributes:
        tokens: int64 [b, s], the model's input.
        labels: int64 [b, s], the id to predict at each position; -100 is left out of the loss.
        positions: int64 [b, s], 0..s-1 in every row; from 0 on in each document where doc_ids is given.
        doc_ids: int32 [b, s], which document each token belongs to, or None: all one document.
        extras: further tensors by name, such as rewards.
        sample_ids: int64 [b], the global number of each row's sample, on which dropout depends; None
            where nobody numbered them.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    doc_ids: torch.Tensor | None = None
    extras: dict[str, Any] = field(default_factory=dict)
    sample_ids: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Labels that count in the loss."""
        return int((self.labels != IGNORED).sum())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""

        def move(value: Any) -> Any:
            return value.to(device, non_blocking=non_blocking) if isinstance(value, torch.Tensor) else value

        return Batch(
            move(self.tokens),
            move(self.labels),
            move(self.positions),
            move(self.doc_ids),
            {name: move(value) for name, value in self.extras.items()},
            move(self.sample_ids),
        )


@dataclass(frozen=True)
class Shard:
    """A data-parallel coordinate: the `rank`-th of `world` replicas."""

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank {self.rank} of a world of {self.world}")


class Loader:
    """Gives one data-parallel rank its micro-batches.

    Args:
        dataset: numbered samples of L + 1 ids.
        plan: the plan of steps, which `stream` follows.
        shard: this rank's place among the data-parallel replicas.
        micro_batch_size: sequences per forward pass and device.
        prefetch: steps that `stream` reads ahead in a thread; 0 reads in the caller.
        eod: id that ends a document; needed with `eod_mask_loss`.
        eod_mask_loss: leave out of the loss what follows the end of a document.
        vocab_size: ids must lie below it; None: not checked.
        document_mask: tell documents apart in `doc_ids`, and count positions from the start of each part of
            a document, by where the documents lie in the data set and not by an id.
        exclusions: documents that are not learnt, by step; None: there are none.

    Raises:
        UserError: a batch does not divide into micro-batches of all ranks, samples are shorter
            than the plan's sequences, or `eod_mask_loss` lacks an `eod`.
    """

    def __init__(
        self,
        dataset: SampleSource,
        plan: RunPlan,
        shard: Shard,
        micro_batch_size: int,
        prefetch: int = 2,
        eod: int | None = None,
        eod_mask_loss: bool = False,
        vocab_size: int | None = None,
        document_mask: bool = False,
        exclusions: Exclusions | None = None,
    ) -> None:
        if eod_mask_loss and eod is None:
            raise UserError(
                "data.mask_loss_at_eod needs a tokenizer with an end-of-document token, and this one has none"
            )
        if plan.seq_length > dataset.seq_length:
            raise UserError(
                f"the plan's sequences of {plan.seq_length} tokens are longer than the data set's samples "
                f"of {dataset.seq_length}: raise data.seq_length"
            )
        self.dataset = dataset
        self.plan = plan
        self.shard = shard
        self.micro_batch_size = micro_batch_size
        self.prefetch = prefetch
        self.vocab_size = vocab_size
        self.document_mask = document_mask
        self.exclusions = exclusions
        self.mask_eod = eod if eod_mask_loss else None
        for size in plan.sizes:
            self.sample_numbers(StepSpec(0, 0, size, plan.seq_length))  # refuse a bad division now

    def sample_numbers(self, spec: StepSpec) -> np.ndarray:
        """Numbers of this rank's samples of a step: int64 [micro-steps, micro_batch_size]."""
        together = self.shard.world * self.micro_batch_size
        if spec.num_samples % together:
            raise UserError(
                f"a batch of {spec.num_samples} sequences does not divide into micro-batches of "
                f"{self.micro_batch_size} on {self.shard.world} replicas: "
                f"make training.batch_size a multiple of {together}"
            )
        numbers = np.arange(spec.first_sample, spec.first_sample + spec.num_samples)
        return numbers.reshape(-1, self.shard.world, self.micro_batch_size)[:, self.shard.rank]

    def batch(self, spec: StepSpec) -> list[Batch]:
        """This rank's micro-batches of a step, in the order of its forward passes."""
        return [self._micro_batch(numbers, spec) for numbers in self.sample_numbers(spec)]

    def _micro_batch(self, numbers: np.ndarray, spec: StepSpec) -> Batch:
        seq_length = spec.seq_length
        ids = np.stack([self.dataset[int(i)][: seq_length + 1] for i in numbers])
        self._check_vocabulary(ids, numbers)
        learnt = self._learnt(ids, numbers, spec.step)
        positions, doc_ids = torch.arange(seq_length).repeat(len(ids), 1), None
        if self.document_mask:
            parts = [documents_of(self.dataset.pieces(int(i)), seq_length) for i in numbers]
            positions = torch.from_numpy(np.stack([part[0] for part in parts]))
            doc_ids = torch.from_numpy(np.stack([part[1] for part in parts]))
        return Batch(
            tokens=torch.from_numpy(np.ascontiguousarray(ids[:, :-1])),
            labels=torch.from_numpy(labels_of(ids, self.mask_eod, learnt)),
            positions=positions,
            doc_ids=doc_ids,
            sample_ids=torch.from_numpy(numbers.astype(np.int64)),
        )

    def _learnt(self, ids: np.ndarray, numbers: np.ndarray, step: int) -> np.ndarray | None:
        """What is to be learnt at each id where that is not all, int64 as `ids`; None: every id."""
        given = [self.dataset.labels(int(i)) for i in numbers]
        excluded = self.exclusions is not None and self.exclusions.any(step)
        if all(row is None for row in given) and not excluded:
            return None
        learnt = np.stack([own if row is None else row[: ids.shape[1]] for row, own in zip(given, ids, strict=True)])
        self._check_vocabulary(np.maximum(learnt, 0), numbers)
        if self.exclusions is not None and excluded:
            for row, i in zip(learnt, numbers, strict=True):
                row[self.exclusions.mask(step, self.dataset.pieces(int(i)), len(row))] = IGNORED
        return learnt

    def _check_vocabulary(self, ids: np.ndarray, numbers: np.ndarray) -> None:
        if self.vocab_size is not None and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            row = int(np.argmax(((ids < 0) | (ids >= self.vocab_size)).any(1)))
            odd = ids[row][(ids[row] < 0) | (ids[row] >= self.vocab_size)][0]
            raise UserError(
                f"sample {numbers[row]} of the data holds id {odd}, but model.vocab_size is {self.vocab_size}: "
                "raise it, or name the data set that was made for this model"
            )

    def stream(self, first_step: int, last_step: int) -> Generator[list[Batch], None, None]:
        """Micro-batches of the plan's steps [first_step, last_step), one list per step.

        Closing the iterator, or leaving its loop, stops the thread that reads ahead; an
        exception in that thread is raised here.
        """
        return self.stream_specs(self.plan.at(step) for step in range(first_step, last_step))

    def stream_specs(self, specs: Iterable[StepSpec]) -> Generator[list[Batch], None, None]:
        """As `stream`, for any specs, such as those of an evaluation."""
        if self.prefetch < 1:
            return (self.batch(spec) for spec in specs)
        return self._read_ahead(specs)

    def _read_ahead(self, specs: Iterable[StepSpec]) -> Generator[list[Batch], None, None]:
        # One sentinel type per outcome keeps a None or an exception from passing for data.
        ready: queue.Queue[list[Batch] | _End] = queue.Queue(self.prefetch)
        stop = threading.Event()

        def put(item: list[Batch] | _End) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def work() -> None:
            try:
                for spec in specs:
                    if stop.is_set():
                        return
                    put(self.batch(spec))
            except BaseException as error:  # handed to the consumer, who raises it
                put(_End(error))
            else:
                put(_End(None))

        thread = threading.Thread(target=work, name="castalia-loader", daemon=True)
        thread.start()
        try:
            while not isinstance(item := ready.get(), _End):
                yield item
            if item.error is not None:
                raise item.error
        finally:
            stop.set()
            thread.join()


def documents_of(pieces: Sequence[SourcePiece], seq_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions int64 [s], from 0 on in each piece, and the number of each token's piece, int32 [s]."""
    ends = np.cumsum([piece.length for piece in pieces])
    at = np.arange(seq_length)
    number = np.searchsorted(ends, at, side="right")
    return at - np.concatenate(([0], ends))[number], number.astype(np.int32)


@dataclass(frozen=True)
class _End:
    """Last item of the queue: the specs are exhausted, or reading them failed."""

    error: BaseException | None
