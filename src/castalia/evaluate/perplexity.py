"""A model and a token data set -> nats per token and bits per byte, every token counted once.

Windows of `seq_length` tokens move over the data by `stride`; only what the previous window
has not scored is scored, so each token is predicted from at least `seq_length - stride`
tokens before it (but at the start). The first token of all is predicted from the
end-of-document id, as a generator would.

    ids:      e t0 t1 t2 t3 t4 t5 t6 ...
    window 0: [e  t0 t1 t2]  scores t0 .. t3
    window 1:       [t1 t2 t3 t4]  scores t4 t5         (seq_length 4, stride 2)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from castalia.data.store import TokenStore
from castalia.data.tokenizer import Tokenizer
from castalia.errors import UserError
from castalia.evaluate.subject import Team
from castalia.model.loss import IGNORED, loss_sums
from castalia.model.transformer import Transformer


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts a text.

    Attributes:
        tokens: scored tokens.
        bytes: UTF-8 bytes that they stand for; None where the tokenizer does not keep every byte.
        nll: their summed negative log-likelihood, in nats.
        loss: nats per token.
        bits_per_byte: nll / ln 2 / bytes; comparable between tokenizers, and with compressors. None as bytes.
        perplexity: exp(loss).
    """

    tokens: int
    bytes: int | None
    nll: float
    loss: float
    bits_per_byte: float | None
    perplexity: float

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def score_store(
    model: Transformer,
    tokenizer: Tokenizer,
    store: TokenStore,
    seq_length: int,
    stride: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    team: Team | None = None,
) -> TextScore:
    """Score a whole data set, in its stored order.

    Args:
        model: with weights, on its device.
        tokenizer: the one the data was made with.
        store: the data.
        seq_length: tokens the model sees at once.
        stride: tokens that each window scores; None: half of seq_length.
        batch_size: windows per forward pass.
        max_tokens: score only the first so many.
        progress: called after each batch with the tokens scored so far, and with all that will be.
        team: processes that share the batches, each with the whole model.

    Raises:
        UserError: the data is empty, holds ids that the tokenizer does not have, or the stride does not fit.
    """
    stride = stride or max(1, seq_length // 2)
    if not 1 <= stride <= seq_length:
        raise UserError(f"stride {stride} must lie between 1 and seq_length {seq_length}")
    ids = _stream(store, tokenizer, max_tokens)
    sizes = tokenizer.token_bytes()
    table = None if sizes is None else torch.from_numpy(sizes.astype(np.int64))
    device = model.head_weight.device
    nll, tokens, size = 0.0, 0, 0
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for number, (inputs, labels) in enumerate(_windows(ids, seq_length, stride, batch_size)):
                if team is None or number % team.size == team.rank:
                    hidden = model(inputs.to(device))
                    nll += loss_sums(hidden, model.head_weight, labels.to(device), bias=model.head_bias).nll.item()
                scored = labels[labels != IGNORED]
                tokens += scored.numel()
                size += 0 if table is None else int(table[scored].sum())
                if progress is not None:
                    progress(tokens, len(ids) - 1)
    finally:
        model.train(training)
    if team is not None:
        nll = float(team.total(torch.tensor([nll], dtype=torch.float64)))
    if tokens == 0 or (table is not None and size == 0):
        raise UserError("the data holds no text to score")
    loss = nll / tokens
    perplexity = math.exp(min(loss, 700.0))
    if table is None:
        return TextScore(tokens, None, nll, loss, None, perplexity)
    return TextScore(tokens, size, nll, loss, nll / math.log(2) / size, perplexity)


def _stream(store: TokenStore, tokenizer: Tokenizer, max_tokens: int | None) -> np.ndarray:
    """int64 ids of the data, end-of-document id in front where the tokenizer has one."""
    parts, total = [], 0
    for i in range(len(store)):
        parts.append(store.get(i).astype(np.int64))
        total += len(parts[-1])
        if max_tokens is not None and total >= max_tokens:
            break
    ids = np.concatenate(parts)[:max_tokens] if parts else np.empty(0, np.int64)
    if ids.size == 0:
        raise UserError("the data holds no token to score")
    if ids.max() >= tokenizer.vocab_size:
        raise UserError(
            f"the data holds id {ids.max()}, but the tokenizer has only {tokenizer.vocab_size}: "
            "name the right tokenizer"
        )
    return ids if tokenizer.eod is None else np.concatenate([[tokenizer.eod], ids])


def _windows(
    ids: np.ndarray, seq_length: int, stride: int, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of inputs and labels, int64 `[b, seq_length]`; what is not to be scored is labelled -100."""
    inputs, labels, scored, start = [], [], 0, 0
    while scored < len(ids) - 1:
        end = min(start + seq_length, len(ids) - 1)
        row, target = np.zeros(seq_length, np.int64), np.full(seq_length, IGNORED, np.int64)
        row[: end - start] = ids[start:end]
        target[scored - start : end - start] = ids[scored + 1 : end + 1]
        inputs.append(row)
        labels.append(target)
        scored, start = end, start + stride
        if len(inputs) == batch_size or scored == len(ids) - 1:
            yield torch.from_numpy(np.stack(inputs)), torch.from_numpy(np.stack(labels))
            inputs, labels = [], []
