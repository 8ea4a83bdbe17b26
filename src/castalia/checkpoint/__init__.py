"""Checkpoints: state dicts on disk, whole or not at all. Knows tensors by name, not models.

save    tensors + state -> step-N/, atomically, with a manifest of hashes
load    the newest whole one -> tensors in place
lock    one process trains in a run's folder
background  a copy of the tensors, and a thread that saves it
mirror  whole checkpoints <-> a URL
"""

from castalia.checkpoint.background import Background
from castalia.checkpoint.layout import step_name, verify_checkpoint
from castalia.checkpoint.load import (
    Checkpoint,
    find_checkpoint,
    load_checkpoint,
    load_weights,
    read_state,
    tensor_shapes,
)
from castalia.checkpoint.lock import RunLock
from castalia.checkpoint.mirror import Mirror, MirrorFailed
from castalia.checkpoint.save import CheckpointNotSaved, save_checkpoint
from castalia.checkpoint.tensors import Piece

__all__ = [
    "Background",
    "Checkpoint",
    "CheckpointNotSaved",
    "Mirror",
    "MirrorFailed",
    "Piece",
    "RunLock",
    "find_checkpoint",
    "load_checkpoint",
    "load_weights",
    "read_state",
    "save_checkpoint",
    "step_name",
    "tensor_shapes",
    "verify_checkpoint",
]
