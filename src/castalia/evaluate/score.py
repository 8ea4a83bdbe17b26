"""Token sequences with a marked end -> the log-likelihood of that end, in batches that change nothing.

    context [c0 c1 c2]  continuation [t0 t1]
    inputs   c0 c1 c2 t0                       each distinct row of inputs runs once
    scored         t0 t1                       by the hidden states of the last len(continuation) inputs

Rows are right-padded, which a causal model does not see, and sorted by length. Continuations of
one context, as of a question with several answers, share what lies before them: it runs once per
context, and its keys and values serve all rows.

    prefix [contexts, m] ──> keys, values ──repeated──> rest of the rows [rows, longest - m]

Log-probabilities are of the tokenizer's ids alone (the padding of the vocabulary takes no part), in
fp32, and their sums in fp64.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from castalia.errors import UserError
from castalia.model.transformer import Transformer

if TYPE_CHECKING:
    from castalia.generate.decoder import Decoder

MOST_TOKENS = 16_384
"""Places of a batch, padding included, at most; a single row may have more."""
_WORTHWHILE = 64  # tokens that sharing a prefix must save in a batch, since it costs a second forward pass
_LOGIT_ROWS = 256
Progress = Callable[[int, int], None]


class Request(NamedTuple):
    """What is to be scored: ids of the continuation, given those of the context (at least one each)."""

    context: Sequence[int]
    continuation: Sequence[int]


class Scored(NamedTuple):
    """What a model says of a continuation.

    Attributes:
        logprob: natural log-probability, summed over its tokens.
        greedy: each of its tokens is the most probable one, so that greedy generation would give it.
    """

    logprob: float
    greedy: bool


@dataclass
class _Row:
    """Inputs, and who asks for what at their end."""

    inputs: tuple[int, ...]
    context: int
    asked: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)

    @property
    def scored(self) -> int:
        return max(len(targets) for _, targets in self.asked)


class Whole:
    """A model that this process has in whole."""

    shares = True

    def __init__(self, model: Transformer) -> None:
        self.model, self.device = model, model.head_weight.device

    def hidden(self, tokens: Tensor, cache: PrefixCache | None = None) -> Tensor | None:
        """`[B, S, h]`."""
        return self.model(tokens, None, cache)

    def logits(self, hidden: Tensor | None, rows: int) -> Tensor:
        """fp32 `[rows, V]`."""
        assert hidden is not None
        return self.model.logits(hidden)


class Part:
    """One rank's part of a model; all ranks score the same requests, and have the same logits."""

    shares = False

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.model, self.device = decoder, decoder.model, decoder.device

    def hidden(self, tokens: Tensor, cache: PrefixCache | None = None) -> Tensor | None:
        """`[B, S, h]` before the final norm; None on a rank that is not of the last stage."""
        return self.decoder.hidden(tokens)

    def logits(self, hidden: Tensor | None, rows: int) -> Tensor:
        """fp32 `[rows, V]`, on every rank."""
        return self.decoder.logits(hidden, rows)


