"""Fill-in-the-middle: documents of a sample rearranged so that a model learns to fill gaps.

    document   P M S eod      cut at two places between tokens, each uniform over the n + 1 there are
    PSM        <prefix> P <suffix> S <middle> M eod
    SPM        <prefix> <suffix> S <middle> P M eod

Bavarian et al., "Efficient Training of Language Models to Fill in the Middle" (2022), sections 3
and 3.1: applied after packing, to each part of a document that a sample has ("context-level"
there), so that whole sentinels are seen; the middle comes last, and SPM shares the sentinels of
PSM. They cut between characters, here between tokens: the ids of a prepared data set stay valid.
The sample grows by three sentinels for each part that is rearranged, and what exceeds its length
falls off. Everything follows from the seed, the sample's number in the run and the part's place in it.
"""

from __future__ import annotations

import hashlib

import numpy as np

from castalia.data.sample import IGNORED, SampleSource, SourcePiece
from castalia.data.tokenizer import Tokenizer, special_tokens
from castalia.errors import UserError

_RECENT = 256  # samples that are remembered: ids, labels and pieces are asked for in turn


class FillInMiddle:
    """Samples of another source, their documents rearranged at random; a `SampleSource`.

    Args:
        dataset: the samples; labels of its own are not kept, but that padding is not learnt.
        rate: share of the documents that are rearranged.
        spm_rate: share of these that are written suffix first.
        sentinels: ids of prefix, suffix and middle.
        eod: id that ends a document, which stays last; None: there is none.
        seed: of the choices and cuts.
    """

    def __init__(
        self,
        dataset: SampleSource,
        rate: float,
        spm_rate: float,
        sentinels: tuple[int, int, int],
        eod: int | None,
        seed: int,
    ) -> None:
        self.dataset = dataset
        self.seq_length = dataset.seq_length
        self.rate, self.spm_rate, self.sentinels, self.eod, self.seed = rate, spm_rate, sentinels, eod, seed
        self._recent: dict[int, list[np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> np.ndarray:
        """See SampleSource."""
        return self._filled(i, 0)

    def labels(self, i: int) -> np.ndarray | None:
        """See SampleSource."""
        whole = sum(map(len, self._parts(i))) == self.seq_length + 1
        return None if whole else self._filled(i, IGNORED)

    def pieces(self, i: int) -> list[SourcePiece]:
        """See SampleSource; lengths are those in the sample, sentinels included."""
        parts = zip(self.dataset.pieces(i), self._parts(i), strict=False)
        return [piece._replace(length=len(part)) for piece, part in parts]

    def find(self, prefix: str, sequence: int) -> np.ndarray:
        """See SampleSource; of a document that is last in a sample, nothing may be left in it."""
        return self.dataset.find(prefix, sequence)

    def _filled(self, i: int, padding: int) -> np.ndarray:
        out = np.full(self.seq_length + 1, padding, np.int64)
        ids = np.concatenate(self._parts(i))
        out[: len(ids)] = ids
        return out

    def _parts(self, i: int) -> list[np.ndarray]:
        """The parts of sample `i` as they are served, together at most L + 1 ids."""
        found = self._recent.get(i)
        if found is None:
            ids, at, room, found = self.dataset[i], 0, self.seq_length + 1, []
            for k, piece in enumerate(self.dataset.pieces(i)):
                if not room:
                    break
                found.append(self._rearranged(ids[at : at + piece.length], i, k)[:room])
                at += piece.length
                room -= len(found[-1])
            if len(self._recent) >= _RECENT:
                self._recent.clear()
            self._recent[i] = found
        return found

    def _rearranged(self, ids: np.ndarray, i: int, k: int) -> np.ndarray:
        """Part k of sample i, or the part as it is where it is not chosen or empty: int64."""
        # A hash and not numpy's generators, whose streams may change between releases.
        key = f"castalia fim 1 seed {self.seed} sample {i} part {k}"
        digest = hashlib.blake2b(key.encode(), digest_size=32).digest()
        chosen, suffix_first, *cuts = np.frombuffer(digest, "<u8").tolist()
        ended = len(ids) > 0 and self.eod is not None and int(ids[-1]) == self.eod
        text, end = (ids[:-1], ids[-1:]) if ended else (ids, ids[:0])
        if not len(text) or chosen >= self.rate * 2**64:
            return ids
        a, b = sorted(cut % (len(text) + 1) for cut in cuts)
        prefix, middle, suffix = text[:a], text[a:b], text[b:]
        pre, suf, mid = ([sentinel] for sentinel in self.sentinels)
        if suffix_first < self.spm_rate * 2**64:
            return np.concatenate([pre, suf, suffix, mid, prefix, middle, end])
        return np.concatenate([pre, prefix, suf, suffix, mid, middle, end])


def sentinel_ids(names: list[str], tokenizer: Tokenizer | None) -> tuple[int, int, int]:
    """Ids of the sentinels of prefix, suffix and middle.

    Raises:
        UserError: there is no tokenizer, or it lacks one of them.
    """
    if tokenizer is None:
        raise UserError("data.fim_rate: there is no tokenizer to look sentinels up in: name it in tokenizer.path")
    known = special_tokens(tokenizer)
    missing = [name for name in names if name not in known]
    if missing:
        raise UserError(
            f"data.fim_tokens: the tokenizer has no special token {missing[0]!r}: name its tokens for prefix, suffix "
            "and middle, or prepare the data with a tokenizer that has them"
        )
    return known[names[0]], known[names[1]], known[names[2]]
