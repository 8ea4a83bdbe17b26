"""Starting, copying and stopping on several hosts, by an ssh that stays on this machine."""

import json
import os
import stat
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from castalia.cli import main
from castalia.config import load
from castalia.errors import UserError
from castalia.tools.launch import (
    find_hosts,
    host_commands,
    job_name,
    mpi_command,
    passed_variables,
    run_all,
    run_commands,
    stop_commands,
    sync_commands,
)
from castalia.tools.launch_files import kubernetes_file, sbatch_file


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Two 'hosts', each a folder for temporary files, and an ssh that runs its command here."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for host in ("n1", "n2"):
        (tmp_path / host).mkdir()
    program(
        bin_dir / "ssh",
        "#!/bin/sh\nwhile [ $# -gt 0 ]; do case $1 in -o) shift 2;; *) break;; esac; done\n"
        f'host=$1; shift\nTMPDIR={tmp_path}/$host; HOST_NAME=$host; export TMPDIR HOST_NAME\nexec sh -c "$*"\n',
    )
    # In place of Python: says what it was told, then works until it is stopped, or fails at once on n2.
    program(
        bin_dir / "castalia-python",
        '#!/bin/sh\necho "$HOST_NAME args: $*"\n[ -e fail-$HOST_NAME ] && exit 7\n'
        "trap 'echo saved; exit 3' TERM\n[ -e quick ] && exit 0\nwhile :; do sleep 0.05; done\n",
    )
    monkeypatch.setenv("PATH", f"{bin_dir}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("n1 slots=2\nn2 slots=2  # the second\n\n")
    (tmp_path / "run.yml").write_text(
        "version: 1\nname: Some run\ndata: {path: x}\n"
        f"launch: {{hostfile: hosts, python: {bin_dir}/castalia-python, env: [CASTALIA_TEST_]}}\n"
    )
    return tmp_path


def config(*overrides):
    return load([Path("run.yml")], list(overrides))


def test_hosts_and_filters(cluster):
    assert find_hosts(config()) == {"n1": [0, 1], "n2": [0, 1]}
    assert find_hosts(config("launch.include='n2:1'")) == {"n2": [1]}
    assert find_hosts(config("launch.exclude='n2:1@n1'")) == {"n2": [0]}
    assert find_hosts(config("launch.nodes=1", "launch.procs_per_node=1")) == {"n1": [0]}
    with pytest.raises(UserError, match=r"launch.include names 'n3'"):
        find_hosts(config("launch.include=n3"))
    Path("hosts").write_text("n1 slots=2\nn1 slots=2\n")
    with pytest.raises(UserError, match="line 2"):
        find_hosts(config())


def test_every_host_gets_its_rank_its_variables_and_the_same_command(cluster):
    environment = {"CASTALIA_TEST_A": "it's", "SECRET": "x"}
    first, second = host_commands(config(), ["run.yml", "training.steps=3"], environment)
    assert "--nnodes 2 --node-rank 0 --nproc-per-node 2 --master-addr n1" in first.script
    assert "--node-rank 1" in second.script
    assert "castalia train run.yml training.steps=3" in second.script
    assert """export CASTALIA_TEST_A='it'"'"'s'""" in first.script
    assert "SECRET" not in first.script + " ".join(first.argv)
    assert "CUDA_VISIBLE_DEVICES" not in first.script
    (only,) = host_commands(config("launch.include='n2:1'"), [], {})
    assert "export CUDA_VISIBLE_DEVICES=1" in only.script and "--master-addr n2" in only.script


def test_a_file_of_variables(cluster):
    Path("env").write_text("# NCCL\nexport NCCL_DEBUG=INFO\nA=b=c\n\n")
    assert passed_variables(config("launch.env_file=env"), {}) == {"NCCL_DEBUG": "INFO", "A": "b=c"}
    Path("env").write_text("A=1\nnot a line\n")
    with pytest.raises(UserError, match="env:2 is not NAME=VALUE"):
        passed_variables(config("launch.env_file=env"), {})


def test_a_host_that_fails_ends_the_others(cluster):
    Path("fail-n2").touch()
    lines, stopped = [], []

    def stop():
        stopped.append(run_all(stop_commands(config(), grace=5), lines.append))

    codes = run_all(host_commands(config(), ["run.yml"], {}), lines.append, stop)
    assert codes == {"n1": 3, "n2": 7}, "n1 was asked to save and stop"
    assert stopped and all(codes == {"n1": 0, "n2": 0} for codes in stopped)
    assert "n1: saved" in lines and any(line.startswith("n2: n2 args: -m castalia.parallel.agent") for line in lines)


def test_stop_ends_this_run_alone(cluster):
    other = subprocess.Popen(["sleep", "60"])
    try:
        name = job_name(config())
        started = host_commands(config(), ["run.yml"], {})
        processes = [subprocess.Popen(c.argv, stdin=subprocess.PIPE, text=True) for c in started]
        for process, command in zip(processes, started, strict=True):
            process.stdin.write(command.script)
            process.stdin.close()
        deadline = time.monotonic() + 20
        while not all((cluster / f"n{k + 1}" / f"{name}.{k}.pid").exists() for k in range(2)):
            assert time.monotonic() < deadline
        lines = []
        assert run_all(stop_commands(config(), grace=5), lines.append) == {"n1": 0, "n2": 0}
        assert sorted(lines) == ["n1: stopped", "n2: stopped"]
        assert [process.wait(20) for process in processes] == [3, 3]
        # A number that has gone to another program is left alone.
        (cluster / "n1" / f"{name}.0.pid").write_text(str(other.pid))
        lines.clear()
        run_all(stop_commands(config(), grace=1), lines.append)
        assert sorted(lines) == ["n1: not running", "n2: not running"]
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_run_and_sync(cluster, monkeypatch):
    lines = []
    assert run_all(run_commands(config(), 'echo "on $HOST_NAME"; [ "$HOST_NAME" = n1 ]'), lines.append) == {
        "n1": 0,
        "n2": 1,
    }
    assert sorted(lines) == ["n1: on n1", "n2: on n2"]
    (cluster / "folder" / "deep").mkdir(parents=True)
    (cluster / "folder" / "deep" / "file").write_text("text")
    monkeypatch.setattr("castalia.tools.launch.shutil.which", lambda name: None if name == "rsync" else name)
    packed = sync_commands(config("launch.nodes=1"), ["folder"])
    moved = [c.argv[2].replace(f"mkdir -p {cluster}", f"mkdir -p {cluster}/n1") for c in packed]
    moved = [line.replace(f"tar -C {cluster} -xf", f"tar -C {cluster}/n1 -xf") for line in moved]
    subprocess.run(["sh", "-c", moved[0]], check=True)
    assert (cluster / "n1" / "folder" / "deep" / "file").read_text() == "text"
    with pytest.raises(UserError, match="does not exist"):
        sync_commands(config(), ["nothing"])


def test_mpi_gets_the_hosts_as_each_mpi_wants_them(cluster):
    hosts = cluster / "out" / "hosts"
    command, text = mpi_command(config("launch.launcher=openmpi", "launch.exclude='n1:0'"), ["run.yml"], {}, hosts)
    assert text == "n1 slots=1\nn2 slots=2\n"
    assert command.argv[:5] == ["mpirun", "-n", "3", "--hostfile", str(hosts)]
    assert "MASTER_ADDR=n1" in command.argv
    command, text = mpi_command(config("launch.launcher=mpich"), ["run.yml"], {"CASTALIA_TEST_X": "1"}, hosts)
    assert text == "n1:2\nn2:2\n"
    at = command.argv.index("CASTALIA_TEST_X")
    assert command.argv[at - 1 : at + 2] == ["-genv", "CASTALIA_TEST_X", "1"]


def test_mpi_is_started_with_the_hosts_written_and_a_dry_run_writes_nothing(cluster, capsys):
    program(cluster / "bin" / "mpirun", '#!/bin/sh\ncat "$4"\n')
    verb = ["launch", "mpi", "run.yml", "launch.launcher=openmpi"]
    before = sorted(cluster.rglob("*"))
    assert main([*verb, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "n1 slots=2\nn2 slots=2\nEND\nmpirun -n 4" in said
    assert main([*verb, "--dry-run", "--json"]) == 0
    file, command = json.loads(capsys.readouterr().out)
    assert file["text"] == "n1 slots=2\nn2 slots=2\n" and file["file"] in command["argv"]
    assert sorted(cluster.rglob("*")) == before
    assert main(verb) == 0
    assert "openmpi: n2 slots=2" in capsys.readouterr().err


def test_sbatch(cluster):
    shape = ["launch.nodes=4", "launch.procs_per_node=8"]
    text = sbatch_file(config(*shape, "launch.gres='gpu:8'", "launch.comment='two words'"), ["run.yml"])
    assert "#SBATCH --nodes=4" in text and "#SBATCH --gres=gpu:8" in text and "#SBATCH '--comment=two words'" in text
    assert "--partition" not in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    with pytest.raises(UserError, match="launch.nodes is not set"):
        sbatch_file(config("launch.procs_per_node=8"), [])
    with pytest.raises(UserError, match="names slots"):
        sbatch_file(config(*shape, "launch.include='n1:0'"), [])


def test_kubernetes(cluster):
    overrides = ["launch.nodes=2", "launch.procs_per_node=8", "launch.image=reg/castalia"]
    text = kubernetes_file(config(*overrides, "launch.device_resource=nvidia.com/gpu"), ["/config/a"], {"a": "x: 1"})
    config_map, service, job = yaml.safe_load_all(text)
    name = job["metadata"]["name"]
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert config_map["data"] == {"a": "x: 1"} and service["spec"]["clusterIP"] == "None"
    assert job["spec"]["completionMode"] == "Indexed" and job["spec"]["completions"] == 2
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert container["command"][container["command"].index("--master-addr") + 1] == f"{name}-0.{name}"
    assert len(name) <= 52 and name == name.lower() and "_" not in name
    with pytest.raises(UserError, match="launch.image is not set"):
        kubernetes_file(config(*overrides[:2]), [], {})


def test_the_verb(cluster, capsys):
    Path("quick").touch()
    assert main(["launch", "hosts", "run.yml", "training.steps=5"]) == 0
    assert "n2: n2 args: -m castalia.parallel.agent" in capsys.readouterr().err
    Path("quick").unlink()
    Path("fail-n1").touch()
    Path("fail-n2").touch()
    assert main(["launch", "hosts", "run.yml"]) == 7
    assert "failed on n1 (exit code 7), n2 (exit code 7)" in capsys.readouterr().err
    assert main(["launch", "mpi", "run.yml"]) == 2
    assert "launch.launcher is ssh" in capsys.readouterr().err
    assert main(["launch", "slurm", "run.yml", "launch.nodes=1", "launch.procs_per_node=1", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash")


def test_the_launcher_of_gpt_neox(cluster, monkeypatch):
    """deepy starts on other hosts what a hostfile of several hosts asks for."""
    from castalia.cli import deepy

    Path("neox.yml").write_text(
        "train-iters: 3\nnum-layers: 2\nhidden-size: 32\nnum-attention-heads: 2\nseq-length: 32\n"
        "max-position-embeddings: 32\ntrain_micro_batch_size_per_gpu: 2\ndata-path: x\nno_ssh_check: true\n"
        "pos-emb: rotary\noptimizer: {type: adam, params: {lr: 0.001}}\nhostfile: hosts\n"
    )
    assert deepy._launched(["neox.yml"], []) == "hosts"
    assert deepy._launched(["neox.yml"], ["launcher=openmpi"]) == "mpi"
    assert deepy._launched(["neox.yml"], ["num_nodes=1"]) is None
    assert deepy._launched(["neox.yml"], ["num_nodes=1", "force_multi=true"]) == "hosts"
    assert deepy._launched(["neox.yml"], ["deepspeed_slurm=true"]) == "slurm"
    assert deepy._launched(["neox.yml"], ["hostfile=missing"]) is None
