"""`castalia plan`: a configuration's sizes without torch; with a machine, its layouts; without either, the machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from castalia.config import Config, load
from castalia.config.derive import derive
from castalia.config.files import write_text
from castalia.config.render import to_yaml
from castalia.errors import UserError
from castalia.tools.plan import tokenizer_vocabulary
from castalia.tools.plan_machine import Machine, read_machine

KEPT = ("parallel.", "training.micro_batch_size", "performance.recompute")


def plan_layouts(
    files: Sequence[str],
    overrides: Sequence[str],
    machine: str,
    devices: int | None = None,
    top: int = 10,
    choose: int = 1,
    write: str | None = None,
) -> tuple[list[str], dict[str, Any]]:
    """Rank the layouts of a run on a machine, and write the configuration of one of them.

    What the command line says of the layout, the micro-batch and recomputation is kept; what the files say is one
    choice among others, and is shown beside them.

    Args:
        machine: a shipped name, or a file.
        devices: ranks; None: one node's.
        top: candidates to tell of.
        choose: the number of the one to write and break down, from 1.
        write: file of the chosen configuration.

    Returns:
        lines for people, an object for programs.

    Raises:
        UserError: the machine or the vocabulary is not known, or there is no such candidate.
    """
    described = read_machine(machine)
    config = load(files, overrides)
    complete, _ = derive(config, tokenizer_vocabulary(config))
    if complete.model.vocab_size is None:
        raise UserError("model.vocab_size is not set and there is no tokenizer to take it from: give model.vocab_size")
    from castalia.tools.plan_search import find_candidates
    from castalia.tools.plan_text import plan_json, plan_lines

    count = devices or described.devices_per_node
    said = [override.split("=")[0] for override in overrides]
    found = find_candidates(complete, described, count, [key for key in said if key.startswith(KEPT)])
    if found.ranked and choose > len(found.ranked):
        raise UserError(f"--choose {choose}: there are {len(found.ranked)} layouts that fit")
    lines = plan_lines(complete, described, count, found, top, choose)
    answer = plan_json(complete, described, count, found, top)
    if write is not None:
        if not found.ranked:
            raise UserError(f"--write {write}: no layout of {count} devices fits; more of them may hold the model")
        chosen = found.ranked[choose - 1]
        write_text(write, _yaml(config, chosen.config, described, count))
        lines += ["", f"{write}: layout {choose}"]
        answer["written"] = write
    return lines, answer


def _yaml(config: Config, chosen: Config, machine: Machine, devices: int) -> str:
    """The configuration as it was said, with the chosen settings."""
    updates = {
        "parallel": chosen.parallel,
        "training": config.training.model_copy(update={"micro_batch_size": chosen.micro_batch_size}),
        "performance": config.performance.model_copy(
            update={
                "recompute": chosen.performance.recompute,
                "offload_activations": chosen.performance.offload_activations,
            }
        ),
    }
    head = f"# By `castalia plan`, for {devices} x {machine.name}.\n"
    return head + to_yaml(config.model_copy(update=updates), minimal=True)


def measure_machine(path: str) -> list[str]:
    """Measure this machine and write its description.

    Raises:
        UserError: the file is there already, or cannot be written.
    """
    if Path(path).suffix not in (".yml", ".yaml"):
        raise UserError(f"--measure {path}: a machine's description ends in .yml")
    if Path(path).exists():
        raise UserError(f"--measure {path}: is there already; give another name, or remove it")
    from castalia.tools.plan_measure import described, measure

    values = measure()
    write_text(path, described(values))
    return [f"{path}: {values['name']}", *(f"  {key}: {value}" for key, value in values.items() if key != "name")]
