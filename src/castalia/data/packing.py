"""Which whole documents make up sample i, where samples are not cut from one stream.

    documents ──left out: empty, nothing learnt, too long──> doc_idx, in the order in which they are packed
    pack_until_overflow: a sample takes documents until the next one does not fit into L + 1 ids
    unpacked:            a sample takes one document
    doc_idx cut at `starts` into packs ──shuffled──> the i-th sample served; what it lacks is padding

With `order: gptneox` the packs and their order are those of GPT-NeoX's `pack_impl`, of which three
defects are mended: a sample had one token of the next sample's first document at its end; validation
and test took the numbers of training documents; a left-out document at the end of a round was an error. With
`order: permutation` documents are packed once, as they lie in the file, and every epoch serves
all packs by a keyed permutation, so that a longer run goes on where a shorter one stopped.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from castalia.data.order import Piece, sizes_digest
from castalia.data.order_cache import Arrays, shared_arrays
from castalia.data.order_permutation import Permutation
from castalia.data.store import TokenStore, data_fingerprint
from castalia.errors import UserError

_SHARED_FROM = 1 << 20  # entries from which on packs are worth a file
_PART = 1 << 22  # labels read at once, and the fewest documents packed at once (a 64th of it)


class DocumentOrder:
    """The order in which samples of whole documents are served; the interface is that of `GPTNeoXOrder`.

    Args:
        store: the token data set.
        documents: sequence numbers that take part: a range (lo, hi), or an array.
        num_samples: samples that will be asked for.
        seq_length: L, tokens a model sees; a sample has L + 1, and a longer document is cut there.
        seed: seed of the order.
        order: gptneox | permutation.
        packing: pack_until_overflow | unpacked.
        allow_chopped: False leaves documents of more than L + 1 tokens out.
        labels: what is learnt of `store`, in lock step; documents without any label are left out.

    Attributes:
        num_documents: documents that take part, but for those left out.
        num_packs: packs that were made: for `unpacked` and `permutation` those of one epoch, else of the run.
        num_epochs: times that the documents are gone through, the last one perhaps in part.
        doc_idx: int32, sequence numbers in the order of packing.
        starts: places of doc_idx where the packs begin, and where the last one ends.

    Raises:
        UserError: no document is left.
    """

    def __init__(
        self,
        store: TokenStore,
        documents: np.ndarray | tuple[int, int],
        num_samples: int,
        seq_length: int,
        seed: int,
        order: str = "gptneox",
        packing: str = "pack_until_overflow",
        allow_chopped: bool = True,
        labels: TokenStore | None = None,
    ) -> None:
        if seq_length < 1 or num_samples < 0:
            raise ValueError(f"seq_length {seq_length} and num_samples {num_samples} must not be below 1 and 0")
        if store.lazy:
            store.check()  # every size is about to be used
        self.num_samples, self.seq_length, self.seed = num_samples, seq_length, seed
        rounds = order == "gptneox" and packing == "pack_until_overflow"  # else every epoch has the same packs

        def make() -> Arrays:
            numbers = np.arange(*documents) if isinstance(documents, tuple) else np.asarray(documents)
            keep = _kept(store, numbers, seq_length, allow_chopped, labels, packing)
            if not keep.any():
                raise UserError(
                    f"{store.prefix}: none of the {len(numbers)} documents of this part can be a sample: they are "
                    "empty, have no label, or exceed data.seq_length where data.allow_chopped is false"
                )
            arrays = {"kept": np.array([keep.sum()])}
            if order == "gptneox":
                random = np.random.RandomState(seed)
                samples = np.arange(num_samples)
                random.shuffle(samples)
                arrays["shuffle_idx"] = samples
            if rounds:
                places, starts = _pack_rounds(store.sizes[numbers], keep, seq_length + 1, max(1, num_samples), random)
                arrays |= {"doc_idx": numbers[places].astype(np.int32), "starts": starts}
            else:
                arrays["doc_idx"] = numbers[keep].astype(np.int32)
                if packing == "pack_until_overflow":
                    starts = _pack(store.sizes[arrays["doc_idx"]], seq_length + 1)
                    arrays["starts"] = np.append(starts, len(arrays["doc_idx"]))
            return arrays

        number = len(range(*documents)) if isinstance(documents, tuple) else 0
        if number + num_samples >= _SHARED_FROM and isinstance(documents, tuple):
            # What a permutation packs does not depend on the run's length or seed.
            own = {"samples": num_samples, "seed": seed} if order == "gptneox" else {}
            key = {
                "order": f"{order} {packing} 1",
                "sizes": sizes_digest(store, *documents),
                "documents": [int(edge) for edge in documents],
                "seq_length": seq_length,
                "chopped": allow_chopped,
                "labels": None if labels is None else data_fingerprint(labels),
                **own,
            }
            arrays = shared_arrays(key, make)
        else:
            arrays = make()
        self.doc_idx: np.ndarray = arrays["doc_idx"]
        self.shuffle_idx: np.ndarray | None = arrays.get("shuffle_idx")
        self.starts: Sequence[int] | np.ndarray = arrays.get("starts", range(len(self.doc_idx) + 1))
        self._sizes = store.sizes
        self._made: tuple[int, Permutation] | None = None  # of the epoch last asked for
        self.num_documents = int(arrays["kept"][0])
        self.num_packs = len(self.starts) - 1
        passed = -(-len(self.doc_idx) // self.num_documents)
        self.num_epochs = passed if rounds else max(1, -(-num_samples // self.num_packs))

    def __len__(self) -> int:
        """Samples that may be asked for; with GPT-NeoX's order those requested (it serves one less)."""
        return self.num_samples if self.shuffle_idx is not None else self.num_epochs * self.num_packs

    def sample(self, i: int) -> int:
        """The how-manieth pack the i-th sample served is, counted on over the epochs.

        Raises:
            UserError: beyond what was asked for.
        """
        if not 0 <= i < len(self):
            raise UserError(
                f"sample {i} was asked for, but the data order holds {len(self)} samples: "
                f"ask for fewer steps, or build the order for more samples"
            )
        if self.shuffle_idx is not None:
            return int(self.shuffle_idx[i])
        epoch, at = divmod(i, self.num_packs)
        return epoch * self.num_packs + self._permutation(epoch)(at)

    def locate(self, i: int) -> list[Piece]:
        """Where the ids of the i-th sample served lie: at most L + 1, fewer where it is padded."""
        pack = self.sample(i) % self.num_packs
        documents = self.doc_idx[self.starts[pack] : self.starts[pack + 1]].tolist()
        return [Piece(d, 0, min(int(self._sizes[d]), self.seq_length + 1)) for d in documents]

    def find(self, sequence: int) -> np.ndarray:
        """Numbers of the samples that hold a sequence: int64, ascending."""
        packs = [bisect_right(self.starts, at) - 1 for at in np.flatnonzero(self.doc_idx == sequence).tolist()]
        if self.shuffle_idx is not None:
            return np.flatnonzero(np.isin(self.shuffle_idx % self.num_packs, packs))
        found = [
            self._permutation(epoch).inverse_map(np.array(packs, np.int64)) + epoch * self.num_packs
            for epoch in range(self.num_epochs)
        ]
        return np.sort(np.concatenate(found))

    def times_read(self, samples: int) -> float:
        """How often `samples` samples go through the documents."""
        return samples * len(self.doc_idx) / self.num_packs / self.num_documents

    def _permutation(self, epoch: int) -> Permutation:
        made = self._made
        if made is None or made[0] != epoch:
            made = epoch, Permutation(self.num_packs, f"castalia packs 1 seed {self.seed} epoch {epoch}")
            self._made = made
        return made[1]


