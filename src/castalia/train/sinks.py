"""Records -> TensorBoard and Weights & Biases, under GPT-NeoX's names where it has them.

Both packages are optional and imported only when the configuration asks for them. A resumed
run continues its curves: TensorBoard hides what a killed sitting wrote beyond the checkpoint,
and W&B is given the same run id, and drops what is logged again, which is the same numbers.
(Names: GPT-NeoX's logging; docs/training.md lists them.)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from castalia.config import Config, LoggingConfig
from castalia.config.render import to_yaml
from castalia.errors import UserError
from castalia.parallel.world import World
from castalia.train.metrics import MetricsSink, Record
from castalia.train.trackers import kept_id, make_trackers

# Key of a record -> name there and factor. A further key `x` of a training record becomes `train/x`.
TRAIN_NAMES: dict[str, tuple[str, float]] = {
    "loss": ("train/lm_loss", 1.0),
    "lr": ("train/learning_rate", 1.0),
    "tokens_per_second": ("runtime/tokens_per_sec", 1.0),
    "samples_per_second": ("runtime/samples_per_sec", 1.0),
    "step_seconds": ("runtime/iteration_time", 1.0),
    "flops_per_second": ("runtime/flops_per_sec_per_gpu", 1.0),
    "mfu": ("runtime/model_flops_utilization", 100.0),  # per cent, as GPT-NeoX has it
    "hfu": ("runtime/hardware_flops_utilization", 100.0),
    "seconds": ("runtime/seconds", 1.0),
    "seq_length": ("curriculum_seqlen", 1.0),
    "peak_memory": ("runtime/peak_memory", 1.0),
}
EVALUATION_NAMES = {"loss": "lm_loss", "perplexity": "lm_loss_ppl", "char_perplexity": "lm_loss_char_lvl_ppl"}
NORM_NAMES: dict[str, tuple[str, float]] = {
    "gradient": ("gradient_norms", 1.0),
    "parameter": ("parameter_norms", 1.0),
    "optimizer": ("optimizer_state_norms", 1.0),
    "zero_gradients": ("pct_grad_zeros", 100.0),
}
PHASE_NAMES = {
    "data": "batch generator",
    "reduce": "backward-allreduce",
    "clip": "backward-clip-grad",
    "saving": "save checkpoint",
}
_ID_FILE = "wandb_id.txt"


def scalars(record: Record) -> dict[str, float]:
    """The numbers of a record by GPT-NeoX's names; empty for an event."""
    kind, values = record["kind"], {k: v for k, v in record.items() if k not in ("v", "kind", "step")}
    if kind == "train":
        named = {k: TRAIN_NAMES.get(k, (f"train/{k}", 1.0)) for k in values}
        numbers = {name: factor * values[k] for k, (name, factor) in named.items()}
        if "step_seconds" in values:
            numbers["runtime/steps_per_sec"] = 1 / values["step_seconds"]
        return numbers
    if kind in ("valid", "test"):
        chart = {"valid": "validation", "test": "test"}[kind]
        return {f"{chart}/{EVALUATION_NAMES.get(k, k)}": v for k, v in values.items()}
    if kind == "tasks":
        return values
    if kind == "norms":
        chosen = {k: NORM_NAMES[k] for k in values}
        return {f"{group}/{n}": factor * v for k, (group, factor) in chosen.items() for n, v in values[k].items()}
    if kind == "timers":
        return {f"timers/{PHASE_NAMES.get(phase, phase)}": v for phase, v in values["seconds"].items()}
    if kind == "noise":
        ends = {"value": "", "low": "_low", "high": "_high"}
        return {f"noise_scale/{g}{ends[k]}": v for g, found in values["groups"].items() for k, v in found.items()}
    return {}


