"""Configuration -> a run that can train: everything is assembled, and found again, here.

    YAML ─load─> Config ─derive─┬─> data sets ─> plan, loader
                                ├─> model ─> store ─> engine         ─> loop
                                └─> run folder: lock, config, metrics, checkpoints

A run that finds a whole checkpoint in its folder goes on from it (resume.py); else it begins
from the checkpoint that `start` names (start.py), or from initial weights.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from castalia.checkpoint import RunLock
from castalia.config import Config, load, notes, remarks
from castalia.config.curriculum import trained_tokens
from castalia.data.exclusions import Exclusions, with_exclusions
from castalia.data.loader import Loader, Shard
from castalia.data.plan import Amendment, Exclude, RunPlan
from castalia.data.sample import SampleSource
from castalia.errors import UserError
from castalia.model.kernels import choose_fp32_matmul, choose_matmul, flushes_denormals
from castalia.model.soft_prompt import prompt_from_tokens
from castalia.optim.loss_scale import LossScaler
from castalia.optim.offload import offload_text
from castalia.optim.weights import working_dtype
from castalia.parallel.heartbeat import heartbeat
from castalia.parallel.layout import layout_of
from castalia.parallel.mesh import Mesh, agree
from castalia.parallel.world import joined, peak_memory
from castalia.train.assemble import assemble
from castalia.train.console import Console, human
from castalia.train.data import check_samples, run_plan
from castalia.train.engine import StepStats
from castalia.train.environment import environment
from castalia.train.evaluation import evaluate
from castalia.train.folder import made_folder, write_files
from castalia.train.guard import Guard
from castalia.train.loop import Callback, Stopped, train_loop
from castalia.train.machine import measure_matmul_flops
from castalia.train.metrics import Metrics, MetricsFile, Record, Unwritten, throughput
from castalia.train.noise import NoiseMeter
from castalia.train.norms import Norms
from castalia.train.output import copied_output
from castalia.train.preflight import prepare_run
from castalia.train.profile_run import Profiling
from castalia.train.resume import resume
from castalia.train.samples import write_samples
from castalia.train.saving import Saving
from castalia.train.sinks import make_sinks
from castalia.train.start import Begun, begin


def train(
    config: Config | str | Path | Sequence[str | Path],
    *overrides: str,
    callbacks: Sequence[Callback] = (),
    accept: bool = False,
    quiet: bool = False,
    verbose: bool = False,
    sources: Sequence[str | Path] = (),
    step: int | None = None,
) -> Run:
    """Train a run to its end, going on from its newest whole checkpoint if it has one.

    Args:
        config: a checked configuration, or the YAML file or files to load.
        overrides: `key=value`, where files are given.
        callbacks: called with the run after every step.
        accept: go on although a numerics setting differs from the checkpoint's.
        quiet: no console lines.
        verbose: also say how each value that was left open follows from the others.
        sources: the files that a `Config` was loaded from, for the run's folder.
        step: go back to the checkpoint of this step; later ones are set aside. None: the newest.

    Returns:
        The finished run.

    Raises:
        UserError: bad settings or data.
        Stopped: a signal ended the run early; its state is saved.
    """
    files = [Path(source) for source in sources]
    if isinstance(config, Config):
        if overrides:
            raise UserError(f"'{overrides[0]}': overrides go with files; a Config is changed before it is handed over")
    else:
        files = [Path(config)] if isinstance(config, str | Path) else [Path(p) for p in config]
        config = load(files, overrides)
    with Run(config, sources=files, accept=accept, quiet=quiet, verbose=verbose, step=step) as run:
        run.train(callbacks)
    return run


class Run:
    """One training run, assembled. Use as a context manager: it holds the run folder's lock.

    Attributes:
        config: complete, nothing left to derive.
        step: optimizer steps done; `updates` of them changed the weights, the others were skipped.
        tokens: seen so far.
        steps: where the run ends.
        scaler: of the loss, in fp16; None: nothing is scaled.
        resumed: it goes on from a checkpoint in its own folder.
        imported: what else it once began from, if anything (`start`).
        last: the newest record of each kind.
    """

    def __init__(
        self,
        config: Config,
        *,
        sources: Sequence[Path] = (),
        accept: bool = False,
        quiet: bool = False,
        verbose: bool = False,
        step: int | None = None,
    ) -> None:
        self.accept, self.verbose, self._sources, self.chosen = accept, verbose, sources, step
        ready = prepare_run(config)
        self.config, self.derivation, self.warnings = ready.config, ready.derivation, ready.warnings
        self.tokenizer, self.data, self.world, self.size = ready.tokenizer, ready.data, ready.world, ready.size
        self.steps = self.config.training.steps or 0
        self.step_tokens = self.config.training.batch_size * self.config.data.seq_length
        self.directory = Path(self.config.run_dir)
        self.profiling = Profiling(self.config, self.world, self.directory)
        self.console = Console(self.steps, self.step_tokens, quiet=quiet or not self.first)
        self.step = self.updates = self.tokens = 0
        self.journal: tuple[Amendment, ...] = ()
        self.resumed = False
        self.imported: str | None = None
        self.accepted: str | None = None
        self.seconds_before, self._began = 0.0, time.monotonic()
        self._since: list[float] = []
        self._counted = 0
        self.last: dict[str, Record] = {}

    def __enter__(self) -> Run:
        with ExitStack() as opened:  # whatever goes wrong in here, the folder must not stay locked
            if self.first:
                opened.enter_context(made_folder(self.directory))
                opened.enter_context(RunLock(self.directory))
            timeout = self.config.performance.hang_timeout
            self.beat = opened.enter_context(heartbeat(self.world.rank, self.world.size, timeout))
            opened.enter_context(joined(self.world))
            self.beat("assembling the run")
            agree(self.world, self.config.parallel.model_dump_json())
            self.mesh = Mesh(layout_of(self.config.parallel, self.world.size), self.world)
            opened.callback(torch.set_num_threads, torch.get_num_threads())
            opened.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            opened.callback(torch.set_flush_denormal, flushes_denormals())
            if self.config.logging.log_dir is not None:
                opened.enter_context(copied_output(self.config.logging.log_dir, self.world.rank))
            self.saving = Saving(self)
            begun = self._assemble()
            opened.enter_context(self._open_metrics(begun))
            opened.enter_context(self.saving)
            opened.enter_context(self.profiling)
            self._opened = opened.pop_all()
        return self

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks for all."""
        return self.world.rank == 0

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def train(self, callbacks: Sequence[Callback] = ()) -> None:
        """Run the loop to its end."""
        self._announce()
        self._began, self._counted = time.monotonic(), self.tokens
        try:
            train_loop(self, callbacks)
        except BaseException as error:
            event = "signal" if isinstance(error, Stopped) else "end"
            self.metrics.write("event", self.step, event=event, text=f"{type(error).__name__}: {error}")
            raise
        advice = self.noise.advice(self.loader.plan.at(self.steps - 1).num_samples)
        if advice is not None:
            self.console.say(advice)
        self._record_timers(1)
        self.metrics.write("event", self.step, event="end", text=f"finished after {self.step} steps")

    # What the loop calls.

    def before_update(self) -> None:
        """Look at the gradients of the step that is being made, where a setting of `logging` asks for it."""
        self.noise.before_update(self.store)
        if self.norms.wanted and self._logs(self.step + 1):
            self.norms.before_update(self.store)

    def record_step(self, stats: StepStats, lr: float, grad_norm: float, seconds: float) -> None:
        """Note one step; write a record every logging.interval steps and at the end."""
        self.saving.poll()
        self._since.append(seconds)
        self.noise.add(stats, grad_norm, self.loader.plan.at(self.step - 1).num_samples)
        if not self._logs(self.step):
            return
        curriculum, plan, steps = self.config.data.curriculum, self.loader.plan, len(self._since)
        samples = sum(plan.at(step).num_samples for step in range(self.step - steps, self.step))
        tokens, seconds = self.tokens - self._counted, sum(self._since)
        peak, of = self.peak_flops, self.world.size
        rates = throughput(self.config, self.size, tokens, samples, steps, seconds, peak, of)
        self._counted = self.tokens
        self._since.clear()
        self.last["train"] = self.metrics.write(
            "train",
            self.step,
            tokens=self.tokens,
            loss=stats.loss,
            lr=lr,
            grad_norm=grad_norm,
            skipped=self.step - self.updates or None,
            loss_scale=None if self.scaler is None else self.scaler.scale,
            seq_length=None if curriculum == "none" else self.loader.plan.at(self.step - 1).seq_length,
            batch_size=None if not self.loader.plan.sizes[1:] else self.loader.plan.at(self.step - 1).num_samples,
            **rates,
            seconds=self.seconds(),
            peak_memory=peak_memory(self.world.device),
            **self.noise.record(),
            **stats.aux,
        )
        if stats.experts:
            self.metrics.write("experts", self.step, tokens={str(i): n for i, n in stats.experts.items()})
        if self.norms.wanted:
            self.metrics.write("norms", self.step, **self.norms.after_update(self.store))
        self._record_timers(steps)
        if groups := self.noise.by_group():
            self.metrics.write("noise", self.step, groups=groups)

    def evaluate(self, split: str) -> Record | None:
        """Evaluate on a split, write the record and return it; None if the split has no data."""
        with self.profiling.timers("validation" if split == "valid" else split):
            return evaluate(self, split)

    def sample(self) -> None:
        """Let the model write as `sampling` says."""
        self.last["samples"] = write_samples(self)

    @property
    def tested(self) -> bool:
        """Whether the test set was evaluated after the last step, in this sitting or an earlier one."""
        return self.last.get("test", {}).get("step") == self.steps

    @property
    def saved(self) -> str | None:
        """The newest checkpoint's name; None if there is none."""
        return max((path.name for path in self.checkpoints.glob("step-*")), default=None)

    def save(self, required: bool = True) -> None:
        """Write a checkpoint of this step.

        Raises:
            CheckpointNotSaved: it could not be written and `required`; else that is only said, and training goes on.
        """
        with self.profiling.timers("saving"):
            self.saving.save(required)

    def seconds(self) -> float:
        """Seconds of training, over all the sittings of this run."""
        return self.seconds_before + time.monotonic() - self._began

    def replan(self, journal: tuple[Amendment, ...]) -> None:
        """Take what the journal says for the steps from now on."""
        self.journal = journal
        self.loader = self.loader_of(self.data.datasets["train"], run_plan(self.config, self.steps, journal))

    def rewind(self) -> None:
        """Forget the records after `step`, to which the run has gone back."""
        self.metrics.rewind(self.step)
        self.last = {kind: record for kind, record in self.last.items() if record["step"] <= self.step}
        self._counted = self.tokens

    # Assembly.

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.directory / "checkpoints"

    def loader_of(self, dataset: SampleSource, plan: RunPlan) -> Loader:
        """This rank's loader over a data set."""
        cfg = self.config
        eod = self.tokenizer.eod if self.tokenizer else None
        shard = Shard(self.mesh.data_rank, self.mesh.layout.data)
        return Loader(
            dataset,
            plan,
            shard,
            cfg.micro_batch_size,
            cfg.performance.prefetch,
            eod,
            cfg.data.mask_loss_at_eod,
            vocab_size=cfg.model.vocab_size,
            document_mask=cfg.data.document_mask,
            exclusions=Exclusions(plan.journal, self.data.train_prefixes),
        )

    def _assemble(self) -> Begun | None:
        """Make everything and read the state to go on from; returns what `start` gave, if it was used."""
        cfg = self.config
        if cfg.performance.threads:
            torch.set_num_threads(cfg.performance.threads)
        working = working_dtype(cfg.training.precision)
        self.fp32_matmul = self.mesh.from_first(choose_fp32_matmul(self.world.device))
        torch.set_float32_matmul_precision(self.fp32_matmul)
        self.matmul = self.mesh.from_first(choose_matmul(self.world.device, working, cfg.performance.matmul))
        self.parts = assemble(cfg, self.mesh, self.matmul)
        self.model, self.store, self.engine = self.parts.model, self.parts.store, self.parts.engine
        self.engine.timers = self.profiling.timers
        self.scaler = LossScaler(cfg.training) if cfg.training.precision == "fp16" else None
        self.norms, self.noise = Norms(cfg.logging), NoiseMeter(cfg.logging)
        self.guard = Guard(cfg.guard)
        if self.noise.wanted:
            self.engine.measures_noise = True
            self.store.watch_first()
        self.resumed = resume(self)
        begun = None if self.resumed else begin(self)
        if cfg.model.soft_prompt_text is not None and not self.resumed and not (begun and begun.prompt):
            assert self.tokenizer is not None, "prepare_run has asked for one"
            prompt_from_tokens(self.model, self.tokenizer.encode(cfg.model.soft_prompt_text))
            self.store.refresh()
        self.journal = with_exclusions(self.journal, self.step, self.data.excluded)
        check_samples(run_plan(cfg, self.steps, self.journal), len(self.data.datasets["train"]))
        self.replan(self.journal)
        dtype = torch.float32 if working is None or self.matmul == "fp32" else working
        self.peak_flops = cfg.performance.peak_flops or measure_matmul_flops(dtype, 0.3, self.world.device)
        kernels = {"fp32_matmul": self.fp32_matmul, "matmul": self.matmul}
        self.facts = environment() | {"device": str(self.world.device), **kernels, "notes": notes(cfg)}
        return begun

    def _open_metrics(self, begun: Begun | None) -> Metrics:
        """Write the folder's files, open what takes records, and say how the run begins."""
        file: MetricsFile | Unwritten = Unwritten()
        if self.first:
            if not (self.resumed and self.step >= self.steps):  # a finished run keeps the settings it was made with
                write_files(self.directory, self.config, self._sources, self.facts, self.tokenizer)
            file = MetricsFile(self.directory / "metrics.jsonl", keep_through=self.step)
        kept = self.mesh.from_first(file.kept)
        if self.resumed:
            self.last = {r["kind"]: r for r in kept if r.get("kind") in ("train", "valid", "test", "samples")}
        sinks = [self.console, *make_sinks(self.config, self.directory, self.world, self.step)]
        self.metrics = Metrics(file, sinks, self.console.say)
        if begun is not None:
            self.imported = begun.text
            self.metrics.write("event", self.step, event="import", text=begun.text)
            for line in (f"beginning with {begun.text}", *begun.remarks):
                self.console.say(line)
        event = "resume" if self.resumed else "start"
        changed = f"; changed settings were accepted: {self.accepted}" if self.accepted else ""
        changed += "; 16-bit matrices are multiplied by fp32 products" if self.matmul == "fp32" else ""
        self.metrics.write("event", self.step, event=event, text=f"{self.steps} steps in {self.directory}{changed}")
        return self.metrics

    def _record_timers(self, steps: int) -> None:
        """Write where the time of so many steps went, phase by phase."""
        phases = self.profiling.timers.take(steps)
        if phases:
            self.metrics.write("timers", self.step, seconds=phases)
        if line := self.profiling.said(phases):
            self.console.say(line)

    def _logs(self, step: int) -> bool:
        """Whether this step is recorded."""
        return step % self.config.logging.interval == 0 or step == self.steps

    def _announce(self) -> None:
        say, size, cfg = self.console.say, self.size, self.config
        lines = [*notes(cfg), *self.derivation] if self.verbose else remarks(cfg)
        for line in lines:
            say(f"  {line}")
        unsaid = {"were translated": len(notes(cfg)) - len(lines), "follow from others": len(self.derivation)}
        if not self.verbose and any(unsaid.values()):
            said = " and ".join(f"{count} {what}" for what, count in unsaid.items() if count)
            say(f"  of the settings {said}: see --verbose, or `castalia config check`")
        tokens = trained_tokens(cfg, self.steps)
        unit = "measured" if cfg.performance.peak_flops is None else "given"
        say(
            f"{cfg.name}: {human(size.total_parameters)} parameters "
            f"({human(size.non_embedding_parameters)} without embeddings), "
            f"{'at most ' if cfg.batch_controller.start else ''}{human(tokens)} tokens in {self.steps} steps, "
            f"{cfg.training.precision} on {self.world.device}"
            + (f" of {self.world.size} processes: {self.mesh.layout}" if self.world.size > 1 else "")
        )
        say(f"MFU is the share of this machine's rate of matrix products, {human(self.peak_flops, ' ')}FLOP/s {unit}")
        if self.matmul == "fp32":
            chosen = "measured to be faster here" if cfg.performance.matmul == "auto" else "as performance.matmul says"
            say(f"16-bit matrices are multiplied by fp32 products, {chosen}: operands are rounded to 16 bits as ever")
        if text := offload_text(cfg, self.world.device):
            say(text)
        for entry in [e for e in self.journal if isinstance(e, Exclude)][-1:]:
            parts = sum(map(len, entry.documents))
            say(f"from step {entry.from_step} on the documents that data.exclude names in {parts} lines are not learnt")
        for sentence in self.warnings:
            say(f"WARNING: {sentence}")
        if self.step >= self.steps:
            say(
                f"finished already, at step {self.step} of {self.steps}: to go on, raise training.steps with "
                f"schedule.decay_steps={cfg.schedule.decay_steps} (the learning rate as it was), or take another name"
            )
        elif self.step:
            say(f"going on from step {self.step}")
