"""`castalia launch hosts|mpi|slurm|kubernetes|sync|run|stop CONFIG ...`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from castalia.cli import split_settings

_STARTING = {
    "hosts": "by ssh or pdsh on the hosts of launch.hostfile",
    "mpi": "by mpirun or mpiexec on the hosts of launch.hostfile",
    "slurm": "write an sbatch file and submit it; inside an allocation, srun",
    "kubernetes": "write a manifest and apply it",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    verbs = parser.add_subparsers(dest="what", required=True, metavar="|".join([*_STARTING, "sync", "run", "stop"]))
    for name, text in _STARTING.items():
        start = verbs.add_parser(name, help=text)
        start.add_argument("settings", nargs="+", metavar="FILE|key=value", help="configuration files and overrides")
        start.add_argument("--dry-run", action="store_true", help="print what would be started")
        start.add_argument("--json", action="store_true", help="with --dry-run: print it as JSON")
        start.add_argument("--accept", action="store_true", help="as for `castalia train`")
        if name in ("slurm", "kubernetes"):
            start.add_argument("--output", metavar="FILE", help="where the file is written (default: the run's folder)")
    for name, text, more in (
        ("sync", "copy files or folders to the same place on every host", "PATH"),
        ("run", "run a shell line on every host", "LINE"),
        ("stop", "end this run's processes on every host, and nothing else", None),
    ):
        verb = verbs.add_parser(name, help=text)
        verb.add_argument("settings", nargs="+", metavar="FILE|key=value", help="the run's files and overrides")
        if more:
            verb.add_argument(f"--{more.lower()}", required=True, action="append", metavar=more)


def run(args: argparse.Namespace) -> int:
    """Start, copy, run or stop."""
    from castalia.config import load
    from castalia.tools import launch

    files, overrides = split_settings(args.settings)
    config = load([Path(f) for f in files], overrides)
    if args.what == "sync":
        return _report(launch.run_all(launch.sync_commands(config, args.path), _say))
    if args.what == "run":
        return _report(launch.run_all(launch.run_commands(config, "\n".join(args.line)), _say))
    if args.what == "stop":
        return _report(launch.run_all(launch.stop_commands(config), _say))
    passed = [*args.settings, *(["--accept"] if args.accept else [])]
    if args.what == "slurm" and "SLURM_JOB_ID" in os.environ and not args.dry_run and not args.output:
        # An allocation is there already: nothing needs to be submitted.
        return _report(launch.run_all([launch.srun_command(config, passed)], _say))
    if args.what == "slurm":
        return _submit(args, config, ["sbatch"], _slurm_text(config, passed), "job.sbatch")
    if args.what == "kubernetes":
        return _submit(args, config, ["kubectl", "apply", "-f"], _kubernetes_text(config, files, passed), "job.yaml")
    return _start(args, config, passed)


def _start(args: argparse.Namespace, config: Any, passed: Sequence[str]) -> int:
    from castalia.errors import UserError
    from castalia.tools import launch

    by_mpi = args.what == "mpi"
    known = ("openmpi", "mpich", "mvapich", "impi") if by_mpi else ("ssh", "pdsh")
    if config.launch.launcher not in known:
        raise UserError(f"launch.launcher is {config.launch.launcher}: `launch {args.what}` takes {', '.join(known)}")
    hostfile, hosts = Path(config.run_dir, "launch", "hosts"), ""
    if by_mpi:
        command, hosts = launch.mpi_command(config, passed, os.environ, hostfile)
        commands = [command]
    else:
        commands = launch.host_commands(config, passed, os.environ)
    if args.dry_run:
        if args.json:
            written = [{"file": str(hostfile), "text": hosts}] if by_mpi else []
            print(json.dumps([*written, *map(vars, commands)]))
        else:
            import shlex

            if by_mpi:
                print(f"cat > {shlex.quote(str(hostfile))} <<'END'\n{hosts}END")
            for command in commands:
                print(shlex.join(command.argv) + (f" <<'END'\n{command.script}\nEND" if command.script else ""))
        return 0
    if by_mpi:
        hostfile.parent.mkdir(parents=True, exist_ok=True)
        hostfile.write_text(hosts, encoding="utf-8")
    elif config.launch.ssh_check:
        launch.check_ssh(config)

    def stop() -> None:
        if not by_mpi:
            _say("castalia: a host has failed or this command was interrupted: the others are being stopped")
            launch.run_all(launch.stop_commands(config), _say)

    return _report(launch.run_all(commands, _say, stop))


def _slurm_text(config: Any, passed: Sequence[str]) -> str:
    from castalia.tools.launch_files import sbatch_file

    return sbatch_file(config, passed)


def _kubernetes_text(config: Any, files: Sequence[str], passed: Sequence[str]) -> str:
    from castalia.tools.launch_files import kubernetes_file

    contents = {
        f"{number}-{Path(file).name}": Path(file).read_text(encoding="utf-8") for number, file in enumerate(files)
    }
    inside = dict(zip(files, (f"/config/{name}" for name in contents), strict=True))
    return kubernetes_file(config, [inside.get(argument, argument) for argument in passed], contents)


def _submit(args: argparse.Namespace, config: Any, command: list[str], text: str, name: str) -> int:
    """Write the scheduler's file and hand it over, or print it."""
    import shutil

    from castalia.errors import UserError

    if args.dry_run:
        print(json.dumps({"file": text}) if args.json else text, end="")
        return 0
    path = Path(args.output) if args.output else Path(config.run_dir, "launch", name)
    Path(config.run_dir, "launch").mkdir(parents=True, exist_ok=True)  # Slurm drops a job whose log it cannot open
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    if shutil.which(command[0]) is None:
        raise UserError(f"{path} is written, but {command[0]} is not on this machine: submit it where it is")
    return subprocess.run([*command, str(path)]).returncode


def _report(codes: dict[str, int]) -> int:
    failed = {host: code for host, code in codes.items() if code}
    if failed:
        text = ", ".join(f"{host} (exit code {code})" for host, code in failed.items())
        print(f"castalia: failed on {text}", file=sys.stderr)
    # A run that was stopped and has saved its state (3) keeps its exit code.
    return next(iter(failed.values()), 0)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
