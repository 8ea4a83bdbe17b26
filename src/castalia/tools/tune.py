"""`castalia tune`: a run and this machine -> the quickest of the ways to run it that were tried, with the evidence.

    the machine's description ─> plan: every layout that fits, for each number of processes ─> the most promising
        ─first look: each for a few steps─> the best, and compiled ─finals: in turns, beside the run as given─> YAML

What is tried differs in speed and rounding alone. All trials take one batch, the run's own or a part of it that fits
into the time: in a smaller batch the optimizer weighs more, for all of them. FOLDER/trials.jsonl holds what was
measured, so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from castalia.config import Config, load
from castalia.config.derive import derive
from castalia.config.files import write_text
from castalia.config.render import to_yaml
from castalia.errors import UserError
from castalia.tools.plan import tokenizer_vocabulary
from castalia.tools.plan_machine import Machine, read_machine
from castalia.tools.tune_trial import WARM_UP, Result, trial_config, try_out

COUNTED = 4
"""Steps of a trial whose time counts."""
FINALISTS, ROUNDS = 3, 3
GIVEN = "as given"


@dataclass
class Way:
    """One way to run.

    Attributes:
        processes: ranks on this machine.
        settings: values by key, beside the configuration's own.
        place: in the plan's ranking, from 1; None: the plan did not rank it.
        predicted: tokens per second by the plan.
        trials: measured so far.
    """

    processes: int
    settings: dict[str, Any]
    place: int | None = None
    predicted: float | None = None
    trials: list[Result] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What identifies it."""
        return json.dumps([self.processes, self.settings], sort_keys=True)

    @property
    def says(self) -> str:
        """For people."""
        words = [f"{key.split('.')[1]} {_word(value)}" for key, value in self.settings.items()]
        return f"{self.processes} process{'es' if self.processes > 1 else ''}, " + (", ".join(words) or GIVEN)

    @property
    def seconds(self) -> float:
        """The median step; infinite where every trial failed."""
        steps = [s for trial in self.trials if trial.failed is None for s in trial.steps]
        return statistics.median(steps) if steps else float("inf")


