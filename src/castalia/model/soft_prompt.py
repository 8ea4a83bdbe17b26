"""Soft prompt tuning (Lester et al. 2021): trained vectors in front of every sequence, all else frozen.

    embedding [B,S,h] ──> [B, P+S, h] ──layers──> [B, P+S, h] ──> the last S: [B,S,h]
                 P prompt vectors in front             hidden states of the tokens alone

The hidden states of the prompt are not returned, so labels need no shift and the prompt bears
no loss. The vectors enter after positions were added to the embeddings; rotary and relative
positions count them. Sequences grow by P: nothing of a sample is cut off to make room.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from castalia.errors import UserError

if TYPE_CHECKING:
    from castalia.model.transformer import Transformer


class SoftPrompt(nn.Embedding):
    """P vectors of width h, a parameter `weight` `[P, h]`: a table whose rows are all taken, in order."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S, h]` to `[B, P + S, h]`."""
        prompt = self.weight.to(x.dtype).unsqueeze(0).expand(x.shape[0], -1, -1)
        return torch.cat([prompt, x], 1)


def freeze_all_but_prompt(model: nn.Module) -> None:
    """Take every parameter but the soft prompt out of training."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "soft_prompt.weight")


@torch.no_grad()
def prompt_from_tokens(model: Transformer, ids: Sequence[int]) -> None:
    """Start the soft prompt at the embeddings of a text, repeated or cut to its length.

    Args:
        model: with its trained weights loaded.
        ids: of the text, in the tokenizer the model was trained with.

    Raises:
        UserError: the model has no soft prompt, or the text has no tokens.
    """
    if model.soft_prompt is None:
        raise UserError("model.soft_prompt_tokens is 0: set it to the number of vectors to train")
    if not ids:
        raise UserError("the text that the soft prompt starts from has no tokens: give a longer one")
    count = model.soft_prompt.num_embeddings
    tiled = (list(ids) * -(-count // len(ids)))[:count]
    rows = torch.tensor(tiled, device=model.embedding.weight.device)
    model.soft_prompt.weight.copy_(model.embedding.weight[rows])
