"""`castalia deepy SCRIPT CONF ...`: the command line of GPT-NeoX's launcher, for what used to be typed.

    deepy.py train.py -d configs 125M local_setup   ->  castalia train configs/125M.yml configs/local_setup.yml
    deepy.py generate.py 125M -i prompts.txt        ->  prompts continued, a JSON line each
    deepy.py eval.py 125M --eval_tasks piqa         ->  castalia evaluate RUN --tasks piqa, results in its file

Options become overrides of the same keys, in front of everything that a file says. Where a
hostfile or a launcher asks for other machines, `castalia launch` starts the run there; what the
environment asks for is honoured or reported.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from castalia.errors import UserError

# Options of deepy.py -> the keys that they override.
_OPTIONS = {
    "wandb_group": "wandb_group",
    "wandb_team": "wandb_team",
    "wandb_run_name": "wandb_run_name",
    "eval_tasks": "eval_tasks",
    "iteration": "iteration",
    "eval_results_prefix": "eval_results_prefix",
    "hostfile": "hostfile",
    "sample_input_file": "sample_input_file",
    "sample_output_file": "sample_output_file",
    "autotuning": "autotuning_run",
}
# Variables that GPT-NeoX or its launcher reads -> what happens to them here.
ENVIRONMENT = {
    "DLTS_HOSTFILE": "taken as the hostfile, unless --hostfile names one",
    "LOGLEVEL": "WARNING and above silence the progress lines",
    "WANDB_API_KEY": "read by W&B itself, where use_wandb is true",
    "WANDB_LOCAL": "not read: wandb_host names a server of one's own",
    "COMET_API_KEY": "not read: Comet is not supported",
    "MASTER_ADDR": "taken as master_addr where the run is started on several hosts",
    "MASTER_PORT": "taken as the port where several processes meet",
    "SLURM_NTASKS": "the number of processes, where srun has started them",
    "OMPI_COMM_WORLD_SIZE": "the number of processes, where mpirun has started them",
    "DATA_DIR": "not read: data_path and its like name the data",
    "NEOX_DATA_PATH": "not read: data_path and its like name the data",
    "NEOX_CHECKPOINT_PATH": "not read: `save` names the run's folder",
    "DS_ENV_FILE": "not read: launch.env_file names the file of variables for other hosts",
    "PDSH_SSH_ARGS_APPEND": "read by pdsh itself; for ssh, launch.ssh_args",
    "SUBMIT_SCRIPTS": "not read: runs resume by themselves, from the same command",
    "TORCH_CUDA_ARCH_LIST": "not read: nothing is compiled at the start",
    "NVTE_TORCH_COMPILE": "not read: TransformerEngine is not used",
}
_QUIET = ("WARNING", "ERROR", "CRITICAL")


def arguments(parser: argparse.ArgumentParser) -> None:
    """deepy.py's own arguments."""
    parser.allow_abbrev = False
    parser.add_argument("user_script", metavar="SCRIPT", help="train.py, generate.py or eval.py")
    parser.add_argument("conf_file", nargs="+", metavar="CONF", help="configuration files; .yml may be left out")
    parser.add_argument("-d", "--conf_dir", metavar="FOLDER", help="where the files are")
    parser.add_argument("-H", "--hostfile", metavar="FILE", help="hosts and slots")
    parser.add_argument("-i", "--sample_input_file", metavar="FILE", help="prompts for generate.py")
    parser.add_argument("-o", "--sample_output_file", metavar="FILE", help="where generate.py writes")
    parser.add_argument("--iteration", type=int, metavar="N", help="checkpoint to load")
    parser.add_argument("--eval_tasks", nargs="+", metavar="TASK", help="tasks for eval.py")
    parser.add_argument("--eval_results_prefix", metavar="NAME")
    parser.add_argument("--wandb_group", metavar="NAME")
    parser.add_argument("--wandb_team", metavar="NAME")
    parser.add_argument("--wandb_run_name", metavar="NAME")
    parser.add_argument("--autotuning", choices=["tune", "run"])


