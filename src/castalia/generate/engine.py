"""Prompts -> continuations: read a batch of prompts, then one token of each at a time.

    prompts ─encode─> ids ─batches by length─> begin [B,P] ─> logits ─sample─> token ─┐
                                                                ^────── step [B] <────┘
                                                             until a stop or max_tokens

Prompts share a batch at any lengths (see `Decoder`), those of like length together. Each prompt draws from
a generator of its own, made from the seed and the prompt's place in the list: the batch size is a matter
of speed only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar, cast

import torch
from torch import Tensor

from castalia.config import ModelConfig
from castalia.data.tokenizer import Tokenizer
from castalia.errors import UserError
from castalia.generate.cache import KVCache
from castalia.generate.decoder import Decoder
from castalia.generate.sampling import SamplingSettings, logprobs_of, make_generator, sample
from castalia.generate.stopping import Stops
from castalia.model import Transformer

OnToken = Callable[[int, int, str], None]
"""Called as (index of the prompt, token id, text that has become readable) for each token."""


@dataclass(frozen=True)
class Generation:
    """One continuation.

    Attributes:
        prompt: the prompt as text.
        text: the continuation, without the prompt and without what stopped it.
        tokens: the generated ids, those that stopped it included.
        finish_reason: `stop` at end of text or at a stop, `length` at max_tokens.
        logprobs: natural log-probability of each token under the model itself, before temperature
            and whatever else shapes the choice.
        logits: fp32 `[tokens, V]`, if they were asked for: what each token was chosen from.
        score: of a beam search: what continuations of one prompt are ranked by.
    """

    prompt: str
    text: str
    tokens: list[int]
    finish_reason: Literal["stop", "length"]
    logprobs: list[float]
    logits: Tensor | None = None
    score: float | None = None


class Steps(Protocol):
    """What `generate` needs of a `Decoder`, for others that can tell logits.

    Attributes:
        cfg: of the model.
        uneven: whether rows of a batch may be of unequal length.
    """

    cfg: ModelConfig
    uneven: bool

    def begin(self, prompts: Sequence[Sequence[int]], max_length: int) -> Tensor:
        """See Decoder."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """See Decoder."""
        ...


@dataclass
class _Sequence:
    """One prompt on its way."""

    index: int
    prompt: list[int]
    limit: int
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    shown: str = ""
    kept: int | None = None
    """How many of the tokens are text; None: it is not finished."""

    @property
    def finished(self) -> bool:
        """Whether it has been stopped."""
        return self.kept is not None


def generate(
    model: Transformer | Steps,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
    max_tokens: int | Sequence[int] = 64,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_at_eod: bool = True,
    batch_size: int = 16,
    on_token: OnToken | None = None,
    *,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Sequence[str | Sequence[int]] = (),
    keep_logits: bool = False,
) -> list[Generation]:
    """Continue each prompt.

    Args:
        model: any model of the `castalia.model.Transformer` interface, on any device; or a `Decoder` of it, which
            saves making one at each call.
        tokenizer: the one it was trained with.
        prompts: texts or lists of ids; a single text counts as a list of one. An empty prompt starts
            from the end-of-text token, as every document of the training data did.
        max_tokens: most tokens to generate for each; or a number for every prompt, and then those share batches
            that have the same.
        temperature, top_k, top_p, min_p, repetition_penalty: see `SamplingSettings`; temperature 0 is greedy.
        seed: prompt number i always draws the same numbers under the same seed.
        stop_at_eod: stop at the end-of-text token.
        batch_size: most prompts to run at once.
        on_token: called for every token as it appears (see `OnToken`).
        stop: texts, or lists of ids, that end a continuation and are no part of its text.
        keep_logits: return the logits as well.

    Returns:
        One `Generation` per prompt, in order.

    Raises:
        UserError: a prompt is empty and there is no end-of-text token, holds ids outside the vocabulary,
            or is too long for the model together with max_tokens.
    """
    settings = SamplingSettings(temperature, top_k, top_p, min_p, repetition_penalty)
    given: list[str | Sequence[int]] = [prompts] if isinstance(prompts, str) else list(prompts)
    limits = [max_tokens] * len(given) if isinstance(max_tokens, int) else list(max_tokens)
    if min(limits, default=1) < 1:
        raise UserError(f"max_tokens is {min(limits)}; give at least 1")
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; give at least 1")
    stops = Stops(tokenizer, stop, tokenizer.eod if stop_at_eod else None)
    sequences = [
        _Sequence(i, prompt_ids(p, i, model.cfg, tokenizer, limit), limit, make_generator(seed, i))
        for i, (p, limit) in enumerate(zip(given, limits, strict=True))
    ]
    own = isinstance(model, Transformer | Decoder)
    opened: AbstractContextManager[Steps] = ready(cast(Any, model)) if own else nullcontext(cast(Steps, model))
    with opened as decoder:
        for limit in sorted(set(limits)):
            some = [s for s in sequences if s.limit == limit]
            for batch in share_batches(some, batch_size, decoder.uneven):
                _run_batch(decoder, tokenizer, batch, limit, settings, stops, on_token, keep_logits)
    return [_result(s, p, tokenizer, stops) for s, p in zip(sequences, given, strict=True)]


class HasPrompt(Protocol):
    """What can share a batch."""

    prompt: list[int]


P = TypeVar("P", bound=HasPrompt)


def share_batches(sequences: Sequence[P], size: int, uneven: bool) -> Iterator[list[P]]:
    """Prompts of like length together, so that little is padding; of the very same length unless `uneven`."""
    batch: list[P] = []
    for sequence in sorted(sequences, key=lambda s: len(s.prompt)):
        if batch and (len(batch) == size or not (uneven or len(batch[0].prompt) == len(sequence.prompt))):
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch


def prompt_ids(
    prompt: str | Sequence[int], index: int, cfg: ModelConfig, tokenizer: Tokenizer, max_tokens: int
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
    longest = cfg.max_position_embeddings
    if longest is not None and len(ids) + max_tokens > longest:
        raise UserError(
            f"prompt {index} has {len(ids)} tokens, and with max_tokens {max_tokens} that is "
            f"{len(ids) + max_tokens}, beyond model.max_position_embeddings {longest}: "
            "shorten the prompt or lower max_tokens"
        )
    return ids


@contextmanager
def ready(model: Transformer | Decoder) -> Iterator[Decoder]:
    """A decoder of the model in evaluation mode, without gradients; the model's own mode comes back afterwards."""
    inner = model.model if isinstance(model, Decoder) else model
    training = inner.training
    inner.eval()
    try:
        with torch.inference_mode():
            yield model if isinstance(model, Decoder) else Decoder(model)
    finally:
        inner.train(training)


