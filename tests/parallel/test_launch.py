"""`castalia train --procs` on this machine: the same run, and the end of a job whose rank fails."""

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from castalia.cli import main
from castalia.parallel.heartbeat import FAILURES, Watch, heartbeat
from castalia.parallel.launch import supervise
from castalia.tools.certify import write_small_run


@pytest.fixture
def small_run(tmp_path):
    path = write_small_run(tmp_path)
    values = json.loads(path.read_text())
    values["model"] |= {"hidden_size": 32}
    values["training"] |= {"steps": 4, "batch_size": 8, "micro_batch_size": 2}
    values["evaluation"] = {"interval": 2, "batches": 1}
    values["checkpoint"] = {"interval": 2}
    path.write_text(json.dumps(values))
    return path


def records(folder, kind):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r.get("bits_per_byte", 0)) for r in lines if r["kind"] == kind]


def test_processes_train_as_one_does_and_go_on_as_another_layout(small_run, tmp_path, capfd):
    flags = ["--quiet", "--no-report"]
    assert main(["train", str(small_run), f"output={tmp_path / 'one'}", *flags]) == 0
    two = ["train", str(small_run), f"output={tmp_path / 'two'}", "--procs", "2", *flags]
    assert main([*two, "parallel.zero=2", "training.exit_interval=2"]) == 3
    assert main([*two, "parallel.tensor=2", "--json"]) == 0
    out = capfd.readouterr()
    assert json.loads(out.out)["run"] == str(tmp_path / "two") and out.err.count("exit_interval") == 1
    for kind in ("train", "valid"):
        one, two = (records(tmp_path / run, kind) for run in ("one", "two"))
        assert [pytest.approx(record, rel=1e-5) for record in one] == two and len(one) == (4 if kind == "train" else 2)


def test_what_does_not_fit_is_said_before_anything_starts(small_run, capfd):
    assert main(["train", str(small_run), "--procs", "2", "training.batch_size=6"]) == 2
    assert capfd.readouterr().err.count("does not divide") == 1


@pytest.mark.parametrize("flags", [["--procs", "0"]])
def test_odd_numbers_are_refused(small_run, capsys, flags):
    assert main(["train", str(small_run), *flags]) == 2
    assert "--procs 0" in capsys.readouterr().err


RANK = "import os, signal, sys, time; rank = os.environ['RANK']; "
FAILING = """
import os, pathlib, time
from castalia.parallel.launch import FAILURES, noted_failure
with noted_failure():
    if os.environ['RANK'] == '1':
        raise ArithmeticError('one has had enough')
    while not (pathlib.Path(os.environ[FAILURES]) / 'failure-1.json').exists():
        time.sleep(0.01)
    raise ConnectionError('the other has gone')
"""


def test_the_rank_that_failed_first_is_named(capfd):
    assert supervise([sys.executable, "-c", FAILING], 2) == 1
    said = capfd.readouterr().err
    assert "rank 1 of 2 failed" in said and "ArithmeticError: one has had enough" in said


def test_a_killed_rank_ends_those_that_wait_for_it(capfd):
    dies = RANK + "os.kill(os.getpid(), signal.SIGKILL) if rank == '1' else time.sleep(600)"
    began = time.monotonic()
    assert supervise([sys.executable, "-c", dies], 3) == 1
    assert time.monotonic() - began < 60 and "rank 1 of 3 failed, and the job was ended: it was killed by SIGKILL" in (
        capfd.readouterr().err
    )


def test_signals_reach_every_rank(tmp_path):
    # Each rank leaves a note when it is ready, and another when it is told to stop.
    rank = (
        "import os, signal, time, sys, pathlib; me = os.environ['RANK']; folder = pathlib.Path(sys.argv[1]);"
        "signal.signal(signal.SIGTERM, lambda *_: ((folder / f'stopped{me}').touch(), sys.exit(3)));"
        "(folder / f'ready{me}').touch(); time.sleep(600)"
    )
    program = "import sys; from castalia.parallel.launch import supervise; sys.exit(supervise(sys.argv[1:], 2))"
    job = subprocess.Popen([sys.executable, "-c", program, sys.executable, "-c", rank, str(tmp_path)], env=os.environ)
    while len(list(tmp_path.glob("ready*"))) < 2:
        assert job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 3
    assert sorted(path.name for path in tmp_path.glob("stopped*")) == ["stopped0", "stopped1"]


