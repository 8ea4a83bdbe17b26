"""Sample i as an array of ids: a store and an order, put together.

i ──order──> pieces (sequence, offset, length) ──┬─store──> ids int64 [L + 1], padded with 0
                                                 └─label store, in lock step──> labels int64 [L + 1], with -100
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from castalia.data.blend import TableBlend
from castalia.data.blend_tree import ComputedBlend
from castalia.data.order import GPTNeoXOrder, Piece
from castalia.data.order_permutation import PermutationOrder
from castalia.data.packing import DocumentOrder
from castalia.data.store import TokenStore
from castalia.errors import UserError

IGNORED = -100  # label of a position that is left out of the loss
_RECENT = 256  # samples whose pieces are remembered: ids, labels and documents of a micro-batch are asked for in turn
ORDERS: Mapping[str, type[Any]] = {"gptneox": GPTNeoXOrder, "permutation": PermutationOrder}


class SourcePiece(NamedTuple):
    """Part of a sample: ids [offset, offset + length) of one sequence of the data set `prefix`."""

    prefix: str
    sequence: int
    offset: int
    length: int


class SampleSource(Protocol):
    """What a loader reads: numbered samples of seq_length + 1 ids."""

    seq_length: int

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> np.ndarray:
        """Ids of sample i: int64 [L + 1], 0 where it is padded."""
        ...

    def labels(self, i: int) -> np.ndarray | None:
        """What is to be learnt at each id of sample i, -100 where nothing is: int64 [L + 1]; None: every id."""
        ...

    def pieces(self, i: int) -> list[SourcePiece]:
        """Where the ids of sample i lie, in order: one piece for each document; what they leave is padding."""
        ...

    def find(self, prefix: str, sequence: int) -> np.ndarray:
        """Numbers of the samples that hold any id of a sequence: int64, ascending."""
        ...


class PackedDataset:
    """Documents packed into samples of `seq_length + 1` ids.

    Args:
        store: the token data set.
        documents: the range (lo, hi) of sequence numbers that take part, or an array of them.
        num_samples: samples that will be asked for (see `GPTNeoXOrder`).
        seq_length: tokens the model sees, L.
        seed: seed of the order.
        order: which order, of `ORDERS`.
        labels: a data set in lock step with `store`: the id itself where it is to be learnt, else -100.
        packing: packed (documents end to end, cut every `seq_length` tokens), pack_until_overflow or
            unpacked (whole documents, padded; see `DocumentOrder`).
        allow_chopped: whole documents: cut one that is longer than a sample; False leaves it out.

    Raises:
        UserError: the documents hold no token, or `labels` is not in lock step.
    """

    def __init__(
        self,
        store: TokenStore,
        documents: np.ndarray | tuple[int, int],
        num_samples: int,
        seq_length: int,
        seed: int,
        order: str = "gptneox",
        labels: TokenStore | None = None,
        packing: str = "packed",
        allow_chopped: bool = True,
    ) -> None:
        if labels is not None:
            _check_lock_step(store, labels)
        self.store = store
        self.label_store = labels
        self.documents = documents
        self.seq_length = seq_length
        self.order: Any = (
            ORDERS[order](store, documents, num_samples, seq_length, seed)
            if packing == "packed"
            else DocumentOrder(store, documents, num_samples, seq_length, seed, order, packing, allow_chopped, labels)
        )
        self._recent: dict[int, list[Piece]] = {}

    def __len__(self) -> int:
        return len(self.order)

    @property
    def num_tokens(self) -> int:
        """Tokens of the documents that take part."""
        if isinstance(self.documents, tuple):
            # By the pointers of the index: the sizes need not be read.
            unit, store = self.store.dtype.itemsize, self.store
            ends = [int(store.pointers[i]) // unit if i < len(store) else store.num_tokens for i in self.documents]
            return ends[1] - ends[0]
        return int(self.store.sizes[self.documents].sum(dtype=np.int64))

    def times_read(self, samples: int) -> float:
        """How often `samples` samples go through the documents."""
        if isinstance(self.order, DocumentOrder):
            return self.order.times_read(samples)
        return samples * self.seq_length / self.num_tokens

    def __getitem__(self, i: int) -> np.ndarray:
        """Ids of the i-th sample served: int64 [L + 1]."""
        return self._read(self.store, i, 0)

    def labels(self, i: int) -> np.ndarray | None:
        """See SampleSource."""
        if self.label_store is not None:
            return self._read(self.label_store, i, IGNORED)
        # Without labels of its own only a padded sample has some that are not learnt.
        whole = sum(piece.length for piece in self._locate(i)) == self.seq_length + 1
        return None if whole else self._read(self.store, i, IGNORED)

    def pieces(self, i: int) -> list[SourcePiece]:
        """See SampleSource."""
        return [SourcePiece(self.store.prefix, *piece) for piece in self._locate(i)]

    def find(self, prefix: str, sequence: int) -> np.ndarray:
        """See SampleSource."""
        return self.order.find(sequence) if prefix == self.store.prefix else np.empty(0, np.int64)

    def _locate(self, i: int) -> list[Piece]:
        found = self._recent.get(i)
        if found is None:
            found = self.order.locate(i)
            if len(self._recent) >= _RECENT:
                self._recent.clear()
            self._recent[i] = found
        return found

    def _read(self, store: TokenStore, i: int, padding: int) -> np.ndarray:
        out = np.empty(self.seq_length + 1, np.int64)
        at = 0
        for sequence, offset, length in self._locate(i):
            out[at : at + length] = store.get(sequence, offset, length)
            at += length
        out[at:] = padding
        return out


def _check_lock_step(store: TokenStore, labels: TokenStore) -> None:
    if len(store) != len(labels):
        what = f"has {len(labels)} documents and {store.prefix} {len(store)}"
    elif (odd := np.flatnonzero(store.sizes != labels.sizes)).size:
        first = int(odd[0])
        sizes = int(labels.sizes[first]), int(store.sizes[first])
        what = f"has {sizes[0]} labels in document {first}, where {store.prefix} has {sizes[1]} ids"
    else:
        return
    raise UserError(f"{labels.prefix} {what}: labels go with ids one by one, so prepare both from the same text")


class BlendedDataset:
    """Several data sets mixed by weight.

    Args:
        datasets: the parts, each built for at least its share (`blend.blend_requests`, `ComputedBlend.taken`).
        weights: one weight for each; only their ratios count.
        num_samples: samples of the blend.
        order: gptneox blends as GPT-NeoX does, by tables; permutation computes.
    """

    def __init__(
        self, datasets: Sequence[PackedDataset], weights: Sequence[float], num_samples: int, order: str = "gptneox"
    ) -> None:
        if len(datasets) != len(weights):
            raise UserError(f"{len(datasets)} data sets have {len(weights)} weights: give one weight for each")
        lengths = {dataset.seq_length for dataset in datasets}
        if len(lengths) != 1:
            raise ValueError(f"the parts of a blend have several sequence lengths: {sorted(lengths)}")
        self.datasets = list(datasets)
        self.seq_length = lengths.pop()
        self.blend = (TableBlend if order == "gptneox" else ComputedBlend)(weights, num_samples)

    def __len__(self) -> int:
        return len(self.blend)

    def __getitem__(self, i: int) -> np.ndarray:
        """Ids of the i-th sample of the blend: int64 [L + 1]."""
        part, number = self._part(i)
        return part[number]

    def labels(self, i: int) -> np.ndarray | None:
        """See SampleSource."""
        part, number = self._part(i)
        return part.labels(number)

    def pieces(self, i: int) -> list[SourcePiece]:
        """See SampleSource."""
        part, number = self._part(i)
        return part.pieces(number)

    def find(self, prefix: str, sequence: int) -> np.ndarray:
        """See SampleSource."""
        found = [np.empty(0, np.int64)]
        for k, part in enumerate(self.datasets):
            mine = part.find(prefix, sequence)
            if mine.size:
                found.append(self.blend.numbers(k, mine))
        return np.sort(np.concatenate(found))

    def _part(self, i: int) -> tuple[PackedDataset, int]:
        if not 0 <= i < len(self):
            raise UserError(f"sample {i} was asked for, but the blend holds {len(self)} samples: ask for fewer steps")
        k, number = self.blend.at(i)
        return self.datasets[k], number


def labels_of(ids: np.ndarray, eod: int | None = None, learnt: np.ndarray | None = None) -> np.ndarray:
    """Next-token labels of ids [..., L + 1]: int64 [..., L].

    Args:
        eod: the label is -100 wherever the *input* token is this one, the end of a document, as GPT-NeoX's
            `eod_mask_loss` has it: what follows another document cannot be predicted.
        learnt: labels of the same shape as `ids`, not yet shifted, negative where nothing is learnt; None: the ids.
    """
    labels = (ids if learnt is None else learnt)[..., 1:].astype(np.int64)
    if learnt is not None:
        labels[labels < 0] = IGNORED
    if eod is not None:
        labels[ids[..., :-1] == eod] = IGNORED
    return labels
