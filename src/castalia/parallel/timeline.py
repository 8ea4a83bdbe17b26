"""A schedule of a pipeline -> who does what when: torch's own table of actions, played with given costs.

    torch's table    rank 0: F0 F1 F2 F3 B0 B1 ...     an action waits for its rank to be free, and for
                     rank 1: F0 B0 F1 B1 ...           its input: F of stage s for F of s-1, B for B of s+1
    costs ──────────> begin and end of each action, idle time, activations held at once

The tables are those that torch.distributed.pipelining executes; where it has a program instead (1F1B, GPipe),
the program runs with stages that take notes. Nothing is imitated here. Costs are of one micro-batch on one
rank; a rank that holds several stages does each in its share.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch

from castalia.errors import UserError
from castalia.parallel.stages import SCHEDULES

Table = list[list[tuple[str, int, int]]]
"""By rank: (kind, stage, micro-batch) of each action."""
# Those of torch that no run can ask for yet, beside the words of parallel.schedule.
OTHERS = {"looped_bfs": "LoopedBFS", "zbv": "ZBVZeroBubble", "dualpipe": "DualPipeV"}
V_SHAPED = ("zbv", "dualpipe")  # the last stage lies on the first rank, so that there are always two
KINDS = {"F": "forward", "B": "backward", "I": "backward of inputs", "W": "backward of weights"}


@dataclass(frozen=True)
class Costs:
    """Time of one micro-batch on one rank, all its stages together; in any unit.

    Attributes:
        forward, input, weight: of the forward pass, and of the backward pass for inputs and for weights.
        send: from the end of an action to the beginning of what waits for it on another rank.
    """

    forward: float = 1.0
    input: float = 1.0
    weight: float = 1.0
    send: float = 0.0


@dataclass(frozen=True)
class Block:
    """One action, played.

    Attributes:
        kind: a key of KINDS.
        stage, micro_batch: of what.
        start, end: when.
    """

    kind: str
    stage: int
    micro_batch: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A schedule, played.

    Attributes:
        schedule: its word.
        ranks, stages, micro_batches: how many; stages in all.
        blocks: by rank, in order.
        peaks: by rank, the most micro-batches whose activations were held at once, in the unit of all that a rank's
            layers keep of one: a rank with two stages that holds one stage's of three micro-batches holds 1.5.
    """

    schedule: str
    ranks: int
    stages: int
    micro_batches: int
    blocks: list[list[Block]]
    peaks: list[float]

    @property
    def span(self) -> float:
        """From the first action's beginning to the last one's end."""
        return max(block.end for row in self.blocks for block in row)

    def idle(self, rank: int) -> float:
        """The share of the span in which a rank waits."""
        return 1 - sum(block.end - block.start for block in self.blocks[rank]) / self.span

    @property
    def bubble(self) -> float:
        """The share of all ranks' time in which they wait."""
        return sum(self.idle(rank) for rank in range(self.ranks)) / self.ranks


def timeline(
    schedule: str, ranks: int, micro_batches: int, per_rank: int | None = None, costs: Costs | None = None
) -> Timeline:
    """Play a schedule.

    Args:
        schedule: a word of parallel.schedule, or one of OTHERS.
        ranks: of the pipeline.
        micro_batches: of a step.
        per_rank: stages on each rank; None: 1, or 2 where the schedule needs several.
        costs: None: one for each pass.

    Raises:
        UserError: torch has no such schedule of these sizes.
    """
    costs = costs or Costs()
    table = actions(schedule, ranks, micro_batches, per_rank)
    stages = 1 + max(stage for row in table for _, stage, _ in row)
    share = ranks / stages
    took = {"F": costs.forward, "B": costs.input + costs.weight, "I": costs.input, "W": costs.weight}
    where = {stage: rank for rank, row in enumerate(table) for _, stage, _ in row}
    done: dict[tuple[str, int, int], float] = {}
    waiting, free = [deque(row) for row in table], [0.0] * ranks
    blocks: list[list[Block]] = [[] for _ in table]
    while any(waiting):
        moved = False
        for rank, row in enumerate(waiting):
            while row:
                kind, stage, number = row[0]
                ready = _ready(done, where, kind, stage, number, stages, rank, costs.send)
                if ready is None:
                    break
                start = max(free[rank], ready)
                free[rank] = start + took[kind] * share
                # Gradients of inputs are what others wait for, whether weights' come with them or later.
                done["B" if kind == "I" else kind, stage, number] = free[rank]
                blocks[rank].append(Block(kind, stage, number, start, free[rank]))
                row.popleft()
                moved = True
        if not moved:
            raise AssertionError(f"{schedule}: ranks wait for each other at {[row[0] for row in waiting if row]}")
    return Timeline(schedule, ranks, stages, micro_batches, blocks, [_peak(row) * share for row in blocks])


