"""What surrounds the training of a GPT-NeoX file -> where our run begins, saves, evaluates and logs.

load, save, finetune, iteration       start.*, output
checkpoint_scale, s3_path, ...        checkpoint.*
eval_interval, eval_iters             evaluation.*
use_wandb, tensorboard_dir, log_*     logging.*
profile, flops_profiler, ...          profile.*
launcher, hostfile, comment           launch.*
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from castalia.config.gptneox_given import Given, Rule

# Where a run begins.


def start_path(given: Given) -> str | None:
    """What a run begins from; `load` equal to `save` means its own folder, from which ours goes on by itself."""
    load = given["load"]
    if load is None:
        return None
    if load == given["save"] and not given["finetune"]:
        given.remark(
            "load: is the run's own folder, from which it goes on by itself; to begin from GPT-NeoX's checkpoints "
            "there, give start.path and another output"
        )
        return None
    return str(load)


def start_optimizer(given: Given) -> bool | None:
    """Whether the optimizer's state and the position come along."""
    if start_path(given) is None:
        return None
    if given["no_load_optim"]:
        given.remark(
            "no_load_optim: the weights alone are taken and the run begins at step 0; "
            "GPT-NeoX has no optimizer then, and cannot train"
        )
    return not (given["finetune"] or given["no_load_optim"])


def start_step(given: Given) -> int | None:
    """Which checkpoint of several."""
    if start_path(given) is not None or "iteration" not in given:
        step: int | None = given["iteration"]
        return step
    if given["load"] is not None:
        given.fail(
            "iteration",
            f"asks for step {given['iteration']} of the run's own folder, which goes on from its newest: leave it out "
            f"and go back once, with `castalia train --step {given['iteration']}`, or give another `save`",
        )
    given.remark("iteration: nothing is loaded, since 'load' names nothing")
    return None


def saving(given: Given) -> None:
    """GPT-NeoX wants to know when, where it is told to save."""
    if "save" in given and "checkpoint_factor" not in given and "extra_save_iters" not in given:
        given.fail("save", "needs checkpoint_factor or extra_save_iters: the steps at which to save")


def resuming(given: Given) -> None:
    """Two switches that exclude each other; neither matters otherwise."""
    if given.values.get("override_lr_scheduler") and given.values.get("use_checkpoint_lr_scheduler"):
        given.fail("override_lr_scheduler", "and 'use_checkpoint_lr_scheduler' are both true: keep one")


# Checkpoints.


def checkpoint_interval(given: Given) -> int | None:
    """Steps between checkpoints on the linear scale."""
    factor = given["checkpoint_factor"]
    if _log(given) or factor is None:
        return None
    if factor != int(factor) or factor < 1:
        given.fail("checkpoint_factor", f"must be a whole number from 1 on, got {factor}")
    return int(factor)


def log_factor(given: Given) -> float | None:
    """main's log scale, at the powers of the factor from 1 on; v2.0's is spelled out by `extra_steps`."""
    if not _log(given) or "checkpoint_factor" not in given:
        return None
    factor = given["checkpoint_factor"]
    if factor <= 1:
        given.fail("checkpoint_factor", f"is {factor}, but on the log scale it must be above 1")
    return float(factor) if given.compat == "main" else None


def extra_steps(given: Given) -> list[Any]:
    """Further steps, and those of v2.0's log scale, whose first power is the factor itself."""
    extra: list[Any] = list(given["extra_save_iters"] or [])
    if not all(isinstance(step, int) and not isinstance(step, bool) and step >= 0 for step in extra):
        given.fail("extra_save_iters", "must be a list of steps, whole numbers from 0 on")
    if not _log(given) or given.compat == "main" or "checkpoint_factor" not in given:
        return extra
    factor, steps = given["checkpoint_factor"], given.required("train_iters")
    if factor < 1.01:
        given.fail("checkpoint_factor", f"is {factor}, but on the log scale it must be above 1")
    power = float(factor)
    while power < steps:
        extra.append(int(power))
        power *= factor
    return sorted(set(extra))


def copies(given: Given) -> str | None:
    """Where the copies go: below the last part of `save`, as GPT-NeoX has it; an S3 path may lack the protocol."""
    if given["s3_path"] is None:
        return None
    path = str(given["s3_path"]).rstrip("/")
    save = str(given["save"] or "").rstrip("/").rsplit("/", 1)[-1]
    return ("" if "://" in path else "s3://") + path + (f"/{save}" if save else "")


