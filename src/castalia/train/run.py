"""Configuration -> a run that can train: everything is assembled, and found again, here.

    YAML ─load─> Config ─derive─┬─> data sets ─> plan, loader
                                ├─> model ─> store ─> engine         ─> loop
                                └─> run folder: lock, config, metrics, checkpoints

A run that finds a whole checkpoint in its folder goes on from it, provided that nothing
which changes the function computed (a numerics setting, the data, the tokenizer) differs.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import castalia
from castalia.checkpoint import CheckpointNotSaved, RunLock, find_checkpoint, load_checkpoint, save_checkpoint
from castalia.config import Config, load, notes
from castalia.config.compare import differences
from castalia.config.derive import derive
from castalia.config.load import check_values
from castalia.config.render import to_yaml
from castalia.data.loader import Batch, Loader, Shard
from castalia.data.plan import RunPlan, evaluation_spec
from castalia.data.sample import SampleSource
from castalia.errors import UserError
from castalia.model.kernels import choose_fp32_matmul
from castalia.model.size import ModelSize, model_size
from castalia.model.transformer import build_model
from castalia.optim import make_store
from castalia.parallel.world import World, enter_world, peak_memory
from castalia.train.data import open_data, open_tokenizer
from castalia.train.engine import LocalEngine, StepStats
from castalia.train.loop import Callback, Stopped, train_loop
from castalia.train.machine import measure_matmul_flops
from castalia.train.metrics import Console, MetricsFile, human

STATE_VERSION = 1


def train(
    config: Config | str | Path | Sequence[str | Path],
    *overrides: str,
    callbacks: Sequence[Callback] = (),
    accept: bool = False,
    quiet: bool = False,
) -> Run:
    """Train a run to its end, going on from its newest whole checkpoint if it has one.

    Args:
        config: a checked configuration, or the YAML file or files to load.
        overrides: `key=value`, where files are given.
        callbacks: called with the run after every step.
        accept: go on although a numerics setting differs from the checkpoint's.
        quiet: no console lines.

    Returns:
        The finished run.

    Raises:
        UserError: bad settings or data.
        Stopped: a signal ended the run early; its state is saved.
    """
    sources: list[Path] = []
    if not isinstance(config, Config):
        sources = [Path(config)] if isinstance(config, str | Path) else [Path(p) for p in config]
        config = load(sources, overrides)
    with Run(config, sources=sources, accept=accept, quiet=quiet) as run:
        run.train(callbacks)
    return run


class Run:
    """One training run, assembled. Use as a context manager: it holds the run folder's lock.

    Attributes:
        config: complete, nothing left to derive.
        step: optimizer steps done; `updates` of them changed the weights.
        tokens: seen so far.
        steps: where the run ends.
    """

    def __init__(
        self, config: Config, *, sources: Sequence[Path] = (), accept: bool = False, quiet: bool = False
    ) -> None:
        self._sources, self._accept = sources, accept
        self.tokenizer = open_tokenizer(config)
        self.config, self.derivation = derive(config, self.tokenizer.vocab_size if self.tokenizer else None)
        self.steps = self.config.training.steps or 0
        self.size: ModelSize = model_size(self.config)
        self.directory = Path(self.config.run_dir)
        self.console = Console(self.steps, quiet=quiet)
        self.step = self.updates = self.tokens = 0
        self.journal: list[Any] = []
        self._seconds, self._began = 0.0, time.monotonic()
        self._since: list[tuple[int, float]] = []
        self.last: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Run:
        self._make_directory()
        self._lock = RunLock(self.directory)
        self._lock.__enter__()
        try:
            self._assemble()
        except BaseException:  # whatever it was, the folder must not stay locked
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self.metrics.close()
        self._lock.__exit__(*error)

    def train(self, callbacks: Sequence[Callback] = ()) -> None:
        """Run the loop to its end."""
        self._announce()
        self._began = time.monotonic()
        try:
            train_loop(self, callbacks)
        except BaseException as error:
            event = "signal" if isinstance(error, Stopped) else "end"
            self.metrics.write("event", self.step, event=event, text=f"{type(error).__name__}: {error}")
            raise
        self.metrics.write("event", self.step, event="end", text=f"finished after {self.step} steps")

    # What the loop calls.

    def record_step(self, stats: StepStats, lr: float, grad_norm: float, seconds: float) -> None:
        """Note one step; write a record every logging.interval steps and at the end."""
        spec_tokens = self.config.training.batch_size * self.config.data.seq_length
        self._since.append((spec_tokens, seconds))
        if self.step % self.config.logging.interval and self.step != self.steps:
            return
        tokens, spent = (sum(column) for column in zip(*self._since, strict=True))
        self._since.clear()
        rate = tokens / spent
        record = self.metrics.write(
            "train",
            self.step,
            tokens=self.tokens,
            loss=stats.loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens_per_second=rate,
            mfu=rate * self.size.flops_per_token / self.peak_flops,
            seconds=self.seconds(),
            peak_memory=peak_memory(self.world.device),
            **stats.aux,
        )
        self.last["train"] = record
        self.console.train(record, (self.steps - self.step) * spec_tokens / rate)

    def evaluate(self, split: str) -> dict[str, Any] | None:
        """Evaluate on a split, write the record and return it; None if the split has no data."""
        dataset = self.data.datasets.get(split)
        if dataset is None:
            return None
        cfg = self.config
        # Which validation this is; the test set is read from its start whenever it is read.
        index = self.step // cfg.evaluation.interval - 1 if cfg.evaluation.interval and split == "valid" else 0
        spec = evaluation_spec(
            max(index, 0),
            cfg.evaluation.batches,
            cfg.training.batch_size,
            cfg.data.seq_length,
            cfg.evaluation.continuing,
        )
        loader = self._loader(
            dataset, RunPlan(cfg.training.batch_size, cfg.data.seq_length, 0), cfg.performance.prefetch
        )
        table, size = self.data.token_bytes, 0
        counts = None if table is None else torch.from_numpy(table)

        def batches() -> Iterator[Batch]:
            nonlocal size
            for micro_batches in loader.stream_specs(spec.parts(cfg.training.batch_size)):
                for batch in micro_batches:
                    if counts is not None:
                        size += int(counts[batch.labels[batch.labels >= 0]].sum())
                    yield batch

        stats = self.engine.evaluate(batches())
        bits = stats.nll_sum / math.log(2) / size if size else None
        perplexity = math.exp(min(stats.loss, 700.0))  # beyond that a double overflows
        record = self.metrics.write(
            split, self.step, loss=stats.loss, bits_per_byte=bits, perplexity=perplexity, tokens=stats.tokens
        )
        self.last[split] = record
        self.console.evaluation(record)
        return record

    def save(self, required: bool = True) -> None:
        """Write a checkpoint of this step.

        Raises:
            CheckpointNotSaved: it could not be written and `required`; else that is only said, and training goes on.
        """
        try:
            path = save_checkpoint(
                self.checkpoints,
                self.step,
                self.store.tensors(),
                self.state(),
                keep_last=self.config.checkpoint.keep_last,
            )
        except CheckpointNotSaved as error:
            self.metrics.write("event", self.step, event="checkpoint failed", text=str(error))
            if required:
                raise
            self.console.say(f"WARNING: {error}; training goes on")
            return
        self.metrics.write("event", self.step, event="checkpoint", text=path.name)

    def seconds(self) -> float:
        """Seconds of training, over all the sittings of this run."""
        return self._seconds + time.monotonic() - self._began

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides tensors (docs/contracts.md, section 4)."""
        return {
            "version": STATE_VERSION,
            "step": self.step,
            "updates": self.updates,
            "tokens": self.tokens,
            "seconds": self.seconds(),
            "config": self.config.model_dump(),
            "journal": self.journal,
            "data": self.data.fingerprints,
            "epochs": self.data.epochs,
            "tokenizer": self.tokenizer.identity() if self.tokenizer else None,
            "versions": {
                "castalia": castalia.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }

    # Assembly.

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.directory / "checkpoints"

    @property
    def eod(self) -> int | None:
        """The end-of-document id."""
        return self.tokenizer.eod if self.tokenizer else None

    def _assemble(self) -> None:
        cfg = self.config
        self.world: World = enter_world(cfg.performance.device)
        if cfg.performance.threads:
            torch.set_num_threads(cfg.performance.threads)
        self.matmul = choose_fp32_matmul(self.world.device)
        self.data = open_data(cfg, self.steps, self.tokenizer)
        self.model = build_model(cfg.model, cfg.training.seed, self.world.device)
        self.store = make_store(self.model, cfg.optimizer, cfg.training.precision, cfg.performance.arena)
        self.engine = LocalEngine(self.model, self.store, cfg.loss, cfg.performance.compile, cfg.training.seed)
        resumed = self._resume()
        plan = RunPlan(cfg.training.batch_size, cfg.data.seq_length, self.steps, tuple(self.journal))
        self.loader = self._loader(self.data.datasets["train"], plan, cfg.performance.prefetch)
        dtype = torch.bfloat16 if cfg.training.precision == "bf16" else torch.float32
        self.peak_flops = cfg.performance.peak_flops or measure_matmul_flops(dtype, 0.3, self.world.device)
        self._write_files()
        self.metrics = MetricsFile(self.directory / "metrics.jsonl", keep_through=self.step)
        self.metrics.write(
            "event", self.step, event="resume" if resumed else "start", text=f"{self.steps} steps in {self.directory}"
        )

    def _loader(self, dataset: SampleSource, plan: RunPlan, prefetch: int) -> Loader:
        """This rank's loader over a data set."""
        shard = Shard(self.world.rank, self.world.size)
        mask = self.config.data.mask_loss_at_eod
        return Loader(dataset, plan, shard, self.config.micro_batch_size, prefetch, self.eod, mask)

    def _make_directory(self) -> None:
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.directory}: the run's folder cannot be made: {error.strerror}") from None

    def _resume(self) -> bool:
        """Load the newest whole checkpoint, if there is one that may be gone on from."""
        found = find_checkpoint(self.checkpoints)
        if found is None:
            return False
        for problem in found.skipped:
            self.console.say(f"WARNING: passed over {problem}")
        state = found.state
        if state["version"] != STATE_VERSION:
            raise UserError(
                f"{found.path}: written in state version {state['version']}; this release reads {STATE_VERSION}"
            )
        self._compare(state, found.path)
        if state["step"] > self.steps:
            raise UserError(
                f"{found.path}: is at step {state['step']}, beyond training.steps {self.steps}: "
                "raise training.steps, or give another name or output"
            )
        load_checkpoint(found.path, self.store.tensors())
        self.store.refresh()
        self.step, self.updates, self.tokens = state["step"], state["updates"], state["tokens"]
        self.store.set_updates(self.updates)
        self.journal, self._seconds = state["journal"], state["seconds"]
        return True

    def _compare(self, state: dict[str, Any], path: Path) -> None:
        """Refuse to go on where that would make the curve jump."""
        changed = [
            d for d in differences(check_values(state["config"], str(path)), self.config) if d.kind == "numerics"
        ]
        lines = [f"{d.key}: {d.old} -> {d.new}" for d in changed]
        if list(state["data"].values()) != list(self.data.fingerprints.values()):
            lines.append("the data: its fingerprints differ")
        elif state["epochs"] != self.data.epochs:
            lines.append(
                f"the data order: laid out for {state['epochs']} epochs, now for {self.data.epochs}, "
                "which shuffles it anew"
            )
        identity = self.tokenizer.identity() if self.tokenizer else None
        if state["tokenizer"] != identity:
            lines.append("the tokenizer")
        if not lines:
            return
        text = "; ".join(lines)
        if not self._accept:
            raise UserError(
                f"{path}: this run was started with other settings that change what is computed ({text}): "
                "restore them, give another name, or go on knowingly with --accept"
            )
        self.console.say(f"going on with changed settings, as accepted: {text}")

    def _write_files(self) -> None:
        """config.yaml, sources/, environment.json and the tokenizer, each replaced atomically."""
        from castalia.train.environment import environment

        sources = self.directory / "sources"
        sources.mkdir(exist_ok=True)
        for source in self._sources:
            if source.resolve() != (self.directory / "config.yaml").resolve():
                shutil.copyfile(source, sources / source.name)
        _replace(self.directory / "config.yaml", to_yaml(self.config))
        facts = environment() | {
            "device": str(self.world.device),
            "fp32_matmul": self.matmul,
            "notes": notes(self.config),
        }
        _replace(self.directory / "environment.json", json.dumps(facts, indent=2) + "\n")
        if self.tokenizer is not None:
            content = self.tokenizer.file_bytes()
            if content is not None:
                _replace(self.directory / "tokenizer.json", content)

    def _announce(self) -> None:
        say, size = self.console.say, self.size
        for line in [*notes(self.config), *self.derivation]:
            say(f"  {line}")
        say(
            f"{self.config.name}: {human(size.total_parameters)} parameters "
            f"({human(size.non_embedding_parameters)} without embeddings), "
            f"{human(self.steps * self.config.training.batch_size * self.config.data.seq_length)} tokens "
            f"in {self.steps} steps, "
            f"{self.config.training.precision} on {self.world.device}, {human(self.peak_flops)}FLOP/s measured"
        )
        if self.step:
            say(f"going on from step {self.step}")


def _replace(path: Path, content: str | bytes) -> None:
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(fresh, path)
