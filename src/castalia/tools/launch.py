"""A configuration and its `launch` section -> the processes of a run, on the hosts that share it.

    hosts        ssh or pdsh: on each host  torchrun (parallel/agent.py) -m castalia train FILES
    mpi          mpirun or mpiexec: on each slot  python -m castalia train FILES
    slurm        an sbatch file (launch_files.py)
    kubernetes   a Job and a Service (launch_files.py)

What runs is always `castalia train` with the files and overrides that were given, from the
same folder. A host's commands go to its shell through standard input, so that no variable is
seen in a list of processes. Every host notes the number of its process under the job's name,
which follows from the run's folder: `stop` ends that process and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from castalia.config import Config
from castalia.config.hosts import HostError, read_hosts, select_hosts
from castalia.errors import UserError

Hosts = dict[str, list[int]]
GRACE = 30  # seconds between SIGTERM, on which a run saves its state, and SIGKILL


@dataclass(frozen=True)
class Command:
    """A command of this machine, and what goes into its standard input.

    Attributes:
        host: whom it is about, for the prefix of what it prints.
        argv: the command.
        script: its standard input; None: nothing.
    """

    host: str
    argv: list[str]
    script: str | None = None


def find_hosts(config: Config) -> Hosts:
    """The hosts and slots that the launch section asks for.

    Raises:
        UserError: no hostfile is named or it cannot be read, or the filters do not fit it.
    """
    launch = config.launch
    if launch.hostfile is None:
        raise UserError("launch.hostfile is not set: name a file with a line `HOST slots=N` for each host")
    try:
        text = Path(launch.hostfile).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"launch.hostfile: {launch.hostfile} cannot be read ({error}): name another file") from None
    try:
        return select_hosts(read_hosts(text), launch.include, launch.exclude, launch.nodes, launch.procs_per_node)
    except HostError as error:
        raise UserError(f"launch.{error.key} {error.what}") from None


def job_name(config: Config) -> str:
    """The job's name on every host: the run's, and a hash of its folder."""
    where = os.path.abspath(os.path.expanduser(config.run_dir))
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", config.name).strip("-").lower() or "run"
    return f"castalia-{name[:40]}-{hashlib.sha256(where.encode()).hexdigest()[:8]}"


def passed_variables(config: Config, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that other hosts get: those with the prefixes of launch.env, and those of launch.env_file.

    Raises:
        UserError: a line of the file is not NAME=VALUE.
    """
    prefixes = tuple(config.launch.env)
    passed = {name: value for name, value in environment.items() if name.startswith(prefixes)} if prefixes else {}
    if config.launch.env_file is not None:
        path = Path(config.launch.env_file).expanduser()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"launch.env_file: {path} cannot be read ({error}): name another file") from None
        for number, line in enumerate(lines, 1):
            line = line.strip().removeprefix("export ")
            name, equals, value = line.partition("=")
            if not line or line.startswith("#"):
                continue
            if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise UserError(f"{path}:{number} is not NAME=VALUE")
            passed[name] = value
    return passed


def train_command(config: Config, arguments: Sequence[str], module_of: str | None = None) -> list[str]:
    """`python -m castalia train ...`, or what follows `-m` alone for torchrun."""
    tail = ["castalia", "train", *arguments]
    return tail if module_of else [config.launch.python or sys.executable, "-u", "-m", *tail]


def host_commands(config: Config, arguments: Sequence[str], environment: Mapping[str, str]) -> list[Command]:
    """One command for each host, by ssh, or one for all by pdsh.

    Args:
        config: the run.
        arguments: files, overrides and flags for `castalia train`.
        environment: this process's variables.

    Raises:
        UserError: see `find_hosts`; or pdsh is to start hosts with different slots.
    """
    hosts, launch = find_hosts(config), config.launch
    address = launch.master_addr or next(iter(hosts))
    variables = passed_variables(config, environment)
    if launch.launcher == "pdsh":
        if len(set(map(tuple, hosts.values()))) > 1:
            raise UserError("launch.launcher pdsh starts every host alike: give them the same slots, or use ssh")
        script = _host_script(config, arguments, variables, hosts, next(iter(hosts)), "%n", address)
        return [Command("pdsh", ["pdsh", "-S", "-R", "ssh", "-f", "1024", "-w", ",".join(hosts), script])]
    return [
        Command(
            host,
            _ssh(config, host),
            _host_script(config, arguments, variables, hosts, host, str(rank), address),
        )
        for rank, host in enumerate(hosts)
    ]


