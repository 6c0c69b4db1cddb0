"""Typed configuration: one dataclass per section (`schema`), read and written as YAML (`yaml`)."""

from prefix_jax.config.data import DataConfig
from prefix_jax.config.decode import DecodeConfig
from prefix_jax.config.evaluate import EvaluateConfig
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
from prefix_jax.config.task import TaskConfig
from prefix_jax.config.yaml import dump, load, parse, sections

__all__ = [
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
    "TrainConfig",
    "dump",
    "load",
    "parse",
    "sections",
]
