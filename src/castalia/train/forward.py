"""The logits of a fixed batch: kept with a checkpoint, and computed again when it is loaded.

    tokens 0, 1, 2, ... ─engine.evaluate, with this in place of the loss─> logits at a few positions
        saving:  ─> logits.safetensors, in the checkpoint
        loading: ─> equal to those kept, but for rounding, or the run does not go on

Hashes show that the files are those that were written. This shows that the model which was made of
them is the one that was saved: another layout, release or kernel that computes something else is
found before the first step. It goes through the engine's loss, so that every layout has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from castalia.data.loader import Batch
from castalia.errors import UserError
from castalia.model.loss import IGNORED, LossSums

if TYPE_CHECKING:
    from castalia.train.run import Run

FORWARD = "logits.safetensors"
POSITIONS = 8
# Of the largest logit, by precision: in fp32 layouts differ by some 1e-6, in 16 bits by 2e-2, and in float8, which
# scales each rank's part by itself, as much as its rounding.
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2, "fp16": 3e-2, "fp8": 0.2}


def fixed_logits(run: Run) -> Tensor:
    """Logits of the fixed batch's first row, at POSITIONS positions or fewer: fp32 `[positions, V]`, on every rank."""
    length = run.config.data.seq_length
    chosen = torch.linspace(0, length - 1, min(POSITIONS, length)).long()
    return marked_logits(run, _batches(run, chosen), len(chosen)).cpu()


def marked_logits(run: Run, micro_batches: Sequence[Batch], count: int) -> Tensor:
    """Logits where labels are 0 .. count - 1, each at one place: fp32 `[count, V]` in that order, on every rank.

    Args:
        micro_batches: the same on every rank; as many as a step has, in a pipeline.
    """
    mesh, engine = run.mesh, cast(Any, run.engine)
    out = torch.full((count, run.config.model.vocab_size or 0), -torch.inf, device=mesh.device)
    shard = getattr(engine, "vocabulary", None)
    first = 0 if shard is None else shard.first

    def note(hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, **_: Any) -> LossSums:
        rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        wanted = targets >= 0
        logits = (rows[wanted].to(weight.dtype) @ weight.T).float()
        out[targets[wanted], first : first + len(weight)] = logits if bias is None else logits + bias
        nothing = torch.zeros((), dtype=torch.float64, device=hidden.device)
        return LossSums(nothing.float(), nothing, nothing)

    kept, engine.loss_sums = engine.loss_sums, note
    try:
        engine.evaluate(micro_batches)
    finally:
        engine.loss_sums = kept
    return mesh.largest(out)


def encoded_logits(run: Run) -> bytes:
    """The file that a checkpoint keeps."""
    from safetensors.torch import save

    return save({"logits": fixed_logits(run)})


def check_logits(run: Run, path: Path) -> str:
    """Compare with what a checkpoint keeps; a sentence on what was found.

    Raises:
        UserError: they differ.
    """
    from safetensors.torch import load

    file = path / FORWARD
    if not file.is_file():
        return f"checkpoint.validate_forward: {path} keeps no logits to compare with, as it was saved without"
    expected, found = load(file.read_bytes())["logits"], fixed_logits(run)
    if expected.shape != found.shape:
        return f"checkpoint.validate_forward: {path} keeps logits of another vocabulary or length: not compared"
    scale = max(expected.abs().max().item(), 1e-30)
    apart = (found - expected).abs().max().item() / scale
    tolerance = TOLERANCE[run.config.training.precision]
    if not apart <= tolerance:
        raise UserError(
            f"{path}: the model made of it computes other logits than the one that was saved (they differ by "
            f"{apart:.1e} of the largest, more than {tolerance:.0e}): use the release and the layout that wrote it, "
            "or go on knowingly with checkpoint.validate_forward=false"
        )
    return f"the model computes the logits that {path.name} keeps (they differ by {apart:.1e} of the largest)"


def _batches(run: Run, chosen: Tensor) -> list[Batch]:
    """Micro-batches of the shape of training's, the first of which has the labels; as many as an evaluation takes."""
    cfg = run.config
    rows, length = cfg.micro_batch_size, cfg.data.seq_length
    positions = torch.arange(length).expand(rows, length).contiguous()
    labels = torch.full((rows, length), IGNORED)
    tokens = positions % (cfg.model.vocab_size or 1)
    batches = []
    layout = run.mesh.layout
    for number in range(cfg.training.batch_size // (rows * layout.data) if layout.pipeline > 1 else 1):
        marked = labels.clone()
        if number == 0:
            marked[0, chosen] = torch.arange(len(chosen))
        batches.append(Batch(tokens, marked, positions, None, sample_ids=torch.arange(rows)))
    return batches
