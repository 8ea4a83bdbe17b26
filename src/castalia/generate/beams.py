"""Beam search: of all continuations of a prompt, the likeliest that a search of some width finds.

    begin ─> logits of each beam ─> its children's sums ─best 2 x width─┬ ended ─> kept, ranked by score
      ^                                                                 └ others, width of them ─┐
      └──────────── step <── rows of the cache, chosen anew (Decoder.select) <───────────────────┘

    score = sum of log-probabilities / (number of tokens)^length_penalty       (Wu et al. 2016 without coverage)

It ends when nothing that goes on can rank among what has ended: a sum only falls, so its best score is the one that
it would have as it stands at the longest length (with a penalty below 0: at the next). This is transformers' search
with early_stopping="never". Prompts share a batch as in `engine.py`, with as many rows as there are beams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from castalia.data.tokenizer import Tokenizer
from castalia.errors import UserError
from castalia.generate.decoder import Decoder
from castalia.generate.engine import Generation, prompt_ids, ready, share_batches
from castalia.generate.stopping import Stops
from castalia.model import Transformer


@dataclass
class _Beam:
    """A continuation on its way, or one that has ended (kept: how many tokens are text; None: at the length)."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    total: float = 0.0
    kept: int | None = None


@dataclass
class _Search:
    """One prompt's beams."""

    index: int
    prompt: list[int]
    live: list[_Beam] = field(default_factory=lambda: [_Beam()])
    ended: list[_Beam] = field(default_factory=list)


@dataclass(frozen=True)
class _Rules:
    """What all prompts share."""

    width: int
    max_tokens: int
    penalty: float
    vocab_size: int
    stops: Stops

    def score(self, beam: _Beam) -> float:
        """What a beam is ranked by once it has ended."""
        return float(beam.total / len(beam.tokens) ** self.penalty)

    def best_yet(self, beam: _Beam) -> float:
        """The best score that a live beam can still have."""
        return float(beam.total / (self.max_tokens if self.penalty > 0 else len(beam.tokens) + 1) ** self.penalty)


def beam_search(
    model: Transformer | Decoder,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
    num_beams: int,
    max_tokens: int = 64,
    length_penalty: float = 1.0,
    num_return: int = 1,
    stop_at_eod: bool = True,
    batch_size: int = 16,
    *,
    stop: Sequence[str | Sequence[int]] = (),
) -> list[Generation]:
    """The best continuations of each prompt that the search finds; the same at each call.

    Args:
        model, tokenizer, prompts, max_tokens, stop_at_eod, stop: as `generate` takes them.
        num_beams: width of the search; 1 is greedy, with a length_penalty of 0.
        length_penalty: above 0: longer ones are favoured, the more the larger it is; 0: the likeliest.
        num_return: how many for each prompt, at most num_beams.
        batch_size: most rows at once; a prompt has as many as there are beams.

    Returns:
        `num_return` for each prompt in order, the best first; fewer where there are no more continuations.

    Raises:
        UserError: a number is out of its range, or what `generate` raises.
    """
    if not 1 <= num_return <= num_beams:
        raise UserError(f"{num_return} of {num_beams} beams cannot be had: ask for 1 up to the number of beams")
    if max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}; give at least 1")
    stops = Stops(tokenizer, stop, tokenizer.eod if stop_at_eod else None)
    given: list[str | Sequence[int]] = [prompts] if isinstance(prompts, str) else list(prompts)
    rules = _Rules(num_beams, max_tokens, length_penalty, tokenizer.vocab_size, stops)
    with ready(model) as decoder:
        searches = [_Search(i, prompt_ids(p, i, decoder.cfg, tokenizer, max_tokens)) for i, p in enumerate(given)]
        for batch in share_batches(searches, max(batch_size // num_beams, 1), decoder.uneven):
            _run(decoder, batch, rules)
    return [
        Generation(
            prompt=p if isinstance(p, str) else tokenizer.decode(list(p)),
            text=stops.text(beam.tokens, beam.kept),
            tokens=beam.tokens,
            finish_reason="length" if beam.kept is None else "stop",
            logprobs=beam.logprobs,
            score=rules.score(beam),
        )
        for search, p in zip(searches, given, strict=True)
        for beam in search.ended[:num_return]
    ]


def _run(decoder: Decoder, batch: Sequence[_Search], rules: _Rules) -> None:
    logits = decoder.begin([s.prompt for s in batch], max(len(s.prompt) for s in batch) + rules.max_tokens - 1)
    for _ in range(rules.max_tokens):
        logprobs = (logits - logits.logsumexp(-1, keepdim=True))[:, : rules.vocab_size]
        parents: list[int] = []
        first = 0
        for search in batch:
            count = len(search.live)
            if count:
                parents += [first + parent for parent in _grow(search, logprobs[first : first + count], rules)]
            first += count
        if not parents:
            return
        decoder.select(torch.tensor(parents, device=decoder.device))
        newest = [beam.tokens[-1] for search in batch for beam in search.live]
        logits = decoder.step(torch.tensor(newest, device=decoder.device))


def _grow(search: _Search, logprobs: Tensor, rules: _Rules) -> list[int]:
    """One more token: the live beams' children take their place; which beam each came from."""
    totals = torch.tensor([b.total for b in search.live], dtype=torch.float64, device=logprobs.device)
    sums = (totals.unsqueeze(1) + logprobs.double()).flatten()
    # Twice the width: each beam may have one child that ends, and there shall be enough to go on.
    best = sums.topk(min(2 * rules.width, len(sums)))
    found = zip(best.values.tolist(), best.indices.tolist(), logprobs.flatten()[best.indices].tolist(), strict=True)
    live: list[_Beam] = []
    parents: list[int] = []
    for rank, (total, place, logprob) in enumerate(found):
        parent, token = divmod(place, logprobs.shape[1])
        old = search.live[parent]
        beam = _Beam([*old.tokens, token], [*old.logprobs, logprob], total)
        beam.kept = rules.stops.kept(beam.tokens)
        if beam.kept is not None or len(beam.tokens) == rules.max_tokens:
            if rank < rules.width:
                search.ended.append(beam)
        elif len(live) < rules.width:
            live.append(beam)
            parents.append(parent)
    search.ended = sorted(search.ended, key=rules.score, reverse=True)[: rules.width]
    enough = len(search.ended) == rules.width
    if live and enough and rules.best_yet(live[0]) <= rules.score(search.ended[-1]):
        live, parents = [], []
    search.live = live
    return parents