def _log(given: Given) -> bool:
    return given.choose("checkpoint_scale", {"linear": "linear", "log": "log"}) == "log"


# Evaluation.


def evaluates(given: Given) -> bool:
    """Whether anything is evaluated; GPT-NeoX's eval_iters 0 means never."""
    return int(given["eval_iters"]) > 0


def evaluation_interval(given: Given) -> int | None:
    """Steps between validations."""
    if given.values.get("eval_interval", 0) is None:
        return None
    interval = given["eval_interval"]
    return interval if evaluates(given) and interval > 0 else None


# Logging.

_NORMS = {"log_grad_norm": "gradient", "log_param_norm": "parameter", "log_optimizer_states": "optimizer"}
_WANDB = {
    "wandb_project": "wandb_project",
    "wandb_group": "wandb_group",
    "wandb_team": "wandb_entity",
    "wandb_run_name": "wandb_name",
    "wandb_host": "wandb_host",
    "wandb_init_all_ranks": "wandb_all_ranks",
}
_PUBLIC_WANDB = "https://api.wandb.ai"
_COMET = {
    "comet_project": "comet_project",
    "comet_workspace": "comet_workspace",
    "comet_experiment_name": "comet_name",
    "comet_tags": "comet_tags",
}


def norms(given: Given) -> list[str] | None:
    """Which norms of each parameter are recorded."""
    return [ours for key, ours in _NORMS.items() if given[key]] or None


def _comet(key: str) -> Callable[[Given], Any]:
    """One of Comet's settings, where it is used at all; its own name for runs without a project is `general`."""

    def value(given: Given) -> Any:
        if not given["use_comet"]:
            return None
        return "general" if key == "comet_project" and given[key] is None else given[key]

    return value


def _wandb(key: str) -> Callable[[Given], Any]:
    """One of W&B's settings, where it is used at all; GPT-NeoX also uses it where it finds an API key."""

    def value(given: Given) -> Any:
        if not given["use_wandb"]:
            if key in given and "use_wandb" not in given:
                given.remark(
                    "use_wandb: not given, so W&B is off here; GPT-NeoX switches it on wherever it finds an API key"
                )
            return None
        return None if given[key] == _PUBLIC_WANDB else given[key]

    return value


def peak_flops(given: Given) -> float | None:
    """FLOP/s from their TFLOP/s."""
    peak = given["peak_theoretical_tflops"]
    return None if peak is None else peak * 1e12


# Profiling.


def _window(given: Given) -> range | None:
    """The steps that their profiler keeps, counted from 1: theirs count from 0, and the first one warms it up."""
    if not (given["profile"] or given["memory_profiling"]):
        return None
    first, last = given["profile_step_start"], given["profile_step_stop"]
    if first < 0 or last <= first:
        given.fail("profile_step_stop", f"({last}) must be above profile_step_start {first}, which is 0 or more")
    if first >= given.required("train_iters"):
        given.remark(f"profile_step_start: {first} is beyond train_iters, so nothing is profiled")
        return None
    return range(first + 1, last + 1)


def _profiles(value: Callable[[Given, range], Any]) -> Callable[[Given], Any]:
    """A setting that counts where something is profiled."""

    def of(given: Given) -> Any:
        window = _window(given)
        return None if window is None else value(given, window)

    return of


def profiled_modules(given: Given) -> int | None:
    """The step that DeepSpeed's profiler takes, which it counts from 0; our files hold all that its settings choose."""
    block = given["flops_profiler"] or {}
    if not block.get("enabled"):
        return None
    step = block.get("profile_step", 1)
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        given.fail("flops_profiler", f"needs a whole number from 0 on as profile_step, got {str(step)[:40]}")
    if step + 1 >= given.required("train_iters"):
        given.remark(f"flops_profiler: profile_step {step} leaves no step after it, so nothing is profiled")
        return None
    more = sorted(block.keys() - {"enabled", "profile_step"})
    if more:
        given.remark(f"flops_profiler: {', '.join(more)} left out: what is written has every module at every depth")
    return step + 1


_WINDOW = ("profile", "memory_profiling", "profile_step_start", "profile_step_stop")

# Launching.

