"""The description of the machine: serialisable, and honest about git."""

import json
import subprocess
import sys
from pathlib import Path

import torch

import castalia
from castalia.train.environment import _git, environment
from castalia.train.machine import measure_matmul_flops


def test_environment_is_json_and_names_the_versions() -> None:
    facts = json.loads(json.dumps(environment()))
    assert facts["castalia"] == castalia.__version__
    assert facts["torch"] == torch.__version__
    assert facts["python"] == sys.version.split()[0]
    assert facts["cores"] >= 1
    assert facts["time"].endswith("+00:00")


def test_git_describes_only_the_checkout_that_tracks_the_file(tmp_path: Path) -> None:
    def git(*args: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *args], check=True, capture_output=True)

    git("init", "-q")
    tracked, stranger = tmp_path / "a.py", tmp_path / "b.py"
    tracked.write_text("1")
    stranger.write_text("2")
    git("add", "a.py")
    git("commit", "-q", "-m", "one")
    clean = _git(tracked)
    assert clean is not None and len(clean["commit"]) == 40 and clean["dirty"] is False
    assert _git(stranger) is None
    tracked.write_text("3")
    changed = _git(tracked)
    assert changed is not None and changed["dirty"] is True


def test_matrix_rate_is_a_rate() -> None:
    rate = measure_matmul_flops(torch.float32, seconds=0.0, sizes=(64, 128))
    assert 1e6 < rate < 1e15
