"""The machine and its software -> a dictionary: what a reader of a run needs to repeat it.

Written once per sitting into `environment.json` (docs/contracts.md, section 3). Only facts
that were observed are in it: a key whose answer is unknown is None, never a guess. The
environment's variables are left out, since they may hold secrets.
"""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import castalia


def environment() -> dict[str, Any]:
    """Describe this process: versions, machine, devices, git commit, command line.

    Returns:
        A JSON-serialisable dictionary. `memory` is in bytes, `time` is UTC in ISO 8601, `git` is None
        unless the running package is tracked by a git checkout.
    """
    import torch

    return {
        "castalia": castalia.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "memory": _memory(),
        "devices": _devices(),
        "git": _git(Path(castalia.__file__).resolve()),
        "command": shlex.join(sys.argv),
        "hostname": socket.gethostname(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str | None:
    """The processor's marketing name where the system tells it (Linux), else its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or None


def _cores() -> int | None:
    """Cores that this process may use, which in a container or under Slurm can be fewer than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory() -> int | None:
    """Physical memory in bytes."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _devices() -> list[dict[str, Any]]:
    """Accelerators as `torch.accelerator` sees them; an empty list on a CPU-only machine."""
    import torch

    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    module: Any = getattr(torch, kind.type, None)
    devices = []
    for index in range(torch.accelerator.device_count()):
        # Not every back end names its devices; the type and index are always known.
        name = module.get_device_name(index) if hasattr(module, "get_device_name") else None
        devices.append({"type": kind.type, "index": index, "name": name})
    return devices


def _git(package: Path) -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout that tracks `package`, or None.

    Being tracked is the test: a package installed in a virtual environment inside somebody's
    repository must not be described by that repository's commit.
    """

    def run(*args: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(package.parent), *args], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if run("ls-files", "--error-unmatch", package.name) is None:
        return None
    commit = run("rev-parse", "HEAD")
    if commit is None:
        return None
    status = run("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if status is None else bool(status)}
