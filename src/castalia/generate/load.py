"""A run directory -> its model and tokenizer, ready to generate or to be evaluated.

    config.yaml ──────> Transformer on the meta device ──> memory, uninitialised ─┐
    checkpoints/ ─newest whole one─> tensors `model.*` ───────────────────────────┴─> model
    tokenizer.json, or the checkpoint's word that ids are bytes ──> tokenizer

Only the model's tensors are read, not the optimizer's, and no weight is initialised that is
about to be overwritten.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from castalia.checkpoint import Checkpoint, find_checkpoint, load_weights, read_state, verify_checkpoint
from castalia.checkpoint.layout import MANIFEST
from castalia.config import Config, load
from castalia.config.load import check_values
from castalia.data.tokenizer import Tokenizer, load_kept, load_tokenizer
from castalia.errors import UserError
from castalia.model import Transformer


def load_run(
    run_dir: str | Path,
    step: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Transformer, Tokenizer]:
    """Load the model and the tokenizer of a run (docs/contracts.md, sections 3 and 4).

    Args:
        run_dir: the run's directory, in which training may be going on; or one checkpoint, wherever it was copied to.
        step: of the checkpoint; None: the newest whole one.
        dtype: of the matrices; norms and biases stay fp32, in which they are computed anyway.
        device: where the model shall live.

    Returns:
        The model in evaluation mode, and the tokenizer that it was trained with.

    Raises:
        UserError: there is no run, no whole checkpoint or no tokenizer, or they do not fit together.
    """
    path = Path(run_dir)
    config, checkpoint = open_run(path, step)
    for reason in checkpoint.skipped:
        warnings.warn(f"a newer checkpoint was passed over: {reason}", stacklevel=2)
    tokenizer = run_tokenizer(path, checkpoint.state.get("tokenizer"))
    longest = {"max_position_embeddings": config.max_positions}
    with torch.device("meta"):
        model = Transformer(config.model.model_copy(update=longest))
    model.to_empty(device=device)
    load_weights(checkpoint.path, {f"model.{k}": v for k, v in model.state_dict().items()})
    cast_matrices(model, dtype)
    return model.eval(), tokenizer


def cast_matrices(model: Transformer, dtype: torch.dtype, has_head: bool = True) -> None:
    """As in training: matrices of products take the dtype, tables that are only looked up stay fp32."""
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    if has_head:
        looked_up.discard(id(model.head_weight))
    for parameter in model.parameters():
        if parameter.dim() >= 2 and id(parameter) not in looked_up:
            parameter.data = parameter.data.to(dtype)


def open_run(path: Path, step: int | None) -> tuple[Config, Checkpoint]:
    """The configuration, and the checkpoint to read."""
    if (path / MANIFEST).is_file():
        problems = verify_checkpoint(path)
        if problems:
            raise UserError(f"{problems[0]}: choose another checkpoint")
        state = read_state(path)
        if step not in (None, state["step"]):
            raise UserError(f"{path} is the checkpoint of step {state['step']}: give the run's folder to choose a step")
        return check_values(state["config"], str(path)), Checkpoint(path, state["step"])
    if not (path / "config.yaml").is_file():
        raise UserError(
            f"{path} is not a run directory: it has no config.yaml; give one that `train` wrote, or make one of other "
            "weights with `castalia import`"
        )
    checkpoint = find_checkpoint(path / "checkpoints", step)
    if checkpoint is None:
        raise UserError(f"{path} has no checkpoint yet: wait for the first, or train further")
    return load([path / "config.yaml"]), checkpoint


def run_tokenizer(run: Path, trained_with: dict[str, Any] | None) -> Tokenizer:
    """The tokenizer kept in the run, held against the identity that the checkpoint remembers."""
    file = run / "tokenizer.json"
    if file.is_file():
        tokenizer = load_tokenizer(file)
    elif trained_with is not None and (kept := load_kept(trained_with)) is not None:
        tokenizer = kept
    else:
        raise UserError(
            f"{run} has no tokenizer.json: copy there the one that the run was trained with"
            + (f" (SHA-256 {trained_with['sha256']})" if trained_with and trained_with.get("sha256") else "")
        )
    if trained_with is not None and tokenizer.identity() != trained_with:
        raise UserError(
            f"{run}: tokenizer.json is not the one that the checkpoint was trained with "
            f"({tokenizer.identity()} here, {trained_with} there): put the right one in its place"
        )
    return tokenizer