def run(args: argparse.Namespace) -> int:
    """Do what the script did."""
    script = Path(args.user_script).name.removesuffix(".py")
    known = {"train": _train, "generate": _generate, "eval": _evaluate, "evaluate": _evaluate}
    if script not in known:
        raise UserError(f"{args.user_script}: deepy knows train.py, generate.py and eval.py; give one of them")
    for name, text in reported(os.environ):
        print(f"castalia: {name} is set: {text}", file=sys.stderr)
    if args.hostfile is not None and not Path(args.hostfile).is_file():
        raise UserError(f"--hostfile {args.hostfile} does not exist: mend the name, or leave it out for this machine")
    files, overrides = settings(args, os.environ)
    return known[script](files, overrides)


def settings(args: argparse.Namespace, environment: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The files and overrides that a command line of deepy.py stands for."""
    files = []
    for name in args.conf_file:
        name = name if name.endswith((".yml", ".yaml", ".json")) else f"{name}.yml"
        files.append(str(Path(args.conf_dir, name)) if args.conf_dir else name)
    values: dict[str, Any] = {key: getattr(args, option) for option, key in _OPTIONS.items()}
    if values["hostfile"] is None:
        values["hostfile"] = environment.get("DLTS_HOSTFILE") or None
    values["master_addr"] = environment.get("MASTER_ADDR") or None
    # JSON is YAML, so that a name such as `1e3` or `no` stays a name.
    return files, [f"{key}={json.dumps(value)}" for key, value in values.items() if value is not None]


def reported(environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """The variables of GPT-NeoX that are set, each with what happens to it."""
    return [(name, text) for name, text in ENVIRONMENT.items() if environment.get(name)]


def _train(files: list[str], overrides: list[str]) -> int:
    from castalia.cli import main

    how = _launched(files, overrides)
    if how is not None:
        return main(["launch", how, *files, *overrides])
    quiet = ["--quiet"] if os.environ.get("LOGLEVEL", "").upper() in _QUIET else []
    return main(["train", *quiet, *files, *overrides])


def _launched(files: list[str], overrides: list[str]) -> str | None:
    """The sub-verb of `launch` where the run is to be on other hosts; None where it is to be here.

    As GPT-NeoX: a hostfile that does not exist, or has one host, means this machine, unless
    force_multi says otherwise.
    """
    from castalia.config import load
    from castalia.tools.launch import find_hosts

    config = load([Path(f) for f in files], overrides)
    launch = config.launch
    if launch.launcher == "slurm":
        return "slurm"
    if launch.hostfile is None or not Path(launch.hostfile).exists():
        return None
    if len(find_hosts(config)) == 1 and not launch.force_multi:
        return None
    return "hosts" if launch.launcher in ("ssh", "pdsh") else "mpi"


# What GPT-NeoX evaluates where eval_tasks names nothing.
_DEFAULT_TASKS = ("lambada", "piqa", "hellaswag", "winogrande", "mathqa", "pubmedqa")


def _evaluate(files: list[str], overrides: list[str]) -> int:
    import datetime

    from castalia.cli import main
    from castalia.config.load import read_gptneox

    given = read_gptneox(files, overrides)
    folder = given.values.get("load") or given.values.get("save")
    if folder is None:
        raise UserError("eval.py needs 'load', the run to evaluate: add it to a file")
    tasks = given.values.get("eval_tasks") or _DEFAULT_TASKS
    prefix = given.values.get("eval_results_prefix")
    now = datetime.datetime.now().strftime("%m-%d-%Y-%H-%M-%S")
    name = f"{prefix}_eval_results_{now}.json" if prefix else f"eval_results_{now}.json"
    argv = ["evaluate", str(folder), "--tasks", *map(str, tasks), "--few-shot", "0", "--output", name]
    for key, flag in (("iteration", "--step"), ("train_micro_batch_size_per_gpu", "--batch-size")):
        if given.values.get(key) is not None:
            argv += [flag, str(given.values[key])]
    return main(argv)


def _generate(files: list[str], overrides: list[str]) -> int:
    from castalia.config.load import read_gptneox

    given = read_gptneox(files, overrides)
    folder = given.values.get("load") or given.values.get("save")
    if folder is None:
        raise UserError("generate.py needs 'load', the run to generate from: add it to a file")
    from castalia.tools.generation import generate_as_gptneox

    for line in generate_as_gptneox(str(folder), given):
        print(line)
    return 0
