"""Saved under one layout of processes, loaded under another: every tensor, bit for bit.

    known values by name ─> parts of layout A ─copied, written in the background─> checkpoint
        parts scribbled over meanwhile                      parts of layout B <─┘ == known values

The values follow from names alone, so that each rank of B knows what its parts must be without asking A.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from castalia.checkpoint import Background, Piece, load_checkpoint, save_checkpoint, step_name, verify_checkpoint
from castalia.config import Config, load
from castalia.errors import CheckFailed
from castalia.parallel.layout import layout_of
from castalia.parallel.testing import run_in_processes
from castalia.parallel.world import World
from castalia.tools.verify import LAYOUTS, shrink, with_settings

ALONE = "1"
MATRIX = (ALONE, "zero3x4", "tp2", "pp2", "tp2pp2", "hsdp")


def save_known(world: World, config: Config, folder: Path) -> None:
    """In each process: give this rank's parts their values, and save them while they are scribbled over."""
    from castalia.parallel.mesh import Mesh
    from castalia.train.assemble import assemble

    mesh = Mesh(layout_of(config.parallel, world.size), world)
    tensors: Mapping[str, Any] = assemble(config, mesh).store.tensors()
    for name, held in tensors.items():
        with torch.no_grad():
            held.copy_(known(name, tuple(held.size())))
    group, background = mesh.host_group(), Background[Path]()
    background.start(tensors, lambda copy: save_checkpoint(folder, 1, copy, {}, process_group=group))
    _scribble(tensors)
    background.wait()
    background.close()


def load_and_compare(world: World, config: Config, folder: Path) -> tuple[int, list[str]]:
    """In each process: how many parts it loaded, and which are not what they must be."""
    from castalia.parallel.mesh import Mesh
    from castalia.train.assemble import assemble

    mesh = Mesh(layout_of(config.parallel, world.size), world)
    tensors: Mapping[str, Any] = assemble(config, mesh).store.tensors()
    _scribble(tensors)
    load_checkpoint(folder / step_name(1), tensors)
    differing, count = [], 0
    for name, held in tensors.items():
        expected = known(name, tuple(held.size()))
        local = _local(held)
        count += local.numel() > 0
        if not torch.equal(local, expected[held.region] if isinstance(held, Piece) else expected):
            differing.append(name)
    return count, differing


def known(name: str, shape: tuple[int, ...]) -> Tensor:
    """The value of a whole tensor, fp32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(crc32(name.encode())))


def reshard(config: Config, before: str, afters: Sequence[str], folder: Path, timeout: float = 120.0) -> dict[str, int]:
    """Save under one layout and load under others.

    Args:
        config: the user's own; it is shrunk.
        before, afters: names of `castalia.tools.verify.LAYOUTS`, or `1`.
        folder: for the checkpoint.

    Returns:
        By layout: how many parts all its ranks have compared.

    Raises:
        CheckFailed: a tensor differs.
    """
    small = shrink(config)

    def run(name: str, function: Any) -> list[Any]:
        processes, settings = (1, {}) if name == ALONE else LAYOUTS[name]
        spread = with_settings(small, settings)
        return run_in_processes(processes, function, spread, folder, timeout=timeout, joined=processes > 1)

    run(before, save_known)
    problems = verify_checkpoint(folder / step_name(1))
    if problems:
        raise CheckFailed(f"saved under {before}: {problems[0]}")
    counts = {}
    for after in afters:
        results = run(after, load_and_compare)
        differing = sorted({name for _, names in results for name in names})
        if differing:
            raise CheckFailed(f"{before} -> {after}: {len(differing)} tensors differ, the first is {differing[0]}")
        counts[after] = sum(count for count, _ in results)
    return counts


def certify_reshard(folder: Path) -> str:
    """See `castalia.tools.certify`.

    Raises:
        CheckFailed: a tensor differs.
    """
    from castalia.tools.certify import table

    path = folder / "run.yml"
    path.write_text(json.dumps({"version": 1, "training": {"steps": 10}}), encoding="utf-8")
    rows = []
    for before in MATRIX:
        with tempfile.TemporaryDirectory(dir=folder) as written:
            counts = reshard(load([path]), before, MATRIX, Path(written))
        print(before, counts, file=sys.stderr, flush=True)
        rows.append((before, *(f"{counts[after]} equal" for after in MATRIX)))
    said = "Parts of parameters and of Adam's moments that all ranks have compared, bit for bit.\n\n"
    return said + table(("saved under \\ loaded under", *MATRIX), rows)


def _scribble(tensors: Mapping[str, Any]) -> None:
    with torch.no_grad():
        for held in tensors.values():
            _local(held).fill_(float("nan"))


def _local(held: Any) -> Tensor:
    local: Tensor = held.local if isinstance(held, Piece) else held.detach()
    return local
