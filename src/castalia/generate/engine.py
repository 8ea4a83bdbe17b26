"""Prompts -> continuations: prefill the cache with a batch of prompts, then one token at a time.

    prompts ─encode─> ids ─group by length─> batches [B,P] ─forward─> logits ─sample─> token ─┐
                                                              ^─────── cache ────── [B,1] <───┘
                                                                        until end of text or max_tokens

Prompts of equal length share a batch, so no padding and no mask is needed and every row
computes what it would compute alone. Each prompt draws from a generator of its own, made from the
seed and the prompt's place in the list: the batch size is a matter of speed only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from castalia.data.tokenizer import Tokenizer
from castalia.errors import UserError
from castalia.generate.cache import KVCache
from castalia.generate.sampling import SamplingSettings, make_generator, sample
from castalia.model import Transformer

OnToken = Callable[[int, int, str], None]
"""Called as (index of the prompt, token id, text that has become readable) for each token."""


@dataclass(frozen=True)
class Generation:
    """One continuation.

    Attributes:
        prompt: the prompt as text.
        text: the continuation, without the prompt and without the end-of-text token.
        tokens: the generated ids, the end-of-text token included if it was reached.
        finish_reason: `stop` at end of text, `length` at max_tokens.
        logprobs: natural log-probability of each token under the model itself, before temperature,
            top-k and top-p.
    """

    prompt: str
    text: str
    tokens: list[int]
    finish_reason: Literal["stop", "length"]
    logprobs: list[float]


@dataclass
class _Sequence:
    """One prompt on its way."""

    index: int
    prompt: list[int]
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    shown: str = ""
    finished: bool = False


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
    max_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_at_eod: bool = True,
    use_cache: bool = True,
    batch_size: int = 16,
    on_token: OnToken | None = None,
) -> list[Generation]:
    """Continue each prompt.

    Args:
        model: any model of the `castalia.model.Transformer` interface, on any device.
        tokenizer: the one it was trained with.
        prompts: texts or lists of ids; a single text counts as a list of one. An empty prompt starts
            from the end-of-text token, as every document of the training data did.
        max_tokens: most tokens to generate for each.
        temperature, top_k, top_p: see `SamplingSettings`; temperature 0 is greedy.
        seed: prompt number i always draws the same numbers under the same seed.
        stop_at_eod: stop at the end-of-text token.
        use_cache: keep keys and values; False recomputes everything at each token (for checking).
        batch_size: most prompts to run at once.
        on_token: called for every token as it appears (see `OnToken`).

    Returns:
        One `Generation` per prompt, in order.

    Raises:
        UserError: a prompt is empty and there is no end-of-text token, holds ids outside the vocabulary,
            or is too long for the model together with max_tokens.
    """
    settings = SamplingSettings(temperature, top_k, top_p)
    if max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}; give at least 1")
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; give at least 1")
    given: list[str | Sequence[int]] = [prompts] if isinstance(prompts, str) else list(prompts)
    sequences = [
        _Sequence(i, _prompt_ids(p, i, model, tokenizer, max_tokens), make_generator(seed, i))
        for i, p in enumerate(given)
    ]
    by_length: dict[int, list[_Sequence]] = defaultdict(list)
    for sequence in sequences:
        by_length[len(sequence.prompt)].append(sequence)
    eod = tokenizer.eod if stop_at_eod else None
    with _inference(model):
        for group in by_length.values():
            for start in range(0, len(group), batch_size):
                batch = group[start : start + batch_size]
                _run_batch(model, tokenizer, batch, max_tokens, settings, eod, use_cache, on_token)
    return [_result(s, p, tokenizer) for s, p in zip(sequences, given, strict=True)]


def _prompt_ids(
    prompt: str | Sequence[int], index: int, model: Transformer, tokenizer: Tokenizer, max_tokens: int
) -> list[int]:
    """Ids of a prompt, checked against the model's vocabulary and length."""
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
    if not ids:
        if tokenizer.eod is None:
            raise UserError(
                f"prompt {index} is empty and the tokenizer has no end-of-text token to start from: "
                "give at least one token"
            )
        ids = [tokenizer.eod]
    outside = next((i for i in ids if not 0 <= i < tokenizer.vocab_size), None)
    if outside is not None:
        raise UserError(
            f"prompt {index} holds the id {outside}, but the tokenizer's ids go from 0 to "
            f"{tokenizer.vocab_size - 1}: encode it with this run's tokenizer"
        )
    longest = model.cfg.max_position_embeddings
    if longest is not None and len(ids) + max_tokens > longest:
        raise UserError(
            f"prompt {index} has {len(ids)} tokens, and with max_tokens {max_tokens} that is "
            f"{len(ids) + max_tokens}, beyond model.max_position_embeddings {longest}: "
            "shorten the prompt or lower max_tokens"
        )
    return ids


