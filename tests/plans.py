"""Helpers for tests of plans: a small model, and a formula that replaces the compiler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefix_jax import config as configs
from prefix_jax.plan.abstract import AbstractRun, BatchShape
from prefix_jax.plan.plan import Memory, Plan
from prefix_jax.plan.roofline import Exchange, Roofline
from prefix_jax.plan.topology import GIB, Topology

TINY = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 128,
}
SINGLE = {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}


def config_of(path: Path | str, *overrides: str) -> configs.Config:
    values = {
        "model": {"path": str(path)},
        "data": {"target": "{text}", "max_length": 16},
        "method": {"name": "prefix", "length": 4},
        "train": {"steps": 1},
        "output_dir": "plan",
    }
    return configs.parse(values, overrides)


def formula(
    needs: Callable[[BatchShape, Any], float], seconds: Callable[[Any], float] = lambda _: 1.0
):
    """Returns a replacement for `compile_step`, and the list of plans that it makes."""
    seen: list[Plan] = []

    def compile_step(run: AbstractRun, shape: BatchShape, topology: Topology, mesh: Any) -> Plan:
        total, limit = int(needs(shape, mesh.shape) * GIB), 16 * GIB
        fits = total <= limit
        times = seconds(mesh.shape)
        exchanges = {"all-reduce": Exchange(1, 1, 0.0)}
        plan = Plan(
            model="model",
            method="prefix",
            quantize="none",
            topology=str(topology),
            chips=topology.chips,
            devices=mesh.size,
            mesh=dict(mesh.shape),
            job="train",
            batch=shape,
            needs=total,
            limit=limit,
            memory=Memory(0, 0, 0, total, limit) if fits else None,
            floor=None,
            roofline=Roofline(1, 1, exchanges, times, 0.0, 0.0, times) if fits else None,
            compile_seconds=0.0,
        )
        seen.append(plan)
        return plan

    return compile_step, seen
