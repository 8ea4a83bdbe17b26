"""The examples in deploy/ and containers/: they load, and say what the library can read."""

from pathlib import Path

import pytest

from castalia.cli import main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("verb", "overlay", "first"),
    [
        ("hosts", "ssh", "ssh -o BatchMode=yes node-1"),
        ("mpi", "mpi", "cat > runs/demo/launch/hosts <<'END'\nnode-1 slots=8\nnode-2 slots=8\nEND\nmpirun -n 16"),
        ("slurm", "slurm", "#!/bin/bash"),
        ("kubernetes", "kubernetes", "apiVersion: v1"),
    ],
)
def test_each_overlay_starts_the_demo(verb, overlay, first, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [str(ROOT / "configs/demo.yml"), str(ROOT / f"deploy/{overlay}.yml")]
    hostfile = [] if verb in ("slurm", "kubernetes") else [f"launch.hostfile={ROOT / 'deploy/hosts'}"]
    assert main(["launch", verb, *files, *hostfile, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith(first)


def test_the_image_copies_what_there_is_and_has_no_password():
    text = (ROOT / "containers/Dockerfile").read_text()
    for line in text.splitlines():
        if line.startswith("COPY"):
            assert all((ROOT / name).exists() for name in line.split()[1:-1]), line
    assert "passwd" not in text and "sshd" not in text and "USER castalia" in text
