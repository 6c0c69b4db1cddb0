"""Typed configuration: what there is to set (`schema`), and how it is read and written (`text`)."""

from prefix_jax.config.schema import (
    Config,
    DataConfig,
    DecodeConfig,
    EvaluateConfig,
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
    "TrainConfig",
    "dump",
    "load",
    "parse",
    "sections",
]
