"""Texts that the model writes while it is trained (sampling): prompts -> a record `samples`, in every layout.

    prompts ─> castalia.generate ─tokens so far─> Passes ─micro-batches─> engine.evaluate ─> logits at the last tokens
                     ^──────────────────── the next token of each <────────────────────────────────┘

The engine that trains computes the logits, as an evaluation would: with the weights that it has, averages where the
optimizer keeps such, whatever ranks share them. A pass over all tokens so far in place of a cache costs some
hundred short passes in thousands of steps, and no copy of the model. Each prompt draws from a generator of its
own, so that training's random numbers stay where they are, and every rank draws the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from castalia.config import Config
from castalia.data.loader import Batch
from castalia.data.tokenizer import Tokenizer
from castalia.errors import UserError
from castalia.generate.engine import generate, prompt_ids
from castalia.model.loss import IGNORED
from castalia.train.forward import marked_logits
from castalia.train.metrics import Record

if TYPE_CHECKING:
    from castalia.train.run import Run


def write_samples(run: Run) -> Record:
    """Let the model go on from each prompt, and write the record. Every rank calls it."""
    cfg, tokenizer = run.config.sampling, run.tokenizer
    assert tokenizer is not None, "check_sampling has asked for one"
    run.beat("writing samples")
    with run.store.averaged(), torch.no_grad():
        found = generate(
            Passes(run),
            tokenizer,
            run.mesh.from_first(prompts_of(run.config)),
            cfg.max_tokens,
            cfg.temperature,
            cfg.top_k,
            cfg.top_p,
            cfg.seed,
            batch_size=run.config.micro_batch_size,
        )
    drawn = {"temperature": cfg.temperature, "seed": cfg.seed}
    samples = [{"prompt": one.prompt, "text": one.text, "tokens": len(one.tokens)} | drawn for one in found]
    return run.metrics.write("samples", run.step, samples=samples)


class Passes:
    """The engine that trains, as `generate` wants a decoder: each token is a pass over all before it.

    Args:
        run: assembled.
    """

    uneven = True

    def __init__(self, run: Run) -> None:
        self._run, self.cfg = run, run.config.model

    def begin(self, prompts: Sequence[Sequence[int]], max_length: int) -> Tensor:
        """See Decoder."""
        config, layout = self._run.config, self._run.mesh.layout
        # A pipeline takes as many micro-batches as in training; compiled code, the shapes that it has been made for.
        groups = config.training.batch_size // (config.micro_batch_size * layout.data) if layout.pipeline > 1 else 1
        self._rows, self._width = -(-len(prompts) // groups), config.data.seq_length
        if config.performance.compile:
            self._rows = config.micro_batch_size
        else:  # what ranks share out evenly, and 8-bit products want
            parts = math.lcm(16, 2 * layout.context, layout.context * layout.tensor)
            self._width = min(-(-max_length // parts) * parts, self._width)
        self._lengths = [len(prompt) for prompt in prompts]
        self._tokens = torch.zeros(groups * self._rows, self._width, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            self._tokens[row, : len(prompt)] = torch.tensor(prompt)
        return self._logits()

    def step(self, tokens: Tensor) -> Tensor:
        """See Decoder."""
        for row, token in enumerate(tokens.tolist()):
            self._tokens[row, self._lengths[row]] = token
            self._lengths[row] += 1
        return self._logits()

    def _logits(self) -> Tensor:
        """After the last token of each row; what comes later is padding, which causality hides."""
        self._run.beat("writing samples")
        labels = torch.full_like(self._tokens, IGNORED)
        for row, length in enumerate(self._lengths):
            labels[row, length - 1] = row
        positions = torch.arange(self._width).expand(self._rows, -1).contiguous()
        ids = torch.arange(self._rows)
        pairs = zip(self._tokens.split(self._rows), labels.split(self._rows), strict=True)
        batches = [Batch(tokens, marked, positions, sample_ids=ids) for tokens, marked in pairs]
        return marked_logits(self._run, batches, len(self._lengths))


def prompts_of(config: Config) -> list[str]:
    """The prompts, of the file where there is one.

    Raises:
        UserError: it cannot be read, or holds none.
    """
    file = config.sampling.prompts_file
    if file is None:
        return config.sampling.prompts
    try:
        lines = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"sampling.prompts_file: {file} cannot be read as text: {error}") from None
    if not lines:
        raise UserError(f"sampling.prompts_file: {file} has no prompts: write one on each line")
    return lines


def check_sampling(config: Config, tokenizer: Tokenizer | None) -> None:
    """Refuse samples that could not be written, before the run begins.

    Raises:
        UserError: there is no tokenizer, or a prompt cannot be gone on from.
    """
    cfg, length = config.sampling, config.data.seq_length
    if cfg.interval is None:
        return
    if tokenizer is None:
        raise UserError("sampling.interval: there is no tokenizer to write with: name it in tokenizer.path")
    for number, prompt in enumerate(prompts_of(config)):
        tokens = max(len(tokenizer.encode(prompt)), 1)
        if tokens + cfg.max_tokens > length:
            raise UserError(
                f"sampling: prompt {number} has {tokens} tokens, and with sampling.max_tokens {cfg.max_tokens} that is "
                f"beyond data.seq_length {length}: shorten the prompt or lower sampling.max_tokens"
            )
        prompt_ids(prompt, number, config.model, tokenizer, cfg.max_tokens)
