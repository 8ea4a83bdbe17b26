"""Two models' values on the same items -> the difference, with what chance alone would give.

    values of A, values of B, weights ──> difference of means ──┬─ paired bootstrap: interval, p
                                                                └─ sign test on the items that differ: p

Items are drawn in pairs, so that what makes an item hard for both models drops out (Koehn 2004;
Dror et al. 2018). For values of 0 and 1 the sign test is McNemar's, in its exact form: of the
items that just one model gets right, each is as likely to be one's as the other's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from castalia.errors import UserError

DRAWS = 10_000


@dataclass(frozen=True)
class Comparison:
    """A against B on the same items.

    Attributes:
        items: how many.
        a, b: weighted means.
        difference: a - b.
        low, high: of the difference, the middle 95 % of the bootstrap's draws.
        p_bootstrap: two-sided: how often draws would put the difference on the other side of 0.
        a_higher, b_higher: items on which one has the higher value.
        p_sign: two-sided exact sign test on these; McNemar's exact test where values are 0 and 1.
    """

    items: int
    a: float
    b: float
    difference: float
    low: float
    high: float
    p_bootstrap: float
    a_higher: int
    b_higher: int
    p_sign: float

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def compare(
    a: Sequence[float],
    b: Sequence[float],
    weights: Sequence[float] | None = None,
    draws: int = DRAWS,
    seed: int = 1234,
) -> Comparison:
    """Compare two models item by item.

    Args:
        a, b: a value for each item, in the same order, such as 0 or 1, or bits per byte of a document.
        weights: of the items in the mean, such as bytes; None: equal.
        draws: resamples of the bootstrap.
        seed: of the draws.

    Raises:
        UserError: there is no item, or not as many for one model as for the other.
    """
    if len(a) != len(b) or not len(a):
        raise UserError(f"{len(a)} items of one model cannot be compared with {len(b)} of the other: use the same ones")
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, np.float64)
    gain, count = w * (x - y), len(x)
    difference = float(gain.sum() / w.sum())
    rng = np.random.default_rng(seed)
    found = np.empty(draws)
    step = max(1, 2_000_000 // count)  # bounds the memory
    for begin in range(0, draws, step):
        rows = rng.integers(0, count, (min(step, draws - begin), count))
        found[begin : begin + len(rows)] = gain[rows].sum(1) / w[rows].sum(1)
    low, high = np.quantile(found, [0.025, 0.975])
    tail = min(int((found <= 0).sum()), int((found >= 0).sum()))
    wins, losses = int((x > y).sum()), int((x < y).sum())
    return Comparison(
        count,
        float((w * x).sum() / w.sum()),
        float((w * y).sum() / w.sum()),
        difference,
        float(low),
        float(high),
        min(1.0, 2 * (tail + 1) / (draws + 1)),
        wins,
        losses,
        sign_test(wins, losses),
    )


def sign_test(wins: int, losses: int) -> float:
    """Two-sided probability of so uneven a split, or a more uneven one, of fair coins."""
    n, k = wins + losses, min(wins, losses)
    if n == 0:
        return 1.0
    # In logarithms, since 2^n leaves a double's range.
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    top = max(logs)
    return min(1.0, 2 * math.exp(top) * sum(math.exp(value - top) for value in logs))


def paired_items(
    a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]], metrics: Sequence[str]
) -> dict[str, tuple[list[float], list[float]]]:
    """Values of the metrics on the documents that both logs of lm-evaluation-harness hold, in order.

    Args:
        a, b: `samples` of one task: `doc_id`, `doc_hash`, and a value for each metric.
        metrics: those of interest; one that is not a number per document is left out.

    Raises:
        UserError: a document of one is another in the other.
    """
    ours, theirs = ({(s["doc_id"], s.get("filter")): s for s in samples} for samples in (a, b))
    keys = [key for key in ours if key in theirs]
    if any(ours[key].get("doc_hash") != theirs[key].get("doc_hash") for key in keys):
        raise UserError("the two models were given different documents: evaluate both on the same task files")
    found = {}
    for metric in metrics:
        pairs = [(ours[key].get(metric), theirs[key].get(metric)) for key in keys]
        if pairs and all(isinstance(v, int | float | np.number) for pair in pairs for v in pair):
            found[metric] = [float(x) for x, _ in pairs], [float(y) for _, y in pairs]  # type: ignore[arg-type]
    return found