_LAUNCHERS = {name: name for name in ("pdsh", "openmpi", "mpich", "mvapich", "impi", "slurm")}


def launcher(given: Given) -> str | None:
    """What starts the processes; deepspeed_slurm and deepspeed_mpi say how ranks are found, and so who starts them."""
    if "launcher" in given:
        return given.choose("launcher", _LAUNCHERS)
    if given["deepspeed_slurm"]:
        return "slurm"
    if given["deepspeed_mpi"]:
        return "openmpi"
    return "pdsh" if "hostfile" in given else None


def _positive(key: str) -> Callable[[Given], int | None]:
    """A count of which theirs says -1 or null for all."""
    return lambda given: given[key] if (given[key] or 0) > 0 else None


RUN_RULES: tuple[Rule, ...] = (
    Rule("start.path", ("load",), start_path),
    Rule("start.optimizer", ("finetune", "no_load_optim"), start_optimizer),
    Rule("start.step", ("iteration",), start_step),
    Rule("checkpoint.interval", ("checkpoint_factor", "checkpoint_scale"), checkpoint_interval),
    Rule("checkpoint.log_factor", ("checkpoint_factor",), log_factor),
    Rule("checkpoint.scale", ("checkpoint_scale",), lambda g: "linear" if log_factor(g) is None else "log"),
    Rule("checkpoint.extra_steps", ("extra_save_iters", "checkpoint_factor"), extra_steps),
    Rule("checkpoint.path", ("s3_path",), copies),
    Rule("checkpoint.chunk_size", ("s3_chunk_size",), lambda g: g["s3_chunk_size"] if g["s3_path"] else None),
    Rule("evaluation.interval", ("eval_interval", "eval_iters"), evaluation_interval),
    Rule("evaluation.batches", ("eval_iters",), lambda g: g["eval_iters"] if evaluates(g) else None),
    Rule("evaluation.at_end", ("eval_iters",), evaluates),
    Rule("evaluation.test_at_end", ("eval_iters",), evaluates),
    Rule("evaluation.continuing", (), lambda g: True),
    Rule("logging.norms", tuple(_NORMS), norms),
    *(Rule(f"logging.{ours}", (key, "use_wandb"), _wandb(key)) for key, ours in _WANDB.items()),
    *(Rule(f"logging.{ours}", (key, "use_comet"), _comet(key)) for key, ours in _COMET.items()),
    Rule("launch.launcher", ("launcher", "deepspeed_slurm", "deepspeed_mpi"), launcher),
    Rule("launch.hostfile", ("hostfile",), lambda g: g["hostfile"]),
    Rule("launch.include", ("include",), lambda g: g["include"]),
    Rule("launch.exclude", ("exclude",), lambda g: g["exclude"]),
    Rule("launch.nodes", ("num_nodes",), _positive("num_nodes")),
    Rule("launch.procs_per_node", ("num_gpus",), _positive("num_gpus")),
    Rule("launch.force_multi", ("force_multi",), lambda g: g["force_multi"] or None),
    Rule("launch.ssh_check", ("no_ssh_check",), lambda g: False if g["no_ssh_check"] else None),
    Rule("launch.master_addr", ("master_addr",), lambda g: g["master_addr"]),
    Rule("launch.master_port", ("master_port",), lambda g: g["master_port"]),
    Rule("launch.comment", ("comment",), lambda g: g["comment"]),
    Rule("launch.account", ("account",), lambda g: g["account"]),
    Rule("performance.peak_flops", ("peak_theoretical_tflops",), peak_flops),
    Rule("profile.start", _WINDOW, _profiles(lambda g, window: window[0])),
    Rule("profile.stop", _WINDOW, _profiles(lambda g, window: window[-1])),
    Rule("profile.trace", ("profile",), _profiles(lambda g, _: g["profile"])),
    Rule("profile.memory", ("memory_profiling",), _profiles(lambda g, _: g["memory_profiling"])),
    Rule("profile.folder", ("memory_profiling_path",), _profiles(lambda g, _: g["memory_profiling_path"])),
    Rule("profile.modules", ("flops_profiler",), profiled_modules),
    Rule(
        "profile.synchronise",
        ("wall_clock_breakdown", "profile_backward"),
        lambda g: True if g["wall_clock_breakdown"] or g["profile_backward"] else None,
    ),
)
