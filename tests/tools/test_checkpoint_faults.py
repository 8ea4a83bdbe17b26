"""Short forms of `python -m castalia.tools.certify checkpoint_kills checkpoint_damage`."""

import subprocess
import sys

import pytest

from castalia.tools.certify import certify_checkpoint_damage

KILLS = """
import sys
from pathlib import Path
import torch
from castalia.tools.certify import write_small_run
from castalia.tools.checkpoint_faults import kill_saves

torch.set_num_threads(1)
folder = Path(sys.argv[1])
config = write_small_run(folder)
config.write_text(config.read_text().replace('"steps": 800', '"steps": 14'))
print(kill_saves(config, folder, 4)["kills"])
"""


def test_kills_in_the_midst_of_saves(tmp_path):
    """In a process of its own, since it forks."""
    done = subprocess.run([sys.executable, "-c", KILLS, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "4", done.stderr


def test_damage_and_refusals(tmp_path):
    for module in ("s3fs", "moto.server", "flask_cors"):
        pytest.importorskip(module)
    said = certify_checkpoint_damage(tmp_path, flips=3)
    for file in (".metadata", "__0_0.distcp", "state.json", "manifest.json"):
        assert f"| {file} | 3 | 3 | 1 |" in said
    assert "File too large" in said and "s3://runs/small: step-" in said