@contextmanager
def _inference(model: Transformer) -> Iterator[None]:
    """Evaluation mode without gradients; the model's own mode comes back afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def make_cache(model: Transformer, max_length: int) -> KVCache:
    """An empty cache that fits a model: its layers, its matrices' dtype and device, its soft prompt."""
    weight = model.head_weight
    return KVCache(model.cfg.num_layers, max_length + model.prompt_length, weight.dtype, weight.device)


def _run_batch(
    model: Transformer,
    tokenizer: Tokenizer,
    batch: list[_Sequence],
    max_tokens: int,
    settings: SamplingSettings,
    eod: int | None,
    use_cache: bool,
    on_token: OnToken | None,
) -> None:
    """Generate for prompts of equal length, in place."""
    device = model.head_weight.device
    tokens = torch.tensor([s.prompt for s in batch], device=device)
    # The last token generated is never fed back, hence the 1.
    cache = make_cache(model, tokens.shape[1] + max_tokens - 1) if use_cache else None
    generators = [s.generator for s in batch]
    for step in range(max_tokens):
        logits = _last_logits(model, tokens, cache)
        ids = sample(logits, settings, generators, tokenizer.vocab_size)
        logprobs = logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        for sequence, token, logprob in zip(batch, ids.tolist(), logprobs.tolist(), strict=True):
            if sequence.finished:
                continue  # its row runs on until the whole batch is done, unseen
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            sequence.finished = token == eod
            if on_token is not None:
                last = sequence.finished or step == max_tokens - 1
                on_token(sequence.index, token, _new_text(sequence, tokenizer, last))
        if all(s.finished for s in batch):
            break
        ids = ids.unsqueeze(-1)
        tokens = ids if use_cache else torch.cat([tokens, ids], -1)


def _last_logits(model: Transformer, tokens: Tensor, cache: KVCache | None) -> Tensor:
    """Logits `[B, V]` after the last of `tokens` `[B, S]`."""
    hidden = model(tokens, None, cache)
    if cache is not None:
        cache.advance(tokens.shape[1])
    return model.logits(hidden[:, -1])


def _visible(sequence: _Sequence, tokenizer: Tokenizer) -> str:
    """Text of the generated tokens, without the end-of-text token that stopped them."""
    return tokenizer.decode(sequence.tokens[:-1] if sequence.finished else sequence.tokens)


def _new_text(sequence: _Sequence, tokenizer: Tokenizer, last: bool) -> str:
    """What has become readable since the last call.

    A character may be spread over several tokens; until it is whole, decoding ends in the replacement
    character U+FFFD and is held back (at the last token nothing is).
    """
    text = _visible(sequence, tokenizer)
    if not last:
        text = text.rstrip("\ufffd")
    if not text.startswith(sequence.shown):
        return ""
    new = text[len(sequence.shown) :]
    sequence.shown = text
    return new


def _result(sequence: _Sequence, prompt: str | Sequence[int], tokenizer: Tokenizer) -> Generation:
    return Generation(
        prompt=prompt if isinstance(prompt, str) else tokenizer.decode(list(prompt)),
        text=_visible(sequence, tokenizer),
        tokens=sequence.tokens,
        finish_reason="stop" if sequence.finished else "length",
        logprobs=sequence.logprobs,
    )
