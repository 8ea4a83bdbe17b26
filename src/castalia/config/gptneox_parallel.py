"""GPT-NeoX's keys of parallelism -> the `parallel:` section.

    pipe_parallel_size, model_parallel_size, sequence_parallel    pipeline (0 is 1), tensor, sequence
    zero_optimization.stage                                       zero
    pipe_partition_method                                         partition
    zero_optimization.offload_optimizer, .cpu_offload             offload: optimizer
    zero_optimization.offload_param, .cpu_offload_params          offload: parameters
    checkpoint_activations, checkpoint_in_cpu                     performance.recompute: full, .offload_activations

What else `zero_optimization` holds sizes buffers and overlaps.
"""

from __future__ import annotations

import re
from typing import Any

from castalia.config.gptneox_given import Given, Rule

_OFFLOADS = {
    "cpu_offload": "optimizer",
    "offload_optimizer": "optimizer",
    "cpu_offload_params": "parameters",
    "offload_param": "parameters",
}
# What their layers are called, by which `type:REGEX` finds them.
_LAYERS = ("ParallelTransformerLayerPipe", "gMLPBlock")


def _size(key: str) -> Any:
    def value(given: Given) -> int | None:
        size = given[key]
        if size is None:
            return None
        if size < 0:
            given.fail(key, f"is {size}: give 1 or more")
        return max(int(size), 1)

    return value


def sequence(given: Given) -> bool | None:
    """Sequence parallelism among tensor ranks; with one of them it has no effect there either."""
    return True if given["sequence_parallel"] and (given["model_parallel_size"] or 1) > 1 else None


def zero(given: Given) -> int | None:
    """ZeRO's stage."""
    block = given["zero_optimization"]
    if block is None:
        return None
    stage = block.get("stage", 0)
    if given.tuned and (stage == "auto" or (isinstance(stage, list) and stage)):
        given.remark(f"zero_optimization: stage {stage}: the lowest; `castalia tune` tries those that may be quicker")
        stage = 0 if stage == "auto" else min(stage, key=str)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        given.fail("zero_optimization", f"has stage {stage!r}: give 0, 1, 2 or 3")
    return int(stage)


def offload(given: Given) -> str | None:
    """What lives on the host; weights that do take their optimizer with them. Without ZeRO it means nothing."""
    block = given["zero_optimization"] or {}
    asked = set()
    for key, what in _OFFLOADS.items():
        value = block.get(key)
        device = value.get("device", "none") if isinstance(value, dict) else ("cpu" if value else "none")
        if device not in ("cpu", "none"):
            given.unsupported("zero_optimization", f"its {key} to {device}", "give it the device cpu")
        if device == "cpu":
            asked.add(what)
    if not asked or not block.get("stage", 0):
        return None
    if "parameters" in asked and block["stage"] != 3:
        given.fail("zero_optimization", f"offloads parameters with stage {block['stage']}: give stage 3")
    return "parameters" if "parameters" in asked else "optimizer"


def partition(given: Given) -> str | None:
    """How layers go to stages; without stages it means nothing."""
    method = given["pipe_partition_method"]
    if (given["pipe_parallel_size"] or 1) < 2 or method is None:
        return None
    if method in ("uniform", "parameters"):
        return str(method)
    pattern = str(method).removeprefix("type:")
    if not str(method).startswith("type:") or not any(re.search(pattern, n, re.IGNORECASE) for n in _LAYERS):
        given.fail("pipe_partition_method", f"is {method!r}: give uniform, parameters, or type:REGEX of their layers")
    return "type:transformer"


PARALLEL_RULES: tuple[Rule, ...] = (
    Rule("parallel.pipeline", ("pipe_parallel_size",), _size("pipe_parallel_size")),
    Rule("parallel.tensor", ("model_parallel_size",), _size("model_parallel_size")),
    Rule("parallel.sequence", ("sequence_parallel", "model_parallel_size"), sequence),
    Rule("parallel.zero", ("zero_optimization",), zero),
    Rule("parallel.offload", ("zero_optimization",), offload),
    Rule(
        "performance.offload_activations",
        ("checkpoint_in_cpu", "checkpoint_activations"),
        lambda g: True if g["checkpoint_in_cpu"] and g["checkpoint_activations"] else None,
    ),
    Rule(
        "performance.recompute", ("checkpoint_activations",), lambda g: "full" if g["checkpoint_activations"] else None
    ),
    Rule("parallel.partition", ("pipe_partition_method", "pipe_parallel_size"), partition),
)
