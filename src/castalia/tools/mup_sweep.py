"""Which learning rate and multipliers are best at a small width: short runs, one line of JSON each.

    space ──grid or random draws, numbered──> trial ──narrow model, a few steps──> loss
       results.jsonl <──one line per trial, appended──┘      what is there already is not run again

What is drawn depends on the seed and the trial's number alone, so a sweep that was stopped goes on where it
was, and a larger budget begins with the trials of a smaller one. With muP what is found serves all widths
(Yang et al. 2022). The loss is the mean over the last tenth of the steps.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from castalia.config import Config
from castalia.config.derive import derive
from castalia.data.loader import Loader, Shard
from castalia.data.plan import RunPlan
from castalia.errors import UserError
from castalia.model.transformer import build_model
from castalia.optim import learning_rate, make_store
from castalia.tools.mup import at_width
from castalia.train.data import open_data, open_tokenizer
from castalia.train.engine import LocalEngine

MULTIPLIERS = ("mup_init_scale", "mup_attn_temp", "mup_output_temp", "mup_embedding_mult")
SPACE: dict[str, tuple[float, ...]] = {
    "lr": tuple(2.0**k for k in range(-11, -3)),
    **dict.fromkeys(MULTIPLIERS, (0.25, 0.5, 1.0, 2.0, 4.0)),
}
"""What is tried unless another space is given; `lr` is optimizer.lr, the others are of the section model."""


def trials(space: Mapping[str, Sequence[float]], runs: int, seed: int, grid: bool) -> Iterator[dict[str, float]]:
    """The values of each trial: of a grid all in order, or independent draws; at most `runs`."""
    names = list(space)
    if grid:
        for values in itertools.islice(itertools.product(*space.values()), runs):
            yield dict(zip(names, values, strict=True))
        return
    for number in range(runs):
        draw = random.Random(f"{seed}/{number}")
        yield {name: draw.choice(space[name]) for name in names}


def sweep(
    config: Config,
    results: Path,
    runs: int,
    space: Mapping[str, Sequence[float]] = SPACE,
    width: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    grid: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Run what has not been run of the trials.

    Args:
        config: the large run, with model.mup.
        results: file of one JSON object per line: width, steps, the values, and the loss (null: it diverged).
        runs: the budget, trials of earlier calls included.
        space: for `lr` and each multiplier the values to try.
        width: hidden size; None: the base width.
        steps: of each trial; None: training.steps.
        seed: of the draws.
        grid: all combinations in order, instead of draws.
        say: is told of each trial.

    Returns:
        The lines of the budget's trials, the best first.

    Raises:
        UserError: muP is off, the space has an unknown name, or the data cannot be read.
    """
    if not config.model.mup or config.model.mup_base_hidden_size is None:
        raise UserError("model.mup is false: what is best at a small width would not be at a large one; set it to true")
    unknown = [name for name in space if name not in SPACE]
    if unknown:
        raise UserError(f"--try: '{unknown[0]}' is not known; known: {', '.join(SPACE)}")
    width = width or config.model.mup_base_hidden_size
    done = {_key(line): line for line in _read(results)}
    found = []
    for number, values in enumerate(trials(space, runs, seed, grid)):
        trial = proxy(config, width, values, steps)
        line: dict[str, Any] = {"width": width, "steps": trial.training.steps, **values}
        if _key(line) not in done:
            loss = short_run(trial)
            done[_key(line)] = line | {"loss": loss if math.isfinite(loss) else None}
            _append(results, done[_key(line)])
        found.append(done[_key(line)])
        say(f"{number + 1} of {runs}: {described(found[-1])}")
    return sorted({_key(line): line for line in found}.values(), key=lambda x: (x["loss"] is None, x["loss"]))


def described(line: Mapping[str, Any]) -> str:
    """A trial in words."""
    values = ", ".join(f"{name} {value:g}" for name, value in line.items() if name in SPACE)
    return f"loss {'diverged' if line['loss'] is None else format(line['loss'], '.4f')} with {values}"


def proxy(config: Config, width: int, values: Mapping[str, float], steps: int | None = None) -> Config:
    """The run at another width, with the values of a trial."""
    cfg = config.model
    model = at_width(cfg, width, cfg.mup_base_hidden_size if cfg.mup else None)
    bases = ("mup_base_intermediate_size", "mup_base_head_dim")
    factors: dict[str, Any] = {name: value for name, value in values.items() if name != "lr"}
    model = model.model_copy(update=factors | {name: getattr(cfg, name) for name in bases})
    lr = values.get("lr", config.optimizer.lr)
    schedule = config.schedule.model_copy(update={"min_lr": config.schedule.min_lr * lr / config.optimizer.lr})
    changes: dict[str, Any] = {"model": model, "schedule": schedule}
    changes["optimizer"] = config.optimizer.model_copy(update={"lr": lr})
    if steps is not None:
        changes["training"] = config.training.model_copy(update={"steps": steps, "tokens": None})
        changes["schedule"] = schedule.model_copy(update={"decay_steps": None})
    tokenizer = open_tokenizer(config)
    return derive(config.model_copy(update=changes), tokenizer.vocab_size if tokenizer else None)[0]


def short_run(config: Config) -> float:
    """Train without leaving anything behind; the mean loss of the last tenth of the steps, infinite if it diverges."""
    if config.performance.threads:
        torch.set_num_threads(config.performance.threads)
    steps = config.training.steps or 0
    data = open_data(config, steps, None)
    plan = RunPlan(config.training.batch_size, config.data.seq_length, steps)
    loader = Loader(
        data.datasets["train"], plan, Shard(), config.micro_batch_size, 0, vocab_size=config.model.vocab_size
    )
    model = build_model(config.model, config.training.seed)
    store = make_store(model, config.optimizer, config.training.precision, config.performance.arena)
    engine = LocalEngine(model, store, config.loss, seed=config.training.seed)
    clip, losses = config.optimizer.clip_grad, []
    with closing(loader.stream(0, steps)) as stream:
        for step, batches in enumerate(stream):
            stats = engine.forward_backward(batches, sum(batch.num_tokens for batch in batches), step)
            norm = store.gradient_norm()
            if not (math.isfinite(stats.loss) and math.isfinite(norm.item())):
                return math.inf
            lr = learning_rate(step, config.optimizer.lr, config.schedule, steps)
            store.step(lr, divisor=(norm + 1e-6) / clip if 0 < clip < norm.item() else None)
            engine.updated()
            losses.append(stats.loss)
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last) if last else math.inf


def _key(line: Mapping[str, Any]) -> str:
    return json.dumps({name: value for name, value in line.items() if name != "loss"}, sort_keys=True)


def _read(path: Path) -> list[dict[str, Any]]:
    """The complete lines; what a kill cut off is left out."""
    if not path.exists():
        return []
    lines = []
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            lines.append(json.loads(text))
        except ValueError:
            raise UserError(f"{path}:{number}: is no JSON object: mend the line or remove it") from None
    return lines


def _append(path: Path, line: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        if path.stat().st_size:
            file.truncate(path.read_bytes().rfind(b"\n") + 1)
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
