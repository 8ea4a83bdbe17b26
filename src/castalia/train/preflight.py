"""A configuration -> everything that can be known of its run before anything is built or written.

    Config ─derive─> complete Config ─┬─> sizes against this machine's memory
    tokenizer ids ──────^             ├─> names of parts, on the meta device
                                      └─> device, data sets, what `start` names

`castalia train` and `castalia config check` both go through here, so that what the one calls
right does not fail in the other, and a run that cannot begin leaves no folder behind.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from castalia.checkpoint import Mirror
from castalia.config import Config
from castalia.config.derive import derive
from castalia.data.tokenizer import Tokenizer
from castalia.errors import UserError
from castalia.model.float8 import missing_float8
from castalia.model.initial import INITIALISERS
from castalia.model.size import ModelSize, model_size, parameter_shapes
from castalia.model.transformer import Transformer
from castalia.optim.optimizers import optimizer_kind
from castalia.parallel.auto import choose_layout
from castalia.parallel.layout import layout_of
from castalia.parallel.parallelize import check_model
from castalia.parallel.world import World, device_memory, enter_world, processes_here
from castalia.train.controller import check_controller
from castalia.train.data import RunData, missing_splits, open_data, open_tokenizer, repeats, unread_sources
from castalia.train.evaluation import check_tasks
from castalia.train.noise import check_noise
from castalia.train.samples import check_sampling
from castalia.train.start import check_start

_LAYERS_TRIED = 200
_MOST_THREADS = 1024  # more than any machine's cores; so many that the system gives no more end the process


@dataclass(frozen=True)
class Prepared:
    """What a run needs to know of itself.

    Attributes:
        config: complete.
        derivation: a line for each value that was filled in.
        tokenizer: None if there is none.
        size: of the model.
        world: this process and its device.
        data: opened.
        warnings: what is worth a look, a sentence each.
    """

    config: Config
    derivation: list[str]
    tokenizer: Tokenizer | None
    size: ModelSize
    world: World
    data: RunData
    warnings: list[str]


def prepare_run(config: Config) -> Prepared:
    """Check a configuration against this machine: its files, its device and its memory.

    Raises:
        UserError: it cannot be trained here.
    """
    tokenizer = open_tokenizer(config)
    full, derivation = derive(config, tokenizer.vocab_size if tokenizer else None)
    steps = full.training.steps or 0
    if steps == 0:
        raise UserError("training.steps is 0: there is nothing to train; give at least 1")
    if full.evaluation.characters and tokenizer is None:
        raise UserError("evaluation.characters: there is no tokenizer to count with: name it in tokenizer.path")
    if full.model.soft_prompt_text is not None and tokenizer is None:
        raise UserError("model.soft_prompt_text: there is no tokenizer to read it with: name it in tokenizer.path")
    if (full.performance.threads or 0) > _MOST_THREADS:
        raise UserError(f"performance.threads {full.performance.threads} is beyond {_MOST_THREADS}: make it smaller")
    size = model_size(full)
    check_directory(full.run_dir)
    world = enter_world(full.performance.device)
    if full.parallel.layout == "auto":
        full, line = _chosen(full, world)
        derivation = [*derivation, line]
    check_model(full, layout_of(full.parallel, world.size))
    check_tasks(full, layout_of(full.parallel, world.size), tokenizer)
    check_sampling(full, tokenizer)
    check_noise(full, layout_of(full.parallel, world.size))
    check_controller(full, layout_of(full.parallel, world.size))
    if full.training.precision == "fp8" and (problem := missing_float8(world.device)):
        raise UserError(
            f"training.precision fp8: the device {world.device} cannot multiply float8 matrices ({problem}): "
            "set training.precision=bf16"
        )
    if world.size == 1:  # several processes share the load
        check_memory(full, size, world.device)
    _check_names(full)
    if full.checkpoint.path is not None:
        Mirror(full.checkpoint.path)  # speaks to nobody yet
    if not any(Path(full.run_dir, "checkpoints").glob("step-*")):  # else it goes on from its own
        check_start(full.start)
    try:
        data = open_data(full, steps, tokenizer)
    except MemoryError:  # an int64 for each document of each epoch
        raise UserError(
            f"the order of the data for training.steps {steps}, training.batch_size {full.training.batch_size} and "
            f"evaluation.batches {full.evaluation.batches} does not fit into this machine's memory: lower one of them"
        ) from None
    return Prepared(
        full, [*derivation, *repeats(data)], tokenizer, size, world, data, _warnings(full, data, tokenizer, steps)
    )


def _chosen(config: Config, world: World) -> tuple[Config, str]:
    """The configuration with a layout of its own, and why."""
    here, total = processes_here(world), memory_bytes()
    memory = device_memory(world.device) or (total // here if world.device.type == "cpu" and total else None)
    if memory is None:
        raise UserError("parallel.layout auto: this machine does not tell its memory: give the sizes of parallel:")
    parallel, (line,) = choose_layout(config, world.size, here, memory, world.device.type != "cpu")
    return config.model_copy(update={"parallel": parallel}), line


def _warnings(config: Config, data: RunData, tokenizer: Tokenizer | None, steps: int) -> list[str]:
    lines = [*missing_splits(config, data, steps), *unread_sources(data)]
    if data.datasets.keys() & {"valid", "test"} and data.token_bytes is None:
        why = "there is no tokenizer" if tokenizer is None else "the tokenizer does not keep every byte of a text"
        lines.append(f"evaluations give the loss alone, no bits per byte, since {why}")
    return lines


def _check_names(config: Config) -> None:
    """Parts that are named must exist and fit together: a model without memory is made of them."""
    optimizer_kind(config.optimizer)
    names = list(parameter_shapes(config.model, config.model.vocab_size or 1))
    trained = [n for n in names if n == "soft_prompt.weight"] if config.model.soft_prompt_tokens else names
    for group in config.optimizer.groups:
        if not any(re.search(group.match, name) for name in trained):
            raise UserError(
                f"optimizer.groups: '{group.match}' matches none of the parameters that are trained "
                f"({trained[0]}, ...): correct or remove it"
            )
    if config.model.num_layers <= _LAYERS_TRIED:  # a millisecond each
        with torch.device("meta"):
            Transformer(config.model)
    for key in ("init_method", "output_init_method"):
        method = getattr(config.model, key)
        if method not in INITIALISERS:
            raise UserError(f"model.{key}: '{method}' is not known; known: {', '.join(INITIALISERS)}")


def check_memory(config: Config, size: ModelSize, device: torch.device) -> None:
    """Refuse what this machine cannot hold, before the attempt: the least that a step needs against all memory.

    Counted are weights, gradients, moments and bf16 copies, the copy that is saved from, and of the
    activations the input of each layer alone. Only a CPU's memory is known here.

    Raises:
        UserError: it is too much.
    """
    there = memory_bytes()
    if device.type != "cpu" or there is None:
        return
    state = size.weight_bytes + size.gradient_bytes + size.optimizer_bytes + size.working_bytes
    tokens = config.micro_batch_size * config.data.seq_length
    inputs = 4 * tokens * config.model.hidden_size * config.model.num_layers
    copy = size.weight_bytes + size.optimizer_bytes if config.checkpoint.asynchronous else 0
    if state + inputs <= there < state + inputs + copy:
        raise UserError(
            f"training needs at least {_gigabytes(state + inputs)}, and a copy of weights and moments to save from "
            f"another {_gigabytes(copy)}, which is more than this machine's {_gigabytes(there)}: "
            "set checkpoint.asynchronous=false"
        )
    if state + inputs > there:
        bigger = (
            "make the model smaller (model.num_layers, model.hidden_size, model.vocab_size)"
            if state > inputs
            else "lower training.micro_batch_size or data.seq_length"
        )
        raise UserError(
            f"training needs at least {_gigabytes(state)} for weights, gradients and optimizer and "
            f"{_gigabytes(inputs)} for the inputs of the layers, and this machine has {_gigabytes(there)}: {bigger}"
        )


def memory_bytes() -> int | None:
    """This machine's memory, or what its container may use; None where the system does not tell."""
    try:
        sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (ValueError, OSError, AttributeError):  # Windows has neither
        return None
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            sizes.append(int(Path(limit).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such limit: `max`
            continue
    return min(sizes)


def check_directory(run_dir: str) -> None:
    """Refuse a folder that holds somebody else's files: a run would write among them.

    Raises:
        UserError: it is not empty and no run's.
    """
    path = Path(run_dir)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file, and a run needs a folder: choose another name or output")
    if not path.is_dir() or any(
        (path / ours).exists() for ours in ("checkpoints", "run.lock", "metrics.jsonl", "launch")
    ):
        return
    foreign = sorted(entry.name for entry in path.iterdir() if not _may_be_there(entry.name))
    if foreign:
        raise UserError(
            f"{path}: is no run's folder and holds other files ({foreign[0]}, ...): choose another name or output"
        )


def _may_be_there(name: str) -> bool:
    """What a user puts into a run's folder beforehand: configurations, notes, logs."""
    return name.startswith(".") or name == "sources" or name.endswith((".yml", ".yaml", ".json", ".txt", ".md", ".log"))


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