def _host_script(
    config: Config,
    arguments: Sequence[str],
    variables: Mapping[str, str],
    hosts: Hosts,
    host: str,
    node_rank: str,
    address: str,
) -> str:
    """What a host's shell does: go to the folder, set variables, note its process, become torchrun."""
    launch, slots = config.launch, hosts[host]
    if launch.visible_devices and (launch.include or launch.exclude):
        variables = {**variables, launch.visible_devices: ",".join(map(str, slots))}
    run = [
        *(launch.python or sys.executable, "-m", "castalia.parallel.agent"),
        *("--nnodes", str(len(hosts)), "--node-rank", node_rank, "--nproc-per-node", str(len(slots))),
        *("--master-addr", address, "--master-port", str(launch.master_port)),
        *("--max-restarts", str(launch.max_restarts), "-m", *train_command(config, arguments, "torchrun")),
    ]
    return "\n".join(
        [
            f"cd {shlex.quote(launch.folder or os.getcwd())} || exit 1",
            *(f"export {name}={shlex.quote(value)}" for name, value in sorted(variables.items())),
            f"echo $$ > {_pid_file(config, node_rank)}",
            *launch.setup,
            # exec keeps the number that was noted; torchrun must not read the rest of this script.
            f"exec {_words(run)} < /dev/null",
        ]
    )


def _words(argv: Sequence[str]) -> str:
    # pdsh replaces %n only where the shell has not quoted it.
    return " ".join(word if word == "%n" else shlex.quote(word) for word in argv)


def _pid_file(config: Config, node_rank: str) -> str:
    # With the host's number, since hosts may share their folder for temporary files.
    return f'"${{TMPDIR:-/tmp}}/{job_name(config)}.{node_rank}.pid"'


def _ssh(config: Config, host: str) -> list[str]:
    return ["ssh", "-o", "BatchMode=yes", *shlex.split(config.launch.ssh_args), host, "/bin/sh -s"]


def stop_commands(config: Config, grace: int = GRACE) -> list[Command]:
    """For each host: end this job's process, and nothing else.

    SIGTERM first, on which a run saves its state; after `grace` seconds SIGKILL for it and its children.
    """

    lines = [
        'pid=$(cat "$file" 2>/dev/null) || { echo "not running"; exit 0; }',
        # The number may have gone to another program since; `sh -s` is a host that is still in launch.setup.
        'case "$(ps -ww -p "$pid" -o args= 2>/dev/null)" in *castalia*|*"sh -s"*) ;;',
        '*) rm -f "$file"; echo "not running"; exit 0;; esac',
        "children=$(ps -eo pid=,ppid= | awk -v p=\"$pid\" '$2 == p {print $1}')",
        'kill -TERM "$pid" 2>/dev/null',
        f'i=0; while kill -0 "$pid" 2>/dev/null && [ $i -lt {grace} ]; do sleep 1; i=$((i + 1)); done',
        'kill -KILL "$pid" $children 2>/dev/null && echo "killed" || echo "stopped"',
        'rm -f "$file"',
    ]
    return [
        Command(host, _ssh(config, host), "\n".join([f"file={_pid_file(config, str(rank))}", *lines]))
        for rank, host in enumerate(find_hosts(config))
    ]


def mpi_command(
    config: Config, arguments: Sequence[str], environment: Mapping[str, str], hostfile: Path
) -> tuple[Command, str]:
    """One mpirun for all processes, and what `hostfile` must say: the hosts that the filters leave.

    Open MPI takes `HOST slots=N`; MPICH, MVAPICH and Intel MPI (Hydra) take `HOST:N`. Nothing is written here.

    Raises:
        UserError: see `find_hosts`.
    """
    hosts, launch = find_hosts(config), config.launch
    total = str(sum(map(len, hosts.values())))
    variables = passed_variables(config, environment)
    variables |= {"MASTER_ADDR": launch.master_addr or next(iter(hosts)), "MASTER_PORT": str(launch.master_port)}
    if launch.launcher == "openmpi":
        form, start = "{} slots={}\n", ["mpirun", "-n", total, "--hostfile", str(hostfile)]
        given = [word for name, value in sorted(variables.items()) for word in ("-x", f"{name}={value}")]
    else:
        program = "mpirun" if launch.launcher == "impi" else "mpiexec"
        form, start = "{}:{}\n", [program, "-n", total, "-f", str(hostfile)]
        given = [word for name, value in sorted(variables.items()) for word in ("-genv", name, value)]
    text = "".join(form.format(host, len(slots)) for host, slots in hosts.items())
    extra = shlex.split(launch.launcher_args)
    return Command(launch.launcher, [*start, *extra, *given, *train_command(config, arguments)]), text


def srun_command(config: Config, arguments: Sequence[str]) -> Command:
    """One srun for all processes, inside an allocation that there is already."""
    launch = config.launch
    asked = {
        "nodes": launch.nodes,
        "ntasks-per-node": launch.procs_per_node,
        "account": launch.account,
        "comment": launch.comment,
        "nodelist": slurm_list("include", launch.include),
        "exclude": slurm_list("exclude", launch.exclude),
    }
    options = [f"--{name}={value}" for name, value in asked.items() if value is not None]
    extra = shlex.split(launch.launcher_args)
    return Command("slurm", ["srun", "--kill-on-bad-exit=1", *options, *extra, *train_command(config, arguments)])


