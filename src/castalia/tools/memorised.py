"""Training steps -> the share of their sequences that the model can recite.

    step ──plan, data order──> sequences [k + l] ──the model sees k──> are the next l tokens its greedy ones?

A sequence is k-extractable if greedy generation from its first k tokens gives the l that follow
(Carlini et al. 2023; Biderman et al. 2023 for Pythia, with k = l = 32). All l are checked in one
forward pass: the continuation is greedy if and only if each true token is the most probable one
after the true tokens before it. Steps that the checkpoint has not reached are the control: what
is recited there was easy, not learnt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from castalia.errors import UserError
from castalia.evaluate.score import Progress, Request
from castalia.evaluate.subject import Subject
from castalia.tools.data_view import open_data_run

_STEPS = 10  # looked at where none are named


@dataclass(frozen=True)
class StepShare:
    """What of a training step can be recited.

    Attributes:
        step: of training, counted from 0.
        seen: the checkpoint has this step behind it.
        sequences: how many were tried.
        extractable: of these, the ones whose continuation is the greedy one.
    """

    step: int
    seen: bool
    sequences: int
    extractable: int

    @property
    def share(self) -> float:
        return self.extractable / self.sequences

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"share": self.share}


def lengths_of(text: str) -> tuple[int, int]:
    """`k=32,l=32` -> (32, 32): tokens of the prompt, and of the continuation.

    Raises:
        UserError: it is anything else.
    """
    match = re.fullmatch(r"k=([1-9]\d*),l=([1-9]\d*)", text)
    if match is None:
        raise UserError(f"--memorised {text}: give tokens of prompt and continuation, as k=32,l=32")
    return int(match[1]), int(match[2])


def scan(
    run: str,
    subject: Subject,
    k: int,
    l: int,  # noqa: E741 - as the papers call it
    samples: int = 1000,
    steps: Sequence[int] | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> list[StepShare]:
    """Try sequences of some training steps.

    Args:
        run: the run's folder, whose data must still be where it was.
        subject: its model.
        k, l: tokens of the prompt, and of the continuation.
        samples: sequences to try in all, shared out evenly; a step has no more than its batch.
        steps: of training, counted from 0; None: ten, evenly spaced over the whole plan.
        batch_size: rows of a forward pass.
        progress: called with (sequences tried, all of them).

    Raises:
        UserError: the run has no such step, its sequences are shorter than k + l, or its data cannot be opened.
    """
    data = open_data_run([run])
    total = data.plan.steps
    if total < 1:
        raise UserError(f"{run}: its plan has no step: there is nothing to look for")
    chosen = sorted(set(steps)) if steps else sorted({i * (total - 1) // (_STEPS - 1) for i in range(_STEPS)})
    wrong = [step for step in chosen if not 0 <= step < total]
    if wrong:
        raise UserError(f"--steps {wrong[0]}: the run has steps 0 to {total - 1}")
    if samples < len(chosen):
        raise UserError(f"--samples {samples} is less than one for each of {len(chosen)} steps: give more")
    requests: list[Request] = []
    owners: list[int] = []
    for step in chosen:
        spec = data.plan.at(step)
        if spec.seq_length + 1 < k + l:
            raise UserError(f"step {step} has sequences of {spec.seq_length} tokens, fewer than k + l = {k + l}")
        for i in range(spec.first_sample, spec.first_sample + min(spec.num_samples, samples // len(chosen))):
            if sum(piece.length for piece in data.dataset.pieces(i)) < k + l:
                continue  # padding is not text
            ids = data.dataset[i][: k + l].tolist()
            requests.append(Request(ids[:k], ids[k:]))
            owners.append(step)
    counts = {step: [0, 0] for step in chosen}
    for step, found in zip(owners, subject.score(requests, batch_size, progress), strict=True):
        counts[step][0] += 1
        counts[step][1] += found.greedy
    done = subject.step if subject.step is not None else (data.done or 0)
    return [StepShare(step, step < done, n, hits) for step, (n, hits) in counts.items() if n]


def shares(found: Sequence[StepShare]) -> dict[str, float]:
    """The share over all sequences that the model has seen, and over those that it has not."""
    out = {}
    for name, seen in (("memorised_seen", True), ("memorised_unseen", False)):
        rows = [row for row in found if row.seen == seen]
        if rows:
            out[name] = sum(row.extractable for row in rows) / sum(row.sequences for row in rows)
    return out