def tune(
    files: Sequence[str],
    overrides: Sequence[str],
    folder: Path,
    minutes: float,
    machine: str | None,
    candidates: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure the most promising ways to run a configuration here, and write the quickest.

    Args:
        folder: for the machine's description, the trials and `tuned.yml`; what it holds of them is used again.
        minutes: for the trials, those of earlier sittings not counted.
        machine: a shipped name or a file; None: this machine is measured.
        candidates: layouts to look at.
        say: told what happens, line by line.

    Returns:
        the evidence: `tuned`, `processes`, `speed_up` over the run as given, and a row for each way.

    Raises:
        UserError: nothing fits, nothing ran, or the folder belongs to another configuration.
    """
    config = load(files, overrides)
    complete, _ = derive(config, tokenizer_vocabulary(config))
    if complete.model.vocab_size is None:
        raise UserError("model.vocab_size is not set and there is no tokenizer to take it from: give model.vocab_size")
    folder.mkdir(parents=True, exist_ok=True)
    described = _machine(folder, machine, say)
    trials = _Journal(folder / "trials.jsonl", _mark(config, described))
    with tempfile.TemporaryDirectory(prefix="castalia-tune-") as place:
        data = None if _has_data(config) else _random_data(Path(place), complete, say)
        tuner = _Tuner(config, complete, described, trials, Path(place), data, time.monotonic() + 60 * minutes, say)
        return tuner.run(folder, minutes, candidates)


class _Tuner:
    """See tune."""

    def __init__(
        self,
        config: Config,
        complete: Config,
        machine: Machine,
        journal: _Journal,
        place: Path,
        data: Path | None,
        end: float,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._complete, self._machine = config, complete, machine
        self._journal, self._place, self._data, self._end, self._say = journal, place, data, end, say

    def run(self, folder: Path, minutes: float, candidates: int) -> dict[str, Any]:
        """The whole of it."""
        given = Way(self._usual, {})
        ways, self._batch = self._promising(given, minutes, candidates)
        tokens = self._batch * self._complete.data.seq_length
        whole = self._complete.training.batch_size
        if self._batch < whole:
            self._say(f"trials take {self._batch} of the batch's {whole} sequences, to fit into {minutes:g} minutes")
        for way in (given, *ways):
            self._trial(way, 0)
        best = sorted(ways, key=lambda way: way.seconds)[:FINALISTS]
        compiled = [self._compiled(way) for way in best[:1]]
        for way in (w for w in compiled if w is not None):
            self._trial(way, 0)
            ways.append(way)
        finalists = [way for way in sorted(ways, key=lambda way: way.seconds)[:FINALISTS] if way.trials]
        for turn in range(1, ROUNDS + 1):
            for way in (given, *finalists):
                if way.seconds < float("inf"):
                    self._trial(way, turn)
        ran = [way for way in (given, *ways) if way.seconds < float("inf")]
        if not ran:
            why = next((t.failed for way in (given, *ways) for t in way.trials if t.failed), "there was no time")
            raise UserError(f"no trial came to its end within {minutes:g} minutes: {why}; give more --minutes")
        quickest = min(ran, key=lambda way: way.seconds)
        path = folder / "tuned.yml"
        rows = [self._row(way, tokens) for way in sorted((given, *ways), key=lambda way: way.seconds)]
        answer = {
            "tuned": str(path),
            "processes": quickest.processes,
            "settings": quickest.settings,
            "plan_place": quickest.place,
            "speed_up": _speed_up(given, quickest),
            "batch": self._batch,
            "machine": self._machine.name,
            "ways": rows,
        }
        write_text(path, self._yaml(quickest, answer))
        return answer

    @property
    def _usual(self) -> int:
        """Processes that `castalia train` would start."""
        return 1 if self._machine.kind == "cpu" else self._machine.devices_per_node

    def _promising(self, given: Way, minutes: float, count: int) -> tuple[list[Way], int]:
        """The plan's best for each number of processes, and the batch that all trials take."""
        from castalia.tools.plan_search import Candidate, find_candidates

        devices = self._machine.devices_per_node
        worlds = [n for n in range(1, devices + 1) if devices % n == 0] if self._machine.kind == "cpu" else [devices]
        batch = self._complete.training.batch_size
        first = find_candidates(self._complete, self._machine, worlds[0])
        nearest = first.ranked[0] if first.ranked else first.closest
        if nearest is None:
            raise UserError(
                f"no layout of {worlds[0]} processes is legal: {next(iter(first.refused), 'none is known')}"
            )
        # Every way is looked at once, the best again in each round; a quarter of the time goes into starting them.
        steps = (WARM_UP + COUNTED) * (count + 2 + ROUNDS * (FINALISTS + 1))
        most = 0.75 * 60 * minutes / steps * nearest.time.tokens_per_second / self._complete.data.seq_length
        need = self._complete.micro_batch_size if self._config.training.micro_batch_size else 1
        sizes = [n for n in range(1, batch + 1) if batch % n == 0 and n % need == 0]
        batch = max([n for n in sizes if n <= most] or sizes[:1])
        changed = self._complete.training.model_copy(update={"batch_size": batch})
        smaller = self._complete.model_copy(update={"training": changed})
        ranked: list[tuple[int, Candidate]] = []
        for world in worlds:
            found = find_candidates(smaller, self._machine, world)
            # Where nobody shares the state, sharing it more finely is the same program.
            ranked += [(world, c) for c in found.ranked if c.settings["parallel.zero"] == c.layout.zero]
            if world == given.processes and found.as_given is not None:
                given.predicted = found.as_given.time.tokens_per_second
        if not ranked:
            raise UserError("no layout of this model fits into this machine's memory")
        ranked.sort(key=lambda pair: -pair[1].time.tokens_per_second)
        ways: list[Way] = []
        for place, (world, candidate) in enumerate(ranked, 1):
            way = Way(world, self._changes(candidate.settings, batch), place, candidate.time.tokens_per_second)
            if way.name == given.name:
                given.place = place
            elif len(ways) < count or world not in {known.processes for known in (given, *ways)}:
                ways.append(way)
        return ways, batch

    def _changes(self, settings: dict[str, Any], batch: int) -> dict[str, Any]:
        """Those settings that the configuration does not have already."""
        given = self._config.model_dump()
        given["training"]["micro_batch_size"] = given["training"]["micro_batch_size"] or batch
        changed = {}
        for key, value in settings.items():
            section, _, name = key.partition(".")
            if given[section][name] != value:
                changed[key] = value
        return changed

    def _compiled(self, way: Way) -> Way | None:
        """The same compiled, or not compiled, where that is legal."""
        from castalia.parallel.layout import check_layout, layout_of

        settings = way.settings | {"performance.compile": not self._config.performance.compile}
        if way.seconds == float("inf"):
            return None
        try:
            config = self._trial_config(Way(way.processes, settings), self._place)
            check_layout(derive(config)[0], layout_of(config.parallel, way.processes))
        except (UserError, ValueError):
            return None
        return Way(way.processes, settings, way.place, None)

    def _trial_config(self, way: Way, folder: Path) -> Config:
        return trial_config(self._config, self._batch, folder, self._data, way.settings)

    def _trial(self, way: Way, turn: int) -> None:
        """Measure once, unless that was done in an earlier sitting or there is no time."""
        known = self._journal.found(way.name, turn, self._batch)
        if known is None:
            left = self._end - time.monotonic()
            if left <= 0:
                return
            folder = Path(tempfile.mkdtemp(dir=self._place))
            known = try_out(self._trial_config(way, folder), way.processes, COUNTED, folder, left)
            shutil.rmtree(folder)
            if known.failed is None or self._end - time.monotonic() > 1:  # one that was cut off may be tried again
                self._journal.add(way.name, turn, self._batch, known)
        way.trials.append(known)
        rate = self._batch * self._complete.data.seq_length / way.seconds
        said = known.failed or f"{rate:,.0f} tokens/s, {known.memory / 2**20:,.0f} MiB"
        self._say(f"{'look' if turn == 0 else f'round {turn}'}: {way.says}: {said}")

    def _row(self, way: Way, tokens: int) -> dict[str, Any]:
        done = [trial for trial in way.trials if trial.failed is None]
        return {
            "processes": way.processes,
            "settings": way.settings,
            "says": way.says,
            "plan_place": way.place,
            "predicted_tokens_per_second": way.predicted,
            "tokens_per_second": tokens / way.seconds if done else None,
            "trials": len(done),
            "start_seconds": done[0].start if done else None,
            "peak_bytes": max((trial.memory for trial in done), default=None),
            "failed": next((trial.failed for trial in way.trials if trial.failed), None),
        }

    def _yaml(self, way: Way, answer: dict[str, Any]) -> str:
        """The configuration as it was said, with the settings of the quickest, and what was measured above it."""
        lines = [f"By `castalia tune`, for {self._machine.name}: castalia train THIS_FILE --procs {way.processes}", ""]
        values = self._config.model_dump()
        for key, value in way.settings.items():
            section, _, name = key.partition(".")
            values[section][name] = value
        lines += [*table(answer), "", f"with batches of {self._batch} sequences"]
        head = "".join(f"# {line}".rstrip() + "\n" for line in lines)
        return head + to_yaml(Config.model_validate(values), minimal=True)


class _Journal:
    """Trials, line by line, of one configuration on one machine."""

    def __init__(self, path: Path, mark: str) -> None:
        self._path = path
        self._known: dict[tuple[str, int, int], Result] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for number, line in enumerate(lines):
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the end of a sitting that was killed
                continue
            if number == 0 and entry != {"mark": mark}:
                raise UserError(
                    f"{path} holds trials of another configuration, machine or version of castalia: "
                    "give another --folder, or remove it"
                )
            if number:
                result = Result(**entry["result"] | {"steps": tuple(entry["result"]["steps"])})
                self._known[entry["way"], entry["turn"], entry["batch"]] = result
        if not lines:
            self._write({"mark": mark})

    def found(self, way: str, turn: int, batch: int) -> Result | None:
        """What was measured of a way in a round."""
        return self._known.get((way, turn, batch))

    def add(self, way: str, turn: int, batch: int, result: Result) -> None:
        """Note a trial."""
        self._write({"way": way, "turn": turn, "batch": batch, "result": asdict(result)})

    def _write(self, entry: dict[str, Any]) -> None:
        torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n") and self._path.stat().st_size
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


def table(answer: dict[str, Any]) -> list[str]:
    """The evidence for people: a line for each way, the quickest first."""
    lines = [f"{'tokens/s':>10} {'predicted':>10} {'plan':>5} {'MiB':>7} {'trials':>6}  way"]
    for row in answer["ways"]:
        cells = [
            f"{row['tokens_per_second']:,.0f}" if row["tokens_per_second"] else "failed" if row["failed"] else "-",
            f"{row['predicted_tokens_per_second']:,.0f}" if row["predicted_tokens_per_second"] else "-",
            str(row["plan_place"] or "-"),
            f"{row['peak_bytes'] / 2**20:,.0f}" if row["peak_bytes"] else "-",
            str(row["trials"]),
        ]
        why = f" ({row['failed']})" if row["failed"] and not row["trials"] else ""
        lines.append("{:>10} {:>10} {:>5} {:>7} {:>6}  ".format(*cells) + row["says"] + why)
    return lines


def _speed_up(given: Way, quickest: Way) -> dict[str, float] | None:
    """How many times the given speed: the median over the rounds that both were in, the least and the most."""
    pairs = [
        statistics.median(a.steps) / statistics.median(b.steps)
        for a, b in zip(given.trials, quickest.trials, strict=False)
        if a.failed is None and b.failed is None
    ]
    return {"median": statistics.median(pairs), "least": min(pairs), "most": max(pairs)} if pairs else None


def _machine(folder: Path, machine: str | None, say: Callable[[str], None]) -> Machine:
    if machine is not None:
        return read_machine(machine)
    path = folder / "machine.yml"
    if not path.exists():
        from castalia.tools.plan_run import measure_machine

        say("measuring this machine, about a minute")
        measure_machine(str(path))
    return read_machine(str(path))


def _mark(config: Config, machine: Machine) -> str:
    from castalia import __version__

    text = to_yaml(config.model_copy(update={"output": None, "name": "run"})) + machine.model_dump_json() + __version__
    return hashlib.sha256(text.encode()).hexdigest()


def _has_data(config: Config) -> bool:
    """Whether the run's own training data is here; that of a GPT-NeoX run is told by its files, too."""
    data = config.data
    prefixes = [data.path] if data.path else list(data.train_paths or [])
    return bool(prefixes) and all(Path(f"{prefix}.idx").exists() for prefix in prefixes)


def _random_data(place: Path, complete: Config, say: Callable[[str], None]) -> Path:
    """A token data set of random ids, for a configuration whose own is not here."""
    import numpy as np

    from castalia.data.store import StoreWriter

    say("the run's data is not here: trials take random ids, which cost as much")
    vocabulary = complete.model.vocab_size or 1
    random = np.random.default_rng(0)
    tokens = 64 * (complete.data.seq_length + 1)
    with StoreWriter(place / "ids", np.uint16 if vocabulary <= 1 << 16 else np.int32) as writer:
        while writer.num_tokens < tokens:
            writer.add_document(random.integers(0, vocabulary, 1000))
        writer.finish()
    return place / "ids"


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def say_to_stderr(text: str) -> None:
    """Progress, kept apart from the answer."""
    print(f"  {text}", file=sys.stderr, flush=True)