def _kept(
    store: TokenStore,
    numbers: np.ndarray,
    seq_length: int,
    allow_chopped: bool,
    labels: TokenStore | None,
    packing: str,
) -> np.ndarray:
    """Which of the documents can be samples: bool, of the shape of `numbers`."""
    sizes = store.sizes[numbers]
    keep: np.ndarray = sizes > 0
    if not allow_chopped:
        keep &= sizes <= seq_length + 1
    if labels is not None and len(numbers):
        # GPT-NeoX looks for a label among the first L ids of an unpacked document, else among L + 1.
        reach = seq_length + (packing != "unpacked")
        keep &= _has_label(labels, int(numbers.min()), int(numbers.max()) + 1, reach)[numbers - numbers.min()]
    return keep


def _has_label(labels: TokenStore, low: int, high: int, reach: int) -> np.ndarray:
    """Whether any of the first `reach` labels of documents [low, high) is to be learnt: bool [high - low]."""
    found = np.zeros(high - low, bool)
    begins = labels.pointers[low:high] // labels.dtype.itemsize
    sizes = labels.sizes[low:high].astype(np.int64)
    at = 0
    while at < len(found):  # whole documents, about _PART labels of them
        end = max(at + 1, int(np.searchsorted(begins, begins[at] + _PART)))
        first = int(begins[at])
        learnt = labels.tokens[first : int(begins[end - 1] + sizes[end - 1])] >= 0
        before = np.concatenate(([0], np.cumsum(learnt)))
        starts = begins[at:end] - first
        found[at:end] = before[starts + np.minimum(sizes[at:end], reach)] > before[starts]
        at = end
    return found


def _pack(sizes: np.ndarray, room: int) -> np.ndarray:
    """Places where packs begin if each takes documents until the next one exceeds `room`: int64, the first is 0.

    For every document a binary search finds where a pack that began with it would end; then
    the packs are followed from the first, one look-up each.
    """
    ends = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
    following = np.searchsorted(ends, ends[:-1] + room, side="right") - 1
    np.maximum(following, np.arange(1, len(ends)), out=following)  # longer than the room: alone
    starts, at, follow = array("q"), 0, following.data
    while at < len(sizes):
        starts.append(at)
        at = follow[at]
    return np.array(starts, np.int64)


def _pack_rounds(
    sizes: np.ndarray, keep: np.ndarray, room: int, num_packs: int, random: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray]:
    """Packs of documents shuffled anew for each round, without a break between the rounds.

    Args:
        sizes: int32 [N].
        keep: bool [N], documents that are packed; all are shuffled.
        num_packs: packs to make, all but perhaps the last full.

    Returns:
        Documents in the order of packing, numbered 0..N-1, and the `num_packs + 1` edges of the packs among them.
    """
    turn, tokens = np.arange(len(sizes)), int(sizes[keep].sum(dtype=np.int64))
    packed, edges = [], []
    rest, done, found = np.empty(0, np.int64), 0, 0
    while found < num_packs:
        rounds = [rest]
        wanted = min((num_packs - found) * room // tokens, (_PART >> 6) // len(sizes))
        for _ in range(max(1, wanted)):  # small data sets: many rounds at once
            random.shuffle(turn)
            rounds.append(turn[keep[turn]])
        documents = np.concatenate(rounds)
        starts = _pack(sizes[documents], room)
        # The last pack may go on with the next round's documents.
        packed.append(documents[: starts[-1]])
        edges.append(starts[:-1] + done)
        rest, done, found = documents[starts[-1] :], done + int(starts[-1]), found + len(starts) - 1
    every = np.append(np.concatenate(edges), done)[: num_packs + 1]
    return np.concatenate(packed)[: every[-1]], every
