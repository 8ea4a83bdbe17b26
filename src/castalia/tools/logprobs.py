"""A token data set -> what a model thinks of each next token: a data set of fp32 log-probabilities beside it.

    PREFIX.bin, .idx ─document─> its first L + 1 ids ─model─> log p(next) ──> PREFIX_NAME.bin, .idx (fp32)

Document i of the result belongs to document i of the data; its number j is the log-probability of token j + 1.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from castalia.data.store import StoreWriter, TokenStore
from castalia.errors import UserError
from castalia.evaluate.subject import Team
from castalia.model import Transformer

_ROWS = 512  # of logits that exist at once


def write_logprobs(
    model: Transformer,
    prefix: str,
    target: str,
    length: int,
    batch_size: int = 8,
    padded: bool = False,
    team: Team | None = None,
) -> int:
    """Write the log-probabilities of a data set's documents.

    Args:
        model: in evaluation mode.
        prefix: of the token data set.
        target: prefix of what is written.
        length: L, most numbers of a document; a longer one is cut off.
        batch_size: documents of a forward pass.
        padded: exactly L numbers for each, of a document filled up with id 0, as GPT-NeoX's `precompute` writes.
        team: processes that share the documents, each with the whole model; the first one writes.

    Returns:
        How many documents.

    Raises:
        UserError: the data holds ids that the model does not have.
    """
    store, vocabulary = TokenStore(prefix), model.cfg.vocab_size or 0
    rank, size = (0, 1) if team is None else (team.rank, team.size)
    writes = StoreWriter(target, np.float32) if rank == 0 else nullcontext()
    with writes as writer, torch.inference_mode():
        for start in range(0, len(store), batch_size * size):
            documents = [
                np.asarray(store.get(i))[: length + 1].astype(np.int64)
                for i in range(start, min(start + batch_size * size, len(store)))
            ]
            longest = length + 1 if padded else max(max(map(len, documents)), 2)
            ids = np.zeros((len(documents), longest), np.int64)
            for row, document in enumerate(documents):
                ids[row, : len(document)] = document
            if ids.max() >= vocabulary:
                raise UserError(
                    f"{prefix} holds the id {ids.max()}, beyond the model's {vocabulary}: take data of its tokenizer"
                )
            mine = torch.from_numpy(ids)[rank * batch_size : (rank + 1) * batch_size]
            scores = torch.zeros(len(documents), longest - 1)
            if len(mine):
                scores[rank * batch_size : (rank + 1) * batch_size] = next_logprobs(model, mine)
            if team is not None:
                scores = team.total(scores)
            if writer is not None:
                writer.add_documents(
                    row if padded else row[: max(len(document) - 1, 0)]
                    for row, document in zip(scores.numpy(), documents, strict=True)
                )
        if writer is not None:
            writer.finish()
    return len(store)


def next_logprobs(model: Transformer, ids: Tensor) -> Tensor:
    """int64 `[B, S]` to fp32 `[B, S - 1]`: log p of each token after those before it."""
    hidden = model(ids[:, :-1]).flatten(0, 1)
    wanted, out = ids[:, 1:].flatten(), torch.empty(hidden.shape[0])
    for start in range(0, len(out), _ROWS):
        some = slice(start, start + _ROWS)
        logits = model.logits(hidden[some])
        out[some] = logits.gather(-1, wanted[some].unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
    return out.view(ids.shape[0], -1)