def actions(schedule: str, ranks: int, micro_batches: int, per_rank: int | None = None) -> Table:
    """What torch does on each rank, in order.

    Raises:
        UserError: torch has no such schedule of these sizes.
    """
    known = {**{word: name.removeprefix("Schedule") for word, (name, _) in SCHEDULES.items()}, **OTHERS}
    if schedule not in known:
        raise UserError(f"--schedule {schedule}: known are {', '.join(known)}")
    if ranks < 2 or micro_batches < 1:
        raise UserError("--stages wants at least 2 and --microbatches at least 1: there is no pipeline else")
    several = SCHEDULES[schedule][1] if schedule in SCHEDULES else True
    if per_rank is not None and (per_rank > 1) is not several:
        need = "several stages" if several else "one stage"
        raise UserError(f"--per-rank {per_rank}: {schedule} has {need} on each rank; leave it out or change it")
    if schedule in V_SHAPED and per_rank not in (None, 2):
        raise UserError(f"--per-rank {per_rank}: {schedule} has two stages on each rank")
    try:
        return (_tabled if several else _executed)(known[schedule], ranks, micro_batches, per_rank or 2)
    except ValueError as error:  # torch's own sentence about numbers that do not go together
        raise UserError(f"{schedule} with {ranks} ranks and {micro_batches} micro-batches: {error}") from None


def _tabled(name: str, ranks: int, micro_batches: int, per_rank: int) -> Table:
    """Of a schedule that runs from a table, the table."""
    from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

    table: Any = get_schedule_ops(name, ranks, micro_batches, per_rank)
    return [[entry for action in row if action is not None for entry in _plain(action)] for row in table]


def _executed(name: str, ranks: int, micro_batches: int, _: int) -> Table:
    """Of a schedule that is written as a program, what it does with a stage that only takes notes.

    torch has a table of 1F1B too, which nothing runs and whose last rank counts its forward passes from one.
    """
    from torch.distributed.pipelining import PipelineStage, schedules

    kind: Any = schedules.get_schedule_class(name)
    out: Table = []
    for rank in range(ranks):
        row: list[tuple[str, int, int]] = []
        stage: Any = mock.create_autospec(PipelineStage, instance=True)
        stage.group_rank, stage.group_size, stage.stage_index, stage.num_stages = rank, ranks, rank, ranks
        stage.submod, stage.is_first, stage.is_last, stage.has_backward = None, rank == 0, False, True
        stage.forward_one_chunk.side_effect = partial(_note, row, "F", rank)
        stage.backward_one_chunk.side_effect = partial(_note, row, "B", rank)
        for operations in ("get_fwd_recv_ops", "get_fwd_send_ops", "get_bwd_recv_ops", "get_bwd_send_ops"):
            getattr(stage, operations).return_value = []
        schedule = kind(stage, micro_batches, loss_fn=torch.sum, scale_grads=False)
        with mock.patch.object(schedule, "_initialize_stage"):
            schedule._step_microbatches([()] * micro_batches, [{}] * micro_batches)
        out.append(row)
    return out


def _note(row: list[tuple[str, int, int]], kind: str, stage: int, number: int, *_: Any, **__: Any) -> None:
    row.append((kind, stage, number))


def _plain(action: Any) -> list[tuple[str, int, int]]:
    """Computations of an action of torch's; those that overlap one after the other."""
    if action.sub_actions:
        return [entry for part in action.sub_actions for entry in _plain(part)]
    kind = action.computation_type.value
    return [(kind, action.stage_index, action.microbatch_index)] if kind in KINDS else []


def _ready(
    done: dict[tuple[str, int, int], float],
    where: dict[int, int],
    kind: str,
    stage: int,
    number: int,
    stages: int,
    rank: int,
    send: float,
) -> float | None:
    """When an action's input is there; None: not known yet."""
    if kind == "W":
        needs = [("B", stage, number)]
    elif kind == "F":
        needs = [("F", stage - 1, number)] if stage else []
    else:
        needs = [("F", stage, number), *([("B", stage + 1, number)] if stage < stages - 1 else [])]
    times = []
    for need in needs:
        if need not in done:
            return None
        times.append(done[need] + (send if where[need[1]] != rank else 0.0))
    return max(times, default=0.0)


def _peak(blocks: Sequence[Block]) -> int:
    """The most (stage, micro-batch)es of a rank that are between the beginning of F and the end of their backward."""
    held = most = 0
    for block in blocks:
        if block.kind == "F":
            held += 1
            most = max(most, held)
        elif block.kind in "BW":
            held -= 1
    return most
