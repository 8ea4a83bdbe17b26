"""GPT-NeoX's block `curriculum_learning`, which it hands on to DeepSpeed -> our data.curriculum and what goes with it.

    enabled, curriculum_type: seqlen, min_difficulty, max_difficulty
    schedule_type: fixed_linear | fixed_root | fixed_discrete, schedule_config: {...}

A difficulty beyond seq_length is no error: there is nothing more to cut off.
"""

from __future__ import annotations

from typing import Any

from castalia.config.gptneox_given import Given, Rule, near

_BLOCK = ("enabled", "curriculum_type", "min_difficulty", "max_difficulty", "schedule_type", "schedule_config")
_SCHEDULES = {
    "fixed_linear": ("total_curriculum_step", "difficulty_step"),
    "fixed_root": ("total_curriculum_step", "difficulty_step", "root_degree"),
    "fixed_discrete": ("difficulty", "max_step"),
}


def curriculum(given: Given) -> dict[str, Any]:
    """Our values of the block; none where it is not enabled."""
    block: dict[str, Any] = given["curriculum_learning"] or {}
    if not block.get("enabled"):
        return {}
    _known(given, block, _BLOCK)
    if block.get("curriculum_type", "seqlen") != "seqlen":
        given.fail("curriculum_learning", "must have curriculum_type seqlen, which is all that GPT-NeoX acts on")
    kind, config = block.get("schedule_type"), block.get("schedule_config")
    if not isinstance(kind, str) or kind not in _SCHEDULES or not isinstance(config, dict):
        given.fail(
            "curriculum_learning", f"must have a schedule_type of {', '.join(_SCHEDULES)} and its schedule_config"
        )
    _known(given, config, _SCHEDULES[kind])
    if kind == "fixed_discrete":
        lengths: Any = config.get("difficulty")
        until: Any = config.get("max_step")
        if not (_whole(lengths) and _whole(until, empty=True) and len(lengths) == len(until) + 1):
            given.fail("curriculum_learning", "needs a list of difficulty and one of max_step, which is one shorter")
        return {"": "discrete", "lengths": lengths, "until": until}
    numbers: list[Any] = [
        block.get("min_difficulty"),
        block.get("max_difficulty"),
        *(config.get(k) for k in _SCHEDULES[kind]),
    ]
    if not _whole(numbers):
        names = ", ".join(("min_difficulty", "max_difficulty", *_SCHEDULES[kind]))
        given.fail("curriculum_learning", f"needs whole numbers from 1 on for {names}")
    start, most, steps, multiple = numbers[:4]
    if start > most or start < multiple:
        given.fail(
            "curriculum_learning",
            f"has min_difficulty {start}, which must lie between difficulty_step {multiple} and max_difficulty {most}",
        )
    values = {"": kind.removeprefix("fixed_"), "start": start, "end": most, "steps": steps, "multiple": multiple}
    return values | ({"root": numbers[4]} if kind == "fixed_root" else {})


def _known(given: Given, block: dict[str, Any], keys: tuple[str, ...]) -> None:
    unknown = [str(key) for key in block if key not in keys]
    if unknown:
        given.fail("curriculum_learning", f"has the unknown entry '{unknown[0]}'{near(unknown[0], keys)}")


def _whole(values: Any, empty: bool = False) -> bool:
    """Whether this is a list of whole numbers from 1 on."""
    return isinstance(values, list) and (empty or bool(values)) and all(type(v) is int and v > 0 for v in values)


def _rule(part: str) -> Rule:
    name = f"data.curriculum_{part}" if part else "data.curriculum"
    return Rule(name, ("curriculum_learning",), lambda given: curriculum(given).get(part))


CURRICULUM_RULES: tuple[Rule, ...] = tuple(
    _rule(part) for part in ("", "start", "end", "steps", "multiple", "root", "lengths", "until")
)
