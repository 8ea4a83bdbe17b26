"""One way to run, for a few steps, in processes of its own -> seconds of each step, memory; or why it failed.

    tune.py ─> a supervising process ─> N ranks: Run of the trial's configuration ─> stops after so many steps
            <─ result.json of rank 0 <─

A process of its own gives its memory back, takes its threads and its compiled code with it, and may be killed when
it takes too long. What a step does is what `castalia train` does; nothing is evaluated, saved or sent to a service.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from castalia.config import CheckpointConfig, Config, EvaluationConfig, LoggingConfig, StartConfig
from castalia.config.files import write_text
from castalia.config.render import to_yaml
from castalia.config.schema_batch import BatchControllerConfig
from castalia.config.schema_guard import GuardConfig
from castalia.config.schema_profile import ProfileConfig
from castalia.config.schema_sampling import SamplingConfig

if TYPE_CHECKING:
    from castalia.train.run import Run

WARM_UP = 2
"""Steps before those that count: the first compiles, allocates and opens files."""


@dataclass(frozen=True)
class Result:
    """What a trial came to.

    Attributes:
        steps: seconds of each counted step.
        start: seconds from the start of the process to the end of the first step.
        memory: bytes of rank 0's peak.
        failed: why it came to nothing; None: it did not.
    """

    steps: tuple[float, ...] = ()
    start: float = 0.0
    memory: int = 0
    failed: str | None = None


def trial_config(config: Config, batch: int, folder: Path, data: Path | None, overrides: dict[str, Any]) -> Config:
    """The configuration of a trial: the run's own step, and nothing around it.

    Args:
        config: as loaded.
        batch: sequences of a step.
        folder: of the trial's files.
        data: token data set in place of the run's own; None: the run's own.
        overrides: settings by key.
    """
    plain = {"curriculum": "none", "curriculum_end": None, "curriculum_steps": None}
    plain |= {"curriculum_lengths": None, "curriculum_until": None}
    given = {
        name: value
        for name, value in config.data.model_dump().items()
        if name not in ("path", "train_paths", "valid_paths", "test_paths") or data is None
    }
    values = config.model_dump()
    values["data"] = given | plain | ({"path": str(data), "split": "1,0,0"} if data is not None else {})
    if data is not None:
        values["tokenizer"] = {}
    values["training"] |= {
        "batch_size": batch,
        "steps": 1000,
        "tokens": None,
        "exit_interval": None,
        "batch_ramp_start": None,
        "batch_ramp_increment": None,
        "batch_ramp_samples": None,
    }
    values["output"] = str(folder / "run")
    around = {
        "batch_controller": BatchControllerConfig(),
        "guard": GuardConfig(),
        "start": StartConfig(),
        "evaluation": EvaluationConfig(interval=None, at_end=False),
        "sampling": SamplingConfig(),
        "checkpoint": CheckpointConfig(interval=None),
        "logging": LoggingConfig(),
        "profile": ProfileConfig(),
    }
    values |= {name: section.model_dump() for name, section in around.items()}
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        values[section][name] = value
    return Config.model_validate(values)


def try_out(config: Config, processes: int, counted: int, folder: Path, seconds: float) -> Result:
    """Run a trial.

    Args:
        config: by `trial_config`.
        processes: ranks on this machine.
        counted: steps whose time counts.
        folder: empty, for its files.
        seconds: after which it is killed.
    """
    write_text(folder / "trial.yml", to_yaml(config))
    command = [sys.executable, "-m", __name__, str(folder), str(processes), str(counted)]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            _, said = process.communicate(timeout=max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends its ranks
            process.communicate()
            return Result(failed=f"took longer than the {seconds:.0f} s that were left for it")
        except BaseException:
            process.terminate()
            process.communicate()
            raise
    result = folder / "result.json"
    if process.returncode == 0 and result.exists():
        values = json.loads(result.read_text(encoding="utf-8"))
        return Result(**values | {"steps": tuple(values["steps"])})
    if process.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return Result(failed="was killed; perhaps the memory was not enough")
    words = [line for line in said.splitlines() if line.strip()] or ["ended without a word"]
    return Result(failed=words[-1].removeprefix("castalia: ").removeprefix("castalia.errors.UserError: "))


class _Enough(Exception):
    """The trial has seen the steps that it wanted."""


def _rank(folder: Path, counted: int) -> None:
    """One rank of a trial."""
    from castalia.config import load
    from castalia.train.run import train

    begun = time.perf_counter()
    ends: list[float] = []

    def after_step(run: Run) -> None:
        ends.append(time.perf_counter())
        if len(ends) == WARM_UP + counted:
            if run.first:
                write(run, [later - earlier for earlier, later in pairwise(ends)])
            raise _Enough

    def write(run: Run, steps: list[float]) -> None:
        from castalia.parallel.world import peak_memory

        found = Result(tuple(steps[WARM_UP - 1 :]), ends[0] - begun, peak_memory(run.world.device))
        write_text(folder / "result.json", json.dumps(asdict(found)))

    try:
        train(load([folder / "trial.yml"]), callbacks=[after_step], quiet=True)
    except _Enough:
        return
    raise AssertionError("a trial has a thousand steps, and stops before")


def main() -> None:
    """`python -m castalia.tools.tune_trial FOLDER PROCESSES STEPS`: be the supervisor, or one of its ranks."""
    from castalia.parallel.launch import noted_failure, supervise
    from castalia.parallel.world import launched

    folder, processes, counted = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    if processes > 1 and not launched():
        sys.exit(supervise([sys.executable, "-m", "castalia.tools.tune_trial", *sys.argv[1:]], processes, 120.0))
    with noted_failure():
        _rank(folder, counted)


if __name__ == "__main__":
    main()
