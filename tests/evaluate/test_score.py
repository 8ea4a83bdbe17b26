"""Scoring continuations: the sums of one forward pass per request, whatever shares a batch or a prefix."""

from __future__ import annotations

import random

import pytest
import torch

from castalia.errors import UserError
from castalia.evaluate.score import PrefixCache, Request, Scored, rolling_requests, score
from castalia.model.transformer import Transformer

VOCAB, LENGTH = 257, 48


def requests() -> list[Request]:
    """Several answers to each question, some of one token, some too long for the model."""
    draw = random.Random(0)

    def ids(n):
        return [draw.randrange(VOCAB) for _ in range(n)]

    made = []
    for length in (1, 2, 5, 20, 30, 46, 60):
        context = ids(length)
        made += [Request(context, ids(n)) for n in (1, 1, 1, 3, 9)]
    made.append(made[0])
    return draw.sample(made, len(made))


def alone(model: Transformer, request: Request) -> Scored:
    """One request by one forward pass, in fp64 after the logits."""
    ids = [*request.context, *request.continuation][-(LENGTH + 1) :]
    n = len(request.continuation)
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([ids[:-1]])))[0, -n:, :VOCAB].double()
    targets = torch.tensor(ids[-n:])
    return Scored(logits.log_softmax(-1)[range(n), targets].sum().item(), bool((logits.argmax(-1) == targets).all()))


@pytest.mark.parametrize("batch_size", [1, 8, 32])
def test_each_request_is_what_it_is_alone(model, batch_size):
    asked = requests()
    found = score(model, asked, VOCAB, LENGTH, batch_size)
    for request, result in zip(asked, found, strict=True):
        expected = alone(model, request)
        assert result.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert result.greedy == expected.greedy


def test_the_greedy_continuation_is_known_as_such(model):
    ids = [5, 6, 7]
    with torch.no_grad():
        for _ in range(4):
            ids.append(int(model.logits(model(torch.tensor([ids])))[0, -1, :VOCAB].argmax()))
    other = [*ids[3:6], (ids[6] + 1) % VOCAB]
    assert [s.greedy for s in score(model, [Request(ids[:3], ids[3:]), Request(ids[:3], other)], VOCAB, LENGTH)] == [
        True,
        False,
    ]


def test_answers_of_one_context_share_its_computation(model, monkeypatch):
    seen = []
    forward = Transformer.forward

    def counting(self, tokens, *args, **kwargs):
        seen.append(tokens.numel())
        return forward(self, tokens, *args, **kwargs)

    monkeypatch.setattr(Transformer, "forward", counting)
    context = list(range(40))
    score(model, [Request(context, [i, i]) for i in range(8)], VOCAB, LENGTH, 8)
    assert sum(seen) == 39 + 8 * 2  # the context but for its last token once, then that and one answer each
    seen.clear()
    score(model, [Request(context, [i]) for i in range(8)], VOCAB, LENGTH, 8)
    assert sum(seen) == 40  # answers of one token are read off one row


def test_the_padding_of_the_vocabulary_takes_no_part(model):
    every = score(model, [Request([1, 2], [i]) for i in range(VOCAB)], VOCAB, LENGTH)
    assert torch.tensor([s.logprob for s in every]).exp().sum().item() == pytest.approx(1, abs=1e-4)


def test_every_token_of_a_text_is_asked_for_once():
    for count in (1, 7, 8, 9, 23):
        ids = list(range(100, 100 + count))
        for stride in (None, 1, 3, 8):
            windows = list(rolling_requests(ids, 0, 8, stride))
            assert [i for w in windows for i in w.continuation] == ids
            for window in windows:
                assert len(window.context) >= 1 and len(window.context) + len(window.continuation) <= 9
            begin = len(windows[0].continuation)
            for window in windows[1:]:  # at least 8 - stride known tokens before the first that is scored
                assert len(window.context) >= min(begin + 1, 8 - (stride or 8) + 1)
                begin += len(window.continuation)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request([], [1]), "without any token"),
        (Request([1], []), "without any token"),
        (Request([1], [2] * 49), "beyond the model's 48"),
        (Request([1], [270]), "outside the tokenizer's 257"),
    ],
)
def test_what_cannot_be_scored_says_so(model, request_, words):
    with pytest.raises(UserError, match=words):
        score(model, [request_], VOCAB, LENGTH)


def test_a_cache_serves_rows_in_their_order():
    cache = PrefixCache()
    k = torch.arange(4.0).view(2, 1, 2, 1)
    cache.update(0, k, k)
    cache.advance(2)
    cache.serve(torch.tensor([1, 0, 1]))
    new = torch.full((3, 1, 1, 1), 9.0)
    keys, _ = cache.update(0, new, new)
    assert keys.flatten(1).tolist() == [[2, 3, 9], [0, 1, 9], [2, 3, 9]]