HANGS = """
import sys, threading
from castalia.train.run import train
def stand_still(run):
    if run.world.rank == 1 and run.step == 2:
        threading.Event().wait()
train(sys.argv[1], "output=" + sys.argv[2], "performance.hang_timeout=4", callbacks=[stand_still], quiet=True)
"""


def test_a_rank_that_hangs_ends_the_job_with_the_stacks_of_all(small_run, tmp_path, capfd):
    assert supervise([sys.executable, "-c", HANGS, str(small_run), str(tmp_path / "run")], 2, 4.0) == 1
    said = capfd.readouterr().err
    assert "of 2 ranks, rank 1 stood still first, while in a callback" in said
    assert "\nrank 1:" in said and "rank 0:" in said
    assert "stand_still" in said and "train_loop" in said
    assert said.index("stand_still") > said.index("rank 1:")


STAYS_AWAY = """
import os, sys, threading
from datetime import timedelta
from castalia.parallel.heartbeat import heartbeat
from castalia.parallel.launch import noted_failure
rank = int(os.environ["RANK"])
with noted_failure():
    if rank == 1:
        def wait_for_something():
            threading.Event().wait()
        wait_for_something()
    with heartbeat(rank, 2, 1.0):
        threading.Event().wait()
"""


def test_a_rank_that_never_comes_is_named(capfd):
    assert supervise([sys.executable, "-c", STAYS_AWAY], 2, 1.0) == 1
    said = capfd.readouterr().err
    assert "of 2 ranks, rank 1 never came to where the ranks meet" in said and "nothing moved for 1 s" in said
    assert "wait_for_something" in said


def test_standing_still_is_judged_by_the_watchers_own_clock(tmp_path, monkeypatch):
    monkeypatch.setenv(FAILURES, str(tmp_path))
    watch = Watch(tmp_path, 10.0)
    with heartbeat(0, 2, 10.0) as slow, heartbeat(1, 2, 10.0) as quick:
        assert watch.still(0.0, {0, 1}) is None
        quick("saving a checkpoint")
        os.utime(tmp_path / "beat-0", (0, 0))  # the wall clock jumped
        assert watch.still(9.0, {0, 1}) is None
        assert watch.still(10.5, {0, 1}) == "rank 0 stood still first, while meeting the other ranks"
        slow("evaluating")
        slow("evaluating")
        assert watch.still(11.0, {0, 1}) is None
        assert watch.still(19.5, {0, 1}) == "rank 1 stood still first, while saving a checkpoint"
    assert watch.still(99.0, set()) is None  # whoever has left is not waited for
    faulthandler.unregister(signal.SIGUSR1)


def test_a_rank_without_a_supervisor_ends_itself(capfd):
    alone = (
        "import threading; from castalia.parallel.heartbeat import heartbeat\n"
        "with heartbeat(0, 2, 0.2) as beat: beat(); threading.Event().wait()"
    )
    bare = {name: value for name, value in os.environ.items() if name != "CASTALIA_FAILURES"}
    assert subprocess.run([sys.executable, "-c", alone], env=bare, timeout=60).returncode == 1
    assert "Timeout" in capfd.readouterr().err


STOPS = """
import os, pathlib, signal, sys, time
from castalia.parallel.agent import exit_code_of_stop
folder = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(exit_code_of_stop()))
(folder / ("ready" + os.environ["RANK"])).touch()
time.sleep(600)
"""


def test_an_agent_that_is_told_to_stop_leaves_as_the_run_does(tmp_path):
    (tmp_path / "rank.py").write_text(STOPS)
    agent = [sys.executable, "-m", "castalia.parallel.agent", "--nproc-per-node", "2", "--max-restarts", "3"]
    # Port 0: any that is free.
    agent += ["--master-port", "0", str(tmp_path / "rank.py"), str(tmp_path)]
    job = subprocess.Popen(agent, stderr=subprocess.PIPE, text=True)
    while len(list(tmp_path.glob("ready*"))) < 2:
        assert job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    _, said = job.communicate(timeout=60)
    assert job.returncode == 3 and "Traceback" not in said
