"""What step N trains on, as pure arithmetic on the configuration and a short journal.

    RunPlan(batch_size, seq_length, steps, journal).at(step) ──> StepSpec ──loader──> Batch

Nothing here depends on what ran before, on ranks or on time; so resuming, replaying, asking
what was in a step and changing the world size need no state beyond the step number. What
is decided during a run, such as leaving out batches after a loss spike or documents from a
step on, is appended to the journal, which the checkpoint keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from castalia.config.ramp import Level, batch_size, samples_before
from castalia.errors import UserError


@dataclass(frozen=True)
class StepSpec:
    """The samples of one optimizer step, over all devices.

    Attributes:
        step: number of optimizer steps done before this one.
        first_sample: number of its first sample in the data order.
        num_samples: samples in the step, consecutive in the data order.
        seq_length: tokens of each sample that the model sees.
    """

    step: int
    first_sample: int
    num_samples: int
    seq_length: int

    @property
    def tokens(self) -> int:
        """Input tokens of the step, over all devices."""
        return self.num_samples * self.seq_length

    def parts(self, batch_size: int) -> list[StepSpec]:
        """The same samples in consecutive specs of at most `batch_size`, to bound memory."""
        end = self.first_sample + self.num_samples
        return [
            StepSpec(self.step, first, min(batch_size, end - first), self.seq_length)
            for first in range(self.first_sample, end, batch_size)
        ]


@dataclass(frozen=True)
class Skip:
    """Amendment: from `from_step` on, leave out the samples of `num_steps` steps.

    The step numbers go on without a gap; only the data moves ahead.
    """

    from_step: int
    num_steps: int
    reason: str = ""

    def __post_init__(self) -> None:
        if self.from_step < 0 or self.num_steps < 1:
            raise UserError(
                f"a skip of {self.num_steps} steps from step {self.from_step} is impossible: "
                f"give a step from 0 on and a number from 1 on"
            )


@dataclass(frozen=True)
class Exclude:
    """Amendment: from `from_step` on these documents are not learnt, and no others; no sample moves.

    Attributes:
        from_step: the first step that it holds for.
        documents: of each training data set, in the order of the configuration, the sequence numbers, as
            `17` or `200-299`. By place and not by name, since data sets may move.
    """

    from_step: int
    documents: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "documents", tuple(tuple(numbers) for numbers in self.documents))


@dataclass(frozen=True)
class Rebatch:
    """Amendment: from `from_step` on batches have other sizes; the samples go on where they were, none twice.

    Attributes:
        from_step: the first step with the sizes of the configuration, or of the next such entry.
        before: the sizes until then, as `[first step, first sample, size]` each.
    """

    from_step: int
    before: tuple[Level, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "before", tuple(Level(*level) for level in self.before))


@dataclass(frozen=True)
class Resize:
    """Amendment: from `from_step` on each step has so many samples, until the next entry that changes that.

    Attributes:
        from_step: the first step with the new size.
        size: samples in each step.
    """

    from_step: int
    size: int


Amendment = Skip | Exclude | Rebatch | Resize
AMENDMENTS: Mapping[str, type[Skip] | type[Exclude] | type[Rebatch] | type[Resize]] = {
    "skip": Skip,
    "exclude": Exclude,
    "rebatch": Rebatch,
    "resize": Resize,
}


def journal_to_json(journal: Iterable[Amendment]) -> list[dict[str, Any]]:
    """The journal as plain data: one object per amendment, its `kind` first."""
    kinds = {cls: kind for kind, cls in AMENDMENTS.items()}
    return [{"kind": kinds[type(entry)], **asdict(entry)} for entry in journal]


def journal_from_json(entries: Iterable[Mapping[str, Any]]) -> tuple[Amendment, ...]:
    """The inverse of `journal_to_json`.

    Raises:
        UserError: an entry is of an unknown kind or has other fields, as of a later release.
    """
    journal = []
    for entry in entries:
        fields = dict(entry)
        kind = fields.pop("kind", None)
        try:
            journal.append(AMENDMENTS[str(kind)](**fields))
        except (KeyError, TypeError):
            raise UserError(
                f"the checkpoint's journal has an entry {dict(entry)!r} that this release does not know: "
                f"use the release that wrote it or a later one"
            ) from None
    return tuple(journal)


@dataclass(frozen=True)
class RunPlan:
    """Which samples each optimizer step takes.

    Attributes:
        batch_size: sequences per optimizer step, over all devices.
        seq_length: tokens of each sequence, at most.
        steps: optimizer steps of the whole run.
        journal: amendments made during the run, in the order of their making.
        lengths: tokens of each sequence of a step, 1 to seq_length; None: always seq_length.
        levels: batch sizes that lead up to batch_size; None: it holds throughout.
    """

    batch_size: int
    seq_length: int
    steps: int
    journal: tuple[Amendment, ...] = ()
    lengths: Callable[[int], int] | None = None
    levels: tuple[Level, ...] | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.seq_length < 1 or self.steps < 0:
            raise ValueError(f"impossible plan: {self}")
        object.__setattr__(self, "journal", tuple(self.journal))

    def at(self, step: int) -> StepSpec:
        """The samples of optimizer step `step`, counted from 0.

        Raises:
            IndexError: the run has no such step.
        """
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of a run of {self.steps} steps")
        sizes = self._sizes()
        skipped = sum(
            samples_before(sizes, entry.from_step + entry.num_steps) - samples_before(sizes, entry.from_step)
            for entry in self.journal
            if isinstance(entry, Skip) and entry.from_step <= step
        )
        length = self.seq_length if self.lengths is None else self.lengths(step)
        return StepSpec(step, samples_before(sizes, step) + skipped, batch_size(sizes, step), length)

    def _sizes(self) -> tuple[Level, ...]:
        """The batch sizes by step and sample, as configured and amended."""
        changes = [entry for entry in self.journal if isinstance(entry, Rebatch | Resize)]
        if not changes:
            return self._configured
        out: list[Level] = []
        begin = 0
        for number, end in enumerate([*(entry.from_step for entry in changes), self.steps]):
            last = changes[number - 1] if number else None
            # A stretch without a size of its own is of the settings that the next entry for such replaces.
            settings = (entry.before for entry in changes[number:] if isinstance(entry, Rebatch))
            resized = (Level(0, 0, last.size),) if isinstance(last, Resize) else None
            found = resized or next(settings, self._configured)
            # Each stretch of steps takes the sizes of its own settings, and begins where the samples were.
            steps = [begin, *(level.first_step for level in found if begin < level.first_step < end)]
            for step in steps if end > begin or end == self.steps else ():
                sample = 0 if not out else out[-1].first_sample + (step - out[-1].first_step) * out[-1].size
                out.append(Level(step, sample, batch_size(found, step)))
            begin = end
        return tuple(out)

    @property
    def _configured(self) -> tuple[Level, ...]:
        return self.levels or (Level(0, 0, self.batch_size),)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Every batch size that the run has or may come to have, in order."""
        resized = (entry.size for entry in self.journal if isinstance(entry, Resize))
        return tuple(dict.fromkeys((*(level.size for level in self._configured), *resized, self.batch_size)))

    @property
    def num_samples(self) -> int:
        """Samples that the data order must hold for the whole run, skipped ones included."""
        if self.steps == 0:
            return 0
        last = self.at(self.steps - 1)
        return last.first_sample + last.num_samples


def evaluation_spec(index: int, batches: int, batch_size: int, seq_length: int, continuing: bool = False) -> StepSpec:
    """The samples of the `index`-th evaluation of a run, counted from 0.

    Natively every evaluation takes the same `batches * batch_size` samples, so that its
    losses compare. `continuing` is GPT-NeoX's way: each goes on where the last one stopped.
    Use `StepSpec.parts(batch_size)` to go through them batch by batch.
    """
    count = batches * batch_size
    return StepSpec(index, index * count if continuing else 0, count, seq_length)


def evaluation_samples(steps: int, interval: int, batches: int, batch_size: int, continuing: bool = False) -> int:
    """Samples to build the validation order for.

    `continuing`: GPT-NeoX's request, (steps // interval + 1) evaluations, which decides its order.
    """
    return (steps // interval + 1 if continuing else 1) * batches * batch_size
