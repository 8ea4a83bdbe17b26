"""The section `profile`: where a run's time and memory go, looked at while it trains."""

from __future__ import annotations

from pydantic import model_validator

from castalia.config.section import Section, setting


class ProfileConfig(Section):
    """Traces, memory and modules of a few steps, and how the phases of every step are timed."""

    start: int | None = setting(
        None, "first step that is traced, counted from 1; null: none", "cosmetic", "steps", ge=1
    )
    stop: int | None = setting(None, "last one; null: `start` alone", "cosmetic", "steps", ge=1)
    trace: bool = setting(True, "write torch's trace of these steps, for Perfetto or TensorBoard", "cosmetic")
    memory: bool = setting(
        False,
        "write what was allocated when in these steps: torch's snapshot where the device's allocator keeps one, "
        "else a time line as JSON",
        "cosmetic",
    )
    modules: int | None = setting(
        None,
        "step whose time is measured module by module; of the next one FLOPs and activations are counted; null: none",
        "cosmetic",
        "steps",
        ge=1,
    )
    ranks: list[int] = setting([0], "processes that are looked at", "cosmetic")
    folder: str | None = setting(None, "where files go; null: `profile` in the run's folder", "cosmetic")
    synchronise: bool = setting(
        False,
        "phases wait for the device at both ends and are printed: host and device are told apart, steps are slower",
        "performance",
    )

    @model_validator(mode="after")
    def _window(self) -> ProfileConfig:
        if self.stop is not None and self.start is None:
            raise ValueError("profile.stop is of use with profile.start alone: give that too")
        if self.start is not None and self.stop is not None and self.stop < self.start:
            raise ValueError(f"profile.stop {self.stop} comes before profile.start {self.start}: make it larger")
        if self.start is not None and not (self.trace or self.memory):
            raise ValueError("profile.start: neither trace nor memory is wanted: set profile.trace or profile.memory")
        if self.memory and self.start is None:
            raise ValueError("profile.memory is of use with profile.start alone: give that too")
        if not self.ranks or min(self.ranks) < 0 or len(set(self.ranks)) < len(self.ranks):
            raise ValueError("profile.ranks: a list of different processes, from 0 on")
        return self

    @property
    def window(self) -> range:
        """Steps that are traced."""
        return range(0) if self.start is None else range(self.start, (self.stop or self.start) + 1)
