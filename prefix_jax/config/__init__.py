"""Typed configuration: what there is to set (`schema`, `examples`, `results`), and how it is read
and written (`text`)."""

from prefix_jax.config.examples import DataConfig, TaskConfig, TaskName
from prefix_jax.config.results import METRICS_OF, DecodeConfig, EvaluateConfig, check_metrics
from prefix_jax.config.schema import (
    Config,
    GenerateConfig,
    InitConfig,
    MeasureConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from prefix_jax.config.text import dump, load, parse, sections

__all__ = [
    "METRICS_OF",
    "Config",
    "DataConfig",
    "DecodeConfig",
    "EvaluateConfig",
    "GenerateConfig",
    "InitConfig",
    "MeasureConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "TaskConfig",
    "TaskName",
    "TrainConfig",
    "check_metrics",
    "dump",
    "load",
    "parse",
    "sections",
]