def slurm_list(key: str, spec: str | None) -> str | None:
    """Hosts as Slurm lists them.

    Raises:
        UserError: slots are named, which Slurm chooses itself.
    """
    if spec is not None and ":" in spec:
        raise UserError(f"launch.{key} names slots, which Slurm chooses itself: name hosts alone, as host1@host2")
    return None if spec is None else spec.replace("@", ",")


def sync_commands(config: Config, paths: Sequence[str]) -> list[Command]:
    """Copy files or folders to the same absolute path on every host.

    By rsync where this machine has it (what is equal is not sent again), else by tar through ssh.

    Raises:
        UserError: a path does not exist here.
    """
    commands = []
    for path in (Path(os.path.abspath(os.path.expanduser(p))) for p in paths):
        if not path.exists():
            raise UserError(f"{path} does not exist: name files or folders of this machine")
        parent, quoted = str(path.parent), shlex.quote(str(path.parent))
        for host in find_hosts(config):
            if shutil.which("rsync"):
                shell = " ".join(["ssh", "-o", "BatchMode=yes", *shlex.split(config.launch.ssh_args)])
                make = f"mkdir -p {quoted} && rsync"
                argv = ["rsync", "-a", "-e", shell, "--rsync-path", make, str(path), f"{host}:{parent}/"]
                commands.append(Command(host, argv))
            else:
                ssh = [*_ssh(config, host)[:-1], f"mkdir -p {quoted} && tar -C {quoted} -xf -"]
                pack = ["tar", "-C", parent, "-cf", "-", path.name]
                commands.append(Command(host, ["/bin/sh", "-c", f"{shlex.join(pack)} | {shlex.join(ssh)}"]))
    return commands


def run_commands(config: Config, line: str) -> list[Command]:
    """Run a shell line on every host."""
    folder = shlex.quote(config.launch.folder or os.getcwd())
    script = f"cd {folder} 2>/dev/null\n{line}\n"
    return [Command(host, _ssh(config, host), script) for host in find_hosts(config)]


def check_ssh(config: Config) -> None:
    """Refuse to start where the first host cannot be reached without a password.

    Raises:
        UserError: it cannot.
    """
    host = next(iter(find_hosts(config)))
    argv = ["ssh", "-o", "ConnectTimeout=10", *_ssh(config, host)[1:-1], "true"]
    _need(argv[0])
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"{host} cannot be reached by ssh without a password ({said}): put a key there, "
            "or set launch.ssh_check=false if it is reached in another way"
        )


def _need(program: str) -> None:
    if shutil.which(program) is None:
        raise UserError(f"{program} is not on this machine: install it, or choose another launch.launcher")


def run_all(
    commands: Sequence[Command],
    say: Callable[[str], None],
    on_failure: Callable[[], None] | None = None,
) -> dict[str, int]:
    """Run commands side by side, each line of theirs with its host in front.

    Args:
        commands: what to run.
        say: takes each line.
        on_failure: ends the rest; called when a command has failed, until all have ended, and when this process
            is interrupted.

    Returns:
        Exit code by host.

    Raises:
        UserError: a program is missing.
    """
    for program in {command.argv[0] for command in commands}:
        _need(program)
    running = [
        subprocess.Popen(
            command.argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the job in order
        )
        for command in commands
    ]
    failed = threading.Event()
    threads = [
        threading.Thread(target=_follow, args=(command, process, say, failed), daemon=True)
        for command, process in zip(commands, running, strict=True)
    ]
    for thread in threads:
        thread.start()
    try:
        while any(process.poll() is None for process in running):
            if failed.wait(0.2) and on_failure is None:
                time.sleep(0.2)
            elif failed.is_set() and on_failure is not None:
                # Again and again: a host that was still starting had noted no process yet.
                on_failure()
                time.sleep(0.2)
    except KeyboardInterrupt:
        if on_failure is not None:
            on_failure()
        for process in running:
            process.terminate()
        raise
    for thread in threads:
        thread.join()
    codes: dict[str, int] = {}
    for command, process in zip(commands, running, strict=True):
        codes[command.host] = codes.get(command.host) or process.returncode
    return codes


def _follow(
    command: Command, process: subprocess.Popen[str], say: Callable[[str], None], failed: threading.Event
) -> None:
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(command.script or "")
        process.stdin.close()
    except BrokenPipeError:  # it ended before it read: its exit code says why
        pass
    for line in process.stdout:
        say(f"{command.host}: {line.rstrip()}")
    if process.wait():
        failed.set()
