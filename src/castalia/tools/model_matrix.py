"""Every norm x position x activation x residual form of the model -> three checks each, one table.

    combination ──> copy task learnt      trained until the loss says that it copies
                ├─> cached == uncached    in pieces with a cache, against one forward pass (fp64)
                └─> gradient              autograd against finite differences, tensor by tensor (fp64)

    python -m castalia.tools.model_matrix [--pairs] [--output FILE]

The full product takes a quarter of an hour on one core. The test suite runs `pairs`: few
combinations, in which any two values of any two axes meet.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from castalia.config import ModelConfig
from castalia.errors import CheckFailed
from castalia.generate.engine import make_cache
from castalia.model import Transformer, build_model, linear_cross_entropy
from castalia.train.environment import environment

AXES: dict[str, tuple[str, ...]] = {
    "norm": ("layernorm", "rmsnorm", "rmsnorm_eps_outside", "scalenorm", "non_parametric_layernorm"),
    "position": ("rotary", "learned", "sinusoidal", "rpe", "alibi", "none"),
    "activation": (
        *("gelu", "gelu_tanh", "relu", "silu", "mish", "softsign"),
        *("swiglu", "geglu", "reglu", "bilinear", "glu"),
    ),
    "residual": ("sequential", "parallel", "tied norms"),
}
Combination = tuple[str, ...]

VOCABULARY, PERIOD, REPEATS, ROWS = 12, 3, 3, 32
MOST_STEPS = 1500
# Nats. Who knows which PERIOD tokens repeat and that none follows itself, but not their order, loses
# ln(PERIOD - 1); half of that needs their order, which only attention to the earlier repeats gives.
COPIED = 0.5 * math.log(PERIOD - 1)
CACHE_TOLERANCE = 1e-10
GRADIENT_TOLERANCE = 1e-5


def product() -> list[Combination]:
    """Every combination."""
    return list(itertools.product(*AXES.values()))


def pairs() -> list[Combination]:
    """Few combinations in which every pair of values of two axes occurs; greedy, always the same."""
    missing = {
        (a, b)
        for one, two in itertools.combinations(range(len(AXES)), 2)
        for a in ((one, v) for v in list(AXES.values())[one])
        for b in ((two, v) for v in list(AXES.values())[two])
    }

    def covered(combination: Combination) -> set[Any]:
        return set(itertools.combinations(enumerate(combination), 2))

    chosen: list[Combination] = []
    candidates = [(c, covered(c)) for c in product()]
    while missing:
        best, gain = max(candidates, key=lambda item: len(item[1] & missing))
        chosen.append(best)
        missing -= gain
    return chosen


def configuration(combination: Combination, **changes: Any) -> ModelConfig:
    """A tiny model of that form."""
    values: dict[str, Any] = dict(zip(AXES, combination, strict=True))
    if values["residual"] == "tied norms":
        values |= {"residual": "parallel", "tie_norms": True}
    if values["norm"] not in ("layernorm", "non_parametric_layernorm"):
        values["norm_epsilon"] = 1e-8
    shape = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": VOCABULARY}
    # Few buckets, so that the few distances of short sequences reach the shared ones.
    return ModelConfig(
        **(shape | {"max_position_embeddings": 64, "rpe_num_buckets": 8, "rpe_max_distance": 16} | values | changes)
    )


def random_model(cfg: ModelConfig, std: float = 0.3) -> Transformer:
    """An fp64 model whose every parameter is random, biases and gains too."""
    model = Transformer(cfg).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            mean = 1.0 if name.endswith("norm.weight") else 0.0
            p.copy_(mean + std * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def copy_task(cfg: ModelConfig, most_steps: int = MOST_STEPS) -> tuple[float, int]:
    """Train on sequences that repeat PERIOD distinct tokens until the repeats are predicted.

    Returns:
        Mean loss of the last ten steps in nats, and the steps it took; training ends below COPIED.
    """
    model = build_model(cfg, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    generator, losses = torch.Generator().manual_seed(0), []
    for step in range(1, most_steps + 1):
        first = torch.rand(ROWS, VOCABULARY, generator=generator).argsort(1)[:, :PERIOD]
        tokens = first.repeat(1, REPEATS)
        labels = tokens[:, 1:].clone()
        labels[:, : PERIOD - 1] = -100
        count = ROWS * PERIOD * (REPEATS - 1)
        loss, _ = linear_cross_entropy(model(tokens[:, :-1]), model.head_weight, labels, scale=1 / count)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step >= 10 and sum(losses[-10:]) < 10 * COPIED:
            break
    return sum(losses[-10:]) / 10, len(losses)


@torch.no_grad()
def cache_error(model: Transformer, strided: bool = False) -> float:
    """Largest difference of logits between one pass and pieces with a cache, relative to the largest logit.

    Args:
        strided: give explicit positions 3, 5, 7, ... instead of the default ones.
    """
    tokens = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(2))
    positions = 3 + 2 * torch.arange(20) if strided else None
    whole = model.logits(model(tokens, positions))
    cache, parts, start = make_cache(model, 20), [], 0
    for size in (7, 1, 1, 5, 6):
        piece = slice(start, start + size)
        given = None if positions is None else positions[piece]
        parts.append(model.logits(model(tokens[:, piece], given, cache)))
        cache.advance(size)
        start += size
    return float((torch.cat(parts, 1) - whole).abs().max() / whole.abs().max())


def gradient_error(model: Transformer) -> tuple[float, str]:
    """Autograd against central differences along one random direction in each parameter.

    Returns:
        The largest difference of the two derivatives, relative to the norm of that parameter's gradient
        (or a thousandth of the whole's, where that is larger), and the parameter.
    """
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, VOCABULARY, (2, 9), generator=generator)

    def loss() -> Tensor:
        logits = model.logits(model(tokens[:, :-1]))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss(), [p for _, p in trained])
    whole = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    worst, at = 0.0, ""
    with torch.no_grad():
        for (name, parameter), gradient in zip(trained, gradients, strict=True):
            direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            direction /= direction.norm()
            expected, scale = float((gradient * direction).sum()), max(float(gradient.norm()), 1e-3 * whole)
            error = math.inf
            # Where a step happens to cross the kink of a ReLU, a smaller one does not; a wrong gradient stays wrong.
            for step in (1e-5, 1e-6, 1e-7):
                parameter.add_(direction, alpha=step)
                ahead = loss()
                parameter.sub_(direction, alpha=2 * step)
                behind = loss()
                parameter.add_(direction, alpha=step)
                error = min(error, abs(float(ahead - behind) / (2 * step) - expected) / scale)
                if error < GRADIENT_TOLERANCE:
                    break
            if error >= worst:
                worst, at = error, name
    return worst, at


@dataclass(frozen=True)
class Row:
    """One combination's figures."""

    combination: Combination
    loss: float
    steps: int
    cached: float
    strided: float
    gradient: float
    tensor: str

    @property
    def failures(self) -> list[str]:
        """Which checks failed, in words."""
        checks = (
            (self.loss < COPIED, f"copies only to {self.loss:.3f} nats after {self.steps} steps"),
            (self.cached < CACHE_TOLERANCE, f"cached and uncached differ by {self.cached:.1e}"),
            (self.strided < CACHE_TOLERANCE, f"with given positions they differ by {self.strided:.1e}"),
            (self.gradient < GRADIENT_TOLERANCE, f"the gradient of {self.tensor} is off by {self.gradient:.1e}"),
        )
        return [words for good, words in checks if not good]


def check(combination: Combination) -> Row:
    """Run all checks on one combination."""
    cfg = configuration(combination)
    loss, steps = copy_task(cfg)
    model = random_model(cfg)
    gradient, tensor = gradient_error(model)
    return Row(combination, loss, steps, cache_error(model), cache_error(model, True), gradient, tensor)


def table(rows: Sequence[Row]) -> str:
    """The worst figures of each value of each axis, then every combination."""
    head = ("copy: steps", "loss", "cached", "positions given", "gradient")
    lines = [
        f"{len(rows)} combinations, {sum(not r.failures for r in rows)} passed all checks.",
        "",
        f"copy: steps until a sequence that repeats {PERIOD} of {VOCABULARY} tokens is predicted, and the loss",
        f"there in nats; the bound is {COPIED:.2f}, half of what knowing the tokens without their order leaves.",
        "cached: largest difference of logits between generation in pieces with a cache and one pass, relative",
        f"to the largest logit, in fp64, bound {CACHE_TOLERANCE:g}; with default positions, and with 3, 5, 7, ...",
        "gradient: autograd against central differences along a random direction in each tensor, relative to that",
        f"tensor's gradient; the worst tensor, fp64, bound {GRADIENT_TOLERANCE:g}.",
        "",
        "## Worst of each value",
        "",
        *_lines(("", *head), _worst(rows)),
        "",
        "## All",
        "",
        *_lines((*AXES, *head), ((*r.combination, *_figures([r])) for r in rows)),
    ]
    return "\n".join(lines) + "\n"


def _figures(rows: Sequence[Row]) -> tuple[str, ...]:
    worst = [max(getattr(r, key) for r in rows) for key in ("cached", "strided", "gradient")]
    steps, loss = max(r.steps for r in rows), max(r.loss for r in rows)
    return (str(steps), f"{loss:.2f}", *(f"{value:.0e}" for value in worst))


def _worst(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    for index, (axis, values) in enumerate(AXES.items()):
        for value in values:
            some = [r for r in rows if r.combination[index] == value]
            if some:
                yield (f"{axis} {value}", *_figures(some))


def _lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def certify_model_matrix(_: Path | None = None, combinations: Sequence[Combination] | None = None) -> str:
    """Every norm x position x activation x residual: learns to copy, generates as it trains, right gradients."""
    rows, started = [], time.monotonic()
    combinations = combinations or product()
    for number, combination in enumerate(combinations, 1):
        rows.append(check(combination))
        for words in rows[-1].failures:
            print(f"{' '.join(combination)}: {words}", file=sys.stderr, flush=True)
        if number % 50 == 0:
            print(f"{number} of {len(combinations)}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    failed = [r for r in rows if r.failures]
    if failed:
        first = failed[0]
        raise CheckFailed(
            f"{len(failed)} of {len(rows)} combinations; {' '.join(first.combination)}: {first.failures[0]}"
        )
    return table(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, and write the certificate."""
    parser = argparse.ArgumentParser(
        prog="python -m castalia.tools.model_matrix", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--pairs", action="store_true", help="the few combinations in which all pairs meet")
    parser.add_argument("--output", type=Path, default=Path("docs/certificates/model_matrix.md"))
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the matrices are too small to share out
    facts = environment()
    try:
        body = certify_model_matrix(combinations=pairs() if args.pairs else product())
    except CheckFailed as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 4
    args.output.parent.mkdir(parents=True, exist_ok=True)
    fresh = args.output.with_name(f".{args.output.name}.new")
    fresh.write_text(_heading(facts, " --pairs" if args.pairs else "") + body, encoding="utf-8")
    os.replace(fresh, args.output)
    return 0


def _heading(facts: Mapping[str, Any], flags: str) -> str:
    git = facts.get("git") or {}
    commit = f"{git.get('commit', 'unknown')}{' with changes' if git.get('dirty') else ''}"
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    lines = [
        "# model_matrix",
        "",
        certify_model_matrix.__doc__ or "",
        "",
        f"- {today}, commit {commit}",
        f"- `python -m castalia.tools.model_matrix{flags}`",
        f"- torch {facts['torch']}, {facts.get('cpu', 'unknown CPU')}",
        "",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