def make_cache(model: Transformer, max_length: int) -> KVCache:
    """An empty cache that fits a model: its layers, its matrices' dtype and device, its soft prompt."""
    weight = model.head_weight
    return KVCache(model.cfg.num_layers, max_length + model.prompt_length, weight.dtype, weight.device)


def _run_batch(
    decoder: Steps,
    tokenizer: Tokenizer,
    batch: list[_Sequence],
    max_tokens: int,
    settings: SamplingSettings,
    stops: Stops,
    on_token: OnToken | None,
    keep_logits: bool,
) -> None:
    """Generate for some prompts, in place."""
    # The last token generated is never read, hence the 1.
    logits = decoder.begin([s.prompt for s in batch], max(len(s.prompt) for s in batch) + max_tokens - 1)
    generators = [s.generator for s in batch]
    seen = None
    if settings.repetition_penalty != 1:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        for row, sequence in enumerate(batch):
            seen[row, sequence.prompt] = True
    for step in range(max_tokens):
        ids = sample(logits, settings, generators, tokenizer.vocab_size, seen)
        logprobs = logprobs_of(logits, ids)
        for row, (token, logprob) in enumerate(zip(ids.tolist(), logprobs.tolist(), strict=True)):
            sequence = batch[row]
            if sequence.finished:
                continue  # its row runs on until the whole batch is done, unseen
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            if keep_logits:
                sequence.logits.append(logits[row].clone())
            sequence.kept = stops.kept(sequence.tokens)
            if on_token is not None:
                last = sequence.finished or step == max_tokens - 1
                on_token(sequence.index, token, _new_text(sequence, stops, last))
        if step == max_tokens - 1 or all(s.finished for s in batch):
            break
        if seen is not None:
            seen.scatter_(-1, ids.unsqueeze(-1), True)
        logits = decoder.step(ids)


def _new_text(sequence: _Sequence, stops: Stops, last: bool) -> str:
    """What has become readable since the last call.

    A character may be spread over several tokens; until it is whole, decoding ends in the replacement
    character U+FFFD and is held back, and so is what may become a stop (at the last token nothing is).
    """
    text = stops.text(sequence.tokens, sequence.kept)
    if not last:
        text = stops.certain(text.rstrip("\ufffd"))
    if not text.startswith(sequence.shown):
        return ""
    new = text[len(sequence.shown) :]
    sequence.shown = text
    return new


def _result(sequence: _Sequence, prompt: str | Sequence[int], tokenizer: Tokenizer, stops: Stops) -> Generation:
    return Generation(
        prompt=prompt if isinstance(prompt, str) else tokenizer.decode(list(prompt)),
        text=stops.text(sequence.tokens, sequence.kept),
        tokens=sequence.tokens,
        finish_reason="stop" if sequence.finished else "length",
        logprobs=sequence.logprobs,
        logits=torch.stack(sequence.logits) if sequence.logits else None,
    )
