"""Sample i as an array of ids: a store and an order, put together.

i ──order──> pieces (sequence, offset, length) ──store──> int64 [L + 1]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from castalia.data.blend import blend_index
from castalia.data.order import GPTNeoXOrder
from castalia.data.store import TokenStore
from castalia.errors import UserError

IGNORED = -100  # label of a position that is left out of the loss


class SampleSource(Protocol):
    """What a loader reads: numbered samples of seq_length + 1 ids."""

    seq_length: int

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> np.ndarray: ...


class PackedDataset:
    """Documents laid end to end and cut into samples of `seq_length + 1` ids, in GPT-NeoX's order.

    Args:
        store: the token data set.
        documents: the range (lo, hi) of sequence numbers that take part, or an array of them.
        num_samples: samples that will be asked for (see `GPTNeoXOrder`).
        seq_length: tokens the model sees, L.
        seed: seed of the order.
    """

    def __init__(
        self,
        store: TokenStore,
        documents: np.ndarray | tuple[int, int],
        num_samples: int,
        seq_length: int,
        seed: int,
    ) -> None:
        self.store = store
        self.seq_length = seq_length
        self.order = GPTNeoXOrder(store, documents, num_samples, seq_length, seed)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> np.ndarray:
        """Ids of the i-th sample served: int64 [L + 1]."""
        out = np.empty(self.seq_length + 1, np.int64)
        at = 0
        for sequence, offset, length in self.order.locate(i):
            out[at : at + length] = self.store.get(sequence, offset, length)
            at += length
        return out


class BlendedDataset:
    """Several data sets mixed by weight, as GPT-NeoX blends them.

    Args:
        datasets: the parts, each built for at least its share (`blend.blend_requests`).
        weights: one weight for each; only their ratios count.
        num_samples: samples of the blend.
    """

    def __init__(self, datasets: Sequence[PackedDataset], weights: Sequence[float], num_samples: int) -> None:
        if len(datasets) != len(weights):
            raise UserError(f"{len(datasets)} data sets have {len(weights)} weights: give one weight for each")
        lengths = {dataset.seq_length for dataset in datasets}
        if len(lengths) != 1:
            raise ValueError(f"the parts of a blend have several sequence lengths: {sorted(lengths)}")
        self.datasets = list(datasets)
        self.seq_length = lengths.pop()
        self.dataset_index, self.dataset_sample_index = blend_index(weights, num_samples)

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, i: int) -> np.ndarray:
        """Ids of the i-th sample of the blend: int64 [L + 1]."""
        if not 0 <= i < len(self):
            raise UserError(f"sample {i} was asked for, but the blend holds {len(self)} samples: ask for fewer steps")
        return self.datasets[int(self.dataset_index[i])][int(self.dataset_sample_index[i])]


def labels_of(ids: np.ndarray, eod: int | None = None) -> np.ndarray:
    """Next-token labels of ids [..., L + 1]: int64 [..., L].

    With `eod`, the label is -100 wherever the *input* token is the end of a document, as
    GPT-NeoX's `eod_mask_loss` has it: what follows another document cannot be predicted.
    """
    labels = ids[..., 1:].astype(np.int64)
    if eod is not None:
        labels[ids[..., :-1] == eod] = IGNORED
    return labels