def make_sinks(config: Config, directory: Path, world: World, step: int) -> list[MetricsSink]:
    """The sinks that the configuration asks for.

    Args:
        directory: the run's.
        world: only its first process logs, unless logging.wandb_all_ranks.
        step: that the run goes on from.

    Raises:
        UserError: a package is missing, or the service refuses.
    """
    cfg = config.logging
    sinks: list[MetricsSink] = []
    if cfg.tensorboard is not None and world.rank == 0:
        sinks.append(TensorBoard(cfg.tensorboard, config, step))
    if cfg.wandb_project is not None and (world.rank == 0 or cfg.wandb_all_ranks):
        sinks.append(WeightsAndBiases(config, directory, world))
    if world.rank == 0:
        sinks += make_trackers(config, directory, scalars)
    return sinks


class TensorBoard:
    """Event files in a folder, for `tensorboard --logdir FOLDER`."""

    def __init__(self, folder: str, config: Config, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "logging.tensorboard: the package tensorboard is not installed: pip install 'castalia[tensorboard]'"
            ) from None
        try:
            # Of what earlier sittings wrote, TensorBoard hides the steps from purge_step on.
            self._writer: Any = SummaryWriter(folder, purge_step=step + 1 if step else None)
        except OSError as error:
            raise UserError(f"logging.tensorboard: {folder} cannot be written to ({error.strerror})") from None
        self._text("configuration", to_yaml(config), step)

    def write(self, record: Record) -> None:
        """See MetricsSink; what is written is on disk when an evaluation or an event comes."""
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])
        if record["kind"] == "event":
            self._text(f"event/{record['event'].replace(' ', '_')}", record["text"], record["step"])
        if record["kind"] == "samples":
            for number, sample in enumerate(record["samples"]):
                self._text(f"samples/{number}", sample["prompt"] + sample["text"], record["step"])
        if record["kind"] != "train":
            self._writer.flush()

    def close(self, failed: bool = False) -> None:
        """See MetricsSink."""
        self._writer.close()

    def _text(self, name: str, text: str, step: int) -> None:
        """TensorBoard reads Markdown, where four spaces make a block of code."""
        self._writer.add_text(name, "\n".join("    " + line for line in text.splitlines()), step)


class WeightsAndBiases:
    """One W&B run for one run of ours, over all its sittings."""

    def __init__(self, config: Config, directory: Path, world: World) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                "logging.wandb_project: the package wandb is not installed: pip install 'castalia[wandb]'"
            ) from None
        cfg, self._table = config.logging, wandb.Table
        mode: Any = cfg.wandb_mode or os.environ.get("WANDB_MODE")
        name = cfg.wandb_name or config.name
        try:
            self._run: Any = wandb.init(
                project=cfg.wandb_project,
                group=cfg.wandb_group,
                entity=cfg.wandb_entity,
                name=name if world.rank == 0 else f"{name}-rank{world.rank}",
                mode=mode,
                dir=str(directory),
                config=config.model_dump(),
                id=_run_id(directory, world.rank),
                resume=None if mode == "offline" else "allow",
                settings=_settings(wandb, cfg),
            )
        except (wandb.Error, OSError, ValueError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise UserError(
                f"logging.wandb_project: W&B refuses ({first}): run `wandb login`, or set logging.wandb_mode=offline"
            ) from error

    def write(self, record: Record) -> None:
        """See MetricsSink."""
        values: dict[str, Any] = dict(scalars(record))
        if record["kind"] == "samples":
            rows = [[record["step"], sample["prompt"], sample["text"]] for sample in record["samples"]]
            values["samples"] = self._table(columns=["step", "prompt", "text"], data=rows)
        if values:
            self._run.log(values, step=record["step"])

    def close(self, failed: bool = False) -> None:
        """See MetricsSink."""
        self._run.finish(exit_code=int(failed))


def _settings(wandb: Any, cfg: LoggingConfig) -> Any:
    return wandb.Settings(base_url=cfg.wandb_host) if cfg.wandb_host else wandb.Settings()


def _run_id(directory: Path, rank: int) -> str:
    """The id that W&B knows this run by, made up once and kept in the run's folder."""
    kept = kept_id(directory / _ID_FILE, 6)
    return kept if rank == 0 else f"{kept}-{rank}"