def score(
    model: Transformer | Decoder,
    requests: Sequence[Request],
    vocab_size: int,
    max_length: int,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> list[Scored]:
    """Score continuations; a context that is too long loses its beginning.

    Args:
        model: with weights, on its device; or the decoder of one rank's part, and then each rank scores all.
        requests: in any order.
        vocab_size: ids of the tokenizer; those of the model beyond are padding.
        max_length: most inputs that the model sees at once.
        batch_size: most rows of a forward pass. It is a matter of speed: results differ by rounding alone.
        progress: called with (requests done, all of them).

    Returns:
        One for each request, in order.

    Raises:
        UserError: a continuation alone is longer than max_length, or an id is outside the vocabulary.
    """
    found: list[Scored | None] = [None] * len(requests)
    runner, done = Whole(model) if isinstance(model, Transformer) else Part(model), 0
    with inference(runner.model):
        for batch in _batches(_groups(requests, vocab_size, max_length), batch_size):
            rows = [row for group in batch for row in group]
            hidden, first = _hidden(runner, batch)
            for index, result in _read(runner, rows, hidden, first, vocab_size):
                found[index] = result
                done += 1
            if progress is not None:
                progress(done, len(requests))
    return [result for result in found if result is not None]


@contextmanager
def inference(model: Transformer) -> Iterator[None]:
    """Evaluation mode without gradients; the model's own mode comes back afterwards.

    Not torch's inference mode: masks that the model keeps must serve training as well.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def rolling_requests(ids: Sequence[int], prefix: int, max_length: int, stride: int | None = None) -> Iterator[Request]:
    """Requests that together score every token of a text once.

    Args:
        ids: the text's.
        prefix: what its first token is predicted from.
        max_length: inputs that the model sees at once.
        stride: tokens that each window but the first scores, so that each sees max_length - stride
            before it or more; None: max_length, as in lm-evaluation-harness, whose last window reaches back.
    """
    stride = stride or max_length
    known = [prefix, *ids]
    begin = 0
    while begin < len(ids):
        end = min(begin + (stride if begin else max_length), len(ids))
        first = max(end - max_length, 0)
        yield Request(known[first : begin + 1], ids[begin:end])
        begin = end


class PrefixCache:
    """Keys and values of prefixes, then served to several rows each; satisfies `castalia.model.layers.Cache`."""

    def __init__(self) -> None:
        self.length = 0
        self.positions: Tensor | None = None
        self._stored: dict[int, tuple[Tensor, Tensor]] = {}
        self._rows: Tensor | None = None

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store what comes before `serve`; afterwards put it before what comes, and keep nothing of that."""
        if self._rows is None:
            self._stored[layer] = k, v
            return k, v
        keys, values = (t[self._rows] for t in self._stored.pop(layer))
        return torch.cat([keys, k], 2), torch.cat([values, v], 2)

    def advance(self, count: int) -> None:
        """Count `count` tokens as stored."""
        self.length += count

    def serve(self, rows: Tensor) -> None:
        """From now on row i continues prefix `rows[i]`; one forward pass may follow."""
        self._rows = rows
        if self.positions is not None and len(self.positions) > 1:
            self.positions = self.positions[rows]


def _groups(requests: Sequence[Request], vocab_size: int, max_length: int) -> list[list[_Row]]:
    """Rows with one context each, the longest first, so that memory runs out at once or never."""
    rows: dict[tuple[tuple[int, ...], int], _Row] = {}
    for index, (context, continuation) in enumerate(requests):
        targets = tuple(int(i) for i in continuation)
        if not context or not targets:
            raise UserError("a text without any token cannot be scored: leave out empty texts and answers")
        if len(targets) > max_length:
            raise UserError(f"a continuation of {len(targets)} tokens is beyond the model's {max_length}: shorten it")
        ids = (*(int(i) for i in context), *targets)[-(max_length + 1) :]
        outside = next((i for i in ids if not 0 <= i < vocab_size), None)
        if outside is not None:
            raise UserError(f"id {outside} is outside the tokenizer's {vocab_size}: encode with the model's own")
        inputs = ids[:-1]
        # Rows that differ in their last token alone have the same inputs: they are one row.
        key = inputs, len(ids) - len(targets)
        rows.setdefault(key, _Row(inputs, len(ids) - len(targets))).asked.append((index, targets))
    groups: dict[tuple[int, ...], list[_Row]] = defaultdict(list)
    for row in rows.values():
        groups[row.inputs[: row.context]].append(row)
    return sorted(groups.values(), key=lambda group: -max(len(row.inputs) for row in group))


def _batches(groups: Iterable[list[_Row]], batch_size: int) -> Iterator[list[list[_Row]]]:
    """Groups that run together: at most batch_size rows, and at most MOST_TOKENS places."""
    batch: list[list[_Row]] = []
    rows = longest = 0
    for group in groups:
        for begin in range(0, len(group), batch_size):
            part = group[begin : begin + batch_size]
            length = max(longest, *(len(row.inputs) for row in part), 1)
            full = rows + len(part) > batch_size or length * (rows + len(part)) > MOST_TOKENS
            if batch and full:
                yield batch
                batch, rows, length = [], 0, max(len(row.inputs) for row in part)
            batch.append(part)
            rows, longest = rows + len(part), length
    if batch:
        yield batch


def _hidden(runner: Whole | Part, batch: list[list[_Row]]) -> tuple[Tensor | None, int]:
    """Hidden states `[rows, places, h]` from place `first` of the inputs on, and `first`."""
    rows = [row.inputs for group in batch for row in group]
    # One token of the context stays with the rows: its hidden state predicts the first of the continuation.
    shared = min(group[0].context for group in batch) - 1
    device = runner.device
    if shared * (len(rows) - len(batch)) < _WORTHWHILE or not runner.shares:
        return runner.hidden(_padded(rows, device)), 0
    cache = PrefixCache()
    runner.hidden(_padded([group[0].inputs[:shared] for group in batch], device), cache)
    cache.advance(shared)
    cache.serve(torch.tensor([number for number, group in enumerate(batch) for _ in group], device=device))
    return runner.hidden(_padded([row[shared:] for row in rows], device), cache), shared


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64 `[rows, longest]`, 0 after the end of each."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *([0] * (longest - len(row)))] for row in rows], device=device)


def _read(
    runner: Whole | Part, rows: Sequence[_Row], hidden: Tensor | None, first: int, vocab_size: int
) -> Iterator[tuple[int, Scored]]:
    """The results of a batch: logits of the scored places alone, some rows of them at a time."""
    places: list[tuple[int, int]] = []
    wanted: list[tuple[int, int]] = []  # of each asked token: its place among `places`, and its id
    requests: list[tuple[int, int]] = []  # of each request: its number, and how many tokens it has
    for number, row in enumerate(rows):
        start = len(places) + row.scored
        end = len(row.inputs) - first
        places += [(number, at) for at in range(end - row.scored, end)]
        for index, targets in row.asked:
            requests.append((index, len(targets)))
            wanted += [(start - len(targets) + i, target) for i, target in enumerate(targets)]
    device = runner.device
    at = torch.tensor(places, device=device)
    chosen = None if hidden is None else hidden[at[:, 0], at[:, 1]]
    pairs = torch.tensor(wanted, device=device)
    logprobs = torch.empty(len(wanted), dtype=torch.float64, device=device)
    best = torch.empty(len(wanted), dtype=torch.bool, device=device)
    for begin in range(0, len(places), _LOGIT_ROWS):
        of = ((pairs[:, 0] >= begin) & (pairs[:, 0] < begin + _LOGIT_ROWS)).nonzero().squeeze(1)
        some = None if chosen is None else chosen[begin : begin + _LOGIT_ROWS]
        logits = runner.logits(some, min(_LOGIT_ROWS, len(places) - begin))[:, :vocab_size].float()
        place, target = pairs[of, 0] - begin, pairs[of, 1]
        logprobs[of] = (logits[place, target] - logits.logsumexp(-1)[place]).double()
        best[of] = logits.argmax(-1)[place] == target
    sums, greedy, begin = logprobs.cpu(), best.cpu(), 0
    for index, count in requests:
        part = slice(begin, begin + count)
        yield index, Scored(sums[part].sum().item(), bool(greedy[part].all()))
        begin += count
