"""The configuration: what a run is, checked and explained, without importing torch."""

from castalia.config.load import load, notes, origins, remarks
from castalia.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    LossConfig,
    OptimizerConfig,
    PerformanceConfig,
    ScheduleConfig,
    StartConfig,
    TokenizerConfig,
    TrainingConfig,
)
from castalia.config.schema_model import ModelConfig
from castalia.config.section import Section

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "LoggingConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PerformanceConfig",
    "ScheduleConfig",
    "Section",
    "StartConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "load",
    "notes",
    "origins",
    "remarks",
]
