"""Optimizers, parameter groups, schedules, and the stores that hold the weights."""

from castalia.optim.optimizers import OPTIMIZERS, OptimizerKind
from castalia.optim.schedule import SCHEDULES, learning_rate
from castalia.optim.weights import ArenaStore, PlainStore, WeightStore, make_store

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "ArenaStore",
    "OptimizerKind",
    "PlainStore",
    "WeightStore",
    "learning_rate",
    "make_store",
]
