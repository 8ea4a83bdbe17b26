"""What a search found -> lines for a terminal with bars of memory and time, and one object for programs."""

from __future__ import annotations

from typing import Any

from castalia.config import Config
from castalia.parallel.memory import KINDS, Memory
from castalia.tools.plan_machine import Machine
from castalia.tools.plan_search import Candidate, Found
from castalia.tools.plan_time import PARTS, StepTime

WIDTH = 24
REASONS = 8
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def bar(share: float, width: int = WIDTH) -> str:
    """A bar of a share of so many characters, drawn to eighths of one."""
    eighths = round(max(0.0, min(share, 1.0)) * width * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)


def plan_lines(config: Config, machine: Machine, devices: int, found: Found, top: int, chosen: int) -> list[str]:
    """The report.

    Args:
        config: complete.
        top: candidates to list.
        chosen: number of the one to break down, from 1.
    """
    lines = [
        f"{config.name} on {devices} x {machine.name}: steps of {config.training.batch_size:,} sequences of "
        f"{config.data.seq_length:,} tokens, {found.budget / 1e9:.1f} GB planned for on each device",
        "",
    ]
    if found.ranked:
        slowest = found.ranked[:top][-1].time.total
        lines.append(f"     {'memory':<{WIDTH + 9}} {'step':<{WIDTH + 10}} tokens/s")
        for number, candidate in enumerate(found.ranked[:top], 1):
            lines += [f"{number:3d}. {_row(candidate, found.budget, slowest)}"]
        lines += _given(found, slowest)
        lines += ["", *_parts(found.ranked[chosen - 1], chosen)]
    else:
        lines.append("No layout fits into the memory.")
        if found.closest:
            lines += [
                "The one that needs least:",
                f"     {_row(found.closest, found.budget, found.closest.time.total)}",
            ]
            lines += ["", *_parts(found.closest, None)]
        lines += _given(found, None)
    counts = [(found.legal, "looked at"), (len(found.ranked), "fit"), (sum(found.refused.values()), "not legal")]
    lines += ["", "Layouts: " + ", ".join(f"{count:,} {word}" for count, word in counts)]
    common = found.refused.most_common()
    lines += [f"{count:8,}  {why}" for why, count in common[:REASONS]]
    if len(common) > REASONS:
        lines.append(f"{sum(count for _, count in common[REASONS:]):8,}  for {len(common) - REASONS} other reasons")
    return lines


def _row(candidate: Candidate, budget: float, slowest: float) -> str:
    memory, time = candidate.memory.total, candidate.time
    return (
        f"{bar(memory / budget)} {memory / 1e9:5.1f} GB  {bar(time.total / slowest)} {_seconds(time.total):>8}"
        f" {time.tokens_per_second:>10,.0f}  {words(candidate)}"
    )


def words(candidate: Candidate) -> str:
    """A layout in a few words."""
    cfg, config = candidate.config.parallel, candidate.config
    sizes = {"pp": cfg.pipeline, "tp": cfg.tensor, "cp": cfg.context, "dp": candidate.layout.data, "ep": cfg.expert}
    out = [f"{name}{size}" for name, size in sizes.items() if size > 1] or ["one device"]
    if candidate.layout.zero:
        shard = candidate.layout.shard * candidate.layout.context
        out.append(f"ZeRO {cfg.zero}" + (f" over {shard}" if candidate.layout.replicate > 1 else ""))
    if cfg.pipeline > 1:
        out.append(cfg.schedule + (f" x{cfg.virtual_stages}" if cfg.schedule in ("interleaved", "zero_bubble") else ""))
    out.append(f"micro-batch {config.micro_batch_size}")
    if config.performance.recompute != "none":
        out.append(f"recompute {config.performance.recompute}")
    if cfg.offload != "none":
        out.append(f"offload {cfg.offload}")
    return ", ".join(out)


def _given(found: Found, slowest: float | None) -> list[str]:
    """The configuration as it stands beside the others."""
    given = found.as_given
    if given is None:
        return ["", f"The configuration as it stands is not legal here: {found.given_refused}"]
    fits = "" if given.memory.total <= found.budget else " (does not fit)"
    row = _row(given, found.budget, slowest or given.time.total)
    return ["", f"As the configuration stands{fits}:", f"     {row}"]


def _parts(candidate: Candidate, number: int | None) -> list[str]:
    """Where memory and time go."""
    memory, time = candidate.memory, candidate.time
    title = "" if number is None else f"{number}. "
    out = [f"{title}{' '.join(candidate.overrides)}", ""]
    for kind in KINDS:
        value = getattr(memory, kind)
        if value:
            out.append(f"     {kind:<12} {value / 1e9:7.2f} GB  {bar(value / memory.total)}")
    if memory.host:
        out.append(f"     {'on the host':<12} {memory.host / 1e9:7.2f} GB")
    for part in PARTS:
        value = getattr(time, part)
        if value > 0.0005 * time.total:
            out.append(f"     {part:<12} {_seconds(value):>10}  {bar(value / time.total)}")
    out.append(f"     {time.model_flops / 1e12:.4g} TFLOP/s of the model on each device")
    return out


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def plan_json(config: Config, machine: Machine, devices: int, found: Found, top: int) -> dict[str, Any]:
    """The same for programs; bytes, seconds, FLOP/s."""
    return {
        "name": config.name,
        "machine": machine.name,
        "devices": devices,
        "budget_bytes": int(found.budget),
        "ranked": [as_dict(candidate) for candidate in found.ranked[:top]],
        "as_given": as_dict(found.as_given) if found.as_given else None,
        "as_given_refused": found.given_refused,
        "closest": as_dict(found.closest) if found.closest and not found.ranked else None,
        "counts": {"looked_at": found.legal, "fit": len(found.ranked), "too_large": found.too_large},
        "refused": [{"count": count, "why": why} for why, count in found.refused.most_common()],
    }


def as_dict(candidate: Candidate) -> dict[str, Any]:
    """One candidate."""
    memory: Memory = candidate.memory
    time: StepTime = candidate.time
    return {
        "settings": candidate.settings,
        "memory": {kind: getattr(memory, kind) for kind in KINDS} | {"total": memory.total, "host": memory.host},
        "seconds": {part: getattr(time, part) for part in PARTS} | {"total": time.total},
        "tokens_per_second": time.tokens_per_second,
        "model_flops_per_device": time.model_flops,
    }
