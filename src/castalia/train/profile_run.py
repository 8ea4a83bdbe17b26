"""The section `profile` of a run at work: phases of every step, and traces, memory and modules of a few.

    before(step) ─> prepare (the step before the window) ─> start ─> steps ... ─> after(step): files, and a line each
                 └> the watch of modules: time of one step, counts of the next

Looking changes no result: nothing here writes to a tensor of the run. Files appear when they are whole, named after the
steps that they hold and the process: `steps-11-12-rank-0.pt.trace.json`, `steps-11-12-rank-0.memory.json` (or
`.pickle`), `modules-step-5-rank-0.json` and `.txt`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from castalia.config import Config
from castalia.config.files import write_text
from castalia.errors import UserError
from castalia.parallel.world import World, peak_memory
from castalia.train.profile_modules import ModuleWatch
from castalia.train.profile_record import Recorder
from castalia.train.profile_timers import Timers
from castalia.train.profile_tree import Part, Profile, lines, merged, state_of, tree

if TYPE_CHECKING:
    from castalia.train.run import Run


class Profiling:
    """What a run looks at. Use as a context manager: a window that a stop cuts short is written with what it has.

    Args:
        config: complete.
        world: this process; only those in profile.ranks write.
        folder: the run's.

    Raises:
        UserError: what is asked for cannot be seen in this run.
    """

    def __init__(self, config: Config, world: World, folder: Path) -> None:
        self._cfg, self._world = config.profile, world
        self._folder = Path(self._cfg.folder) if self._cfg.folder is not None else folder / "profile"
        self.timers = Timers(world.device, self._cfg.synchronise)
        self._looks = world.rank in self._cfg.ranks
        self._recorder: Recorder | None = None
        self._first: int | None = None
        self._last = 0
        self._asked = False
        self._watch: ModuleWatch | None = None
        self._timed: ModuleWatch | None = None
        self._began = self._seconds = 0.0
        steps = config.training.steps or 0
        self._window = range(self._cfg.window.start, min(self._cfg.window.stop, steps + 1))
        _check(config, world)

    def before(self, run: Run, step: int) -> None:
        """A step, counted from 1, is about to be made."""
        if not self._asked:
            self._asked = True
            for key, last in (("start", max(self._window, default=None)), ("modules", self._cfg.modules)):
                if last is not None and last < step:
                    run.console.say(f"profile.{key}: the run goes on from step {step - 1}, so step {last} is not seen")
        if not self._looks:
            return
        if self._recorder is None and (step in self._window or step + 1 in self._window):
            self._recorder = Recorder(self._world.device, self._cfg.trace, self._cfg.memory)
            self._recorder.prepare()
        if self._recorder is not None and step in self._window:
            if self._first is None:
                self._first = step
                self._recorder.start()
            self._recorder.step(step)
        if self._cfg.modules in (step, step - 1) and self._watch is None:
            clock = self.timers.clock if step == self._cfg.modules else None
            if clock is None and self._timed is None:  # the run was resumed between the two
                return
            self._began = time.perf_counter()
            self._watch = ModuleWatch(run.model, run.engine, clock)
            self._watch.__enter__()

    def after(self, run: Run, step: int) -> None:
        """The step is done; what is complete is written."""
        if self._watch is not None:
            self._end_watch(run)
        self._last = step
        if self._recorder is not None and step >= self._window[-1]:
            self._write(run)

    def _end_watch(self, run: Run) -> None:
        watch, self._watch = self._watch, None
        assert watch is not None, "asked for where there is one"
        watch.__exit__()
        if self._timed is None:
            self._timed, self._seconds = watch, time.perf_counter() - self._began
            return
        root = tree(run.model, self._timed, watch)
        self._timed = None
        found = self._profile(run, root)
        stem = self._folder / f"modules-step-{self._cfg.modules}-rank-{self._world.rank}"
        self._folder.mkdir(parents=True, exist_ok=True)
        write_text(f"{stem}.json", json.dumps(found.as_dict()) + "\n")
        text = lines(merged(root))
        write_text(f"{stem}.txt", "\n".join(text) + "\n")
        run.console.say(f"profile.modules: {stem}.json and .txt")
        for line in text:
            run.console.say(f"  {line}")

    def _profile(self, run: Run, root: Part) -> Profile:
        """What `castalia profile` would say of the step; its phases are in the run's record."""
        config, step = run.config, self._cfg.modules or 0
        spec, layout = run.loader.plan.at(step - 1), run.mesh.layout
        sequences = spec.num_samples // layout.data
        tokens = sequences * spec.seq_length // layout.context
        return Profile(
            config.name,
            str(self._world.device),
            config.training.precision,
            f"the tokens of step {step}" + (f" on rank {self._world.rank}" if self._world.size > 1 else ""),
            sequences // config.micro_batch_size,
            sequences,
            tokens,
            root,
            {},
            self._seconds,
            self._seconds,
            tokens * run.size.flops_per_token,
            state_of(run.size) if self._world.size == 1 else {},
            peak_memory(self._world.device),
        )

    def _write(self, run: Run | None) -> None:
        recorder, self._recorder = self._recorder, None
        assert recorder is not None, "asked for where there is one"
        stem = f"steps-{self._first}-{self._last}-rank-{self._world.rank}"
        trace = self._folder / f"{stem}.pt.trace.json" if self._cfg.trace else None
        memory = self._folder / f"{stem}.memory" if self._cfg.memory else None
        for path in recorder.finish(trace, memory):
            if run is not None:
                run.console.say(f"profile: {path}")

    def said(self, seconds: dict[str, float]) -> str | None:
        """A line about them, with profile.synchronise."""
        if not self._cfg.synchronise or not seconds:
            return None
        return "time (ms)  " + "  ".join(f"{name} {1e3 * value:.2f}" for name, value in seconds.items())

    def __enter__(self) -> Profiling:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._watch is not None:
            self._watch.__exit__()
        if self._recorder is not None and self._first is not None and self._last >= self._first:
            self._write(None)


def _check(config: Config, world: World) -> None:
    cfg, steps = config.profile, config.training.steps or 0
    if max(cfg.ranks) >= world.size and (cfg.start is not None or cfg.modules is not None):
        raise UserError(f"profile.ranks names process {max(cfg.ranks)}, and there are {world.size}: name lower ones")
    for key, step in (("start", cfg.start), ("modules", cfg.modules)):
        if step is not None and step > steps:
            raise UserError(f"profile.{key} {step} comes after the last step, {steps}: make it smaller")
    if cfg.modules is None:
        return
    if cfg.modules == steps:
        raise UserError(f"profile.modules {steps} is the last step, and it needs one after it: make it smaller")
    if config.performance.compile:
        raise UserError("profile.modules: compiled code has no modules to look at: set performance.compile=false")
    if config.parallel.pipeline > 1:
        raise UserError(
            "profile.modules: in a pipeline, passes of several micro-batches lie within each other, and modules cannot "
            "be told apart: use profile.start for a trace, or castalia profile for the whole model on one process"
        )
