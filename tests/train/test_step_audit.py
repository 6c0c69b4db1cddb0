"""The compiled step avoids the work and memory that a frozen backbone does not need.

The steps are those of `benchmarks/step_audit.py`. Each check is shown to fail on a step that breaks
its rule.
"""

import dataclasses
import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from prefix_jax.data.batch import Batch
from prefix_jax.model import PrefixModel
from prefix_jax.plan.audit import Audit, audit
from prefix_jax.train.partition import merge
from prefix_jax.train.step import TrainState, make_step

pytestmark = pytest.mark.usefixtures("full_compilation")


def _benchmark() -> ModuleType:
    script = Path(__file__).parents[2] / "benchmarks" / "step_audit.py"
    spec = importlib.util.spec_from_file_location("step_audit", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module here
    spec.loader.exec_module(module)
    return module


step_audit = _benchmark()
compile_step = functools.cache(step_audit.compile_step)
LIMIT = 1.05


def ratio(case: Any, result: Audit) -> float:
    return result.flops / step_audit.floor_of(case)


@pytest.mark.parametrize(
    "case",
    [
        step_audit.TINY,
        dataclasses.replace(step_audit.TINY, method="hidden"),
        dataclasses.replace(step_audit.TINY, method="prompt"),
        dataclasses.replace(step_audit.TINY, method="adapter"),
        dataclasses.replace(step_audit.TINY, method="plus"),
        step_audit.TINY_T5,
        dataclasses.replace(step_audit.TINY_T5, method="prompt"),
        step_audit.SMOLLM2,
        dataclasses.replace(
            step_audit.SMOLLM2, targets=300
        ),  # not a multiple of the chunks of the loss
        step_audit.LLAMA,
    ],
    ids=lambda case: f"{case.model}-{case.method}-{case.targets}",
)
def test_step_computes_and_stores_no_more_than_necessary(case: Any) -> None:
    result = audit(*compile_step(case))
    assert result.opaque == ()
    assert 1 <= ratio(case, result) <= LIMIT
    assert result.weight_gradients == ()
    assert result.weight_copies == ()
    assert result.optimizer_elements == 2 * result.train_elements
    assert result.train_elements < result.backbone_bytes / 100


def test_memory_beyond_the_backbone_is_proportional_to_the_tokens() -> None:
    few = dataclasses.replace(step_audit.SMOLLM2, tokens=40, targets=24)
    result = audit(*compile_step(few))
    assert result.temp_bytes < result.backbone_bytes / 10
    assert ratio(few, result) <= LIMIT


def test_detects_a_norm_over_all_gradients() -> None:
    def make(model: PrefixModel, optimizer: optax.GradientTransformation) -> Any:
        def step(state: TrainState, frozen: Any, micro: Batch) -> tuple[TrainState, jax.Array]:
            batch = jax.tree.map(lambda leaf: leaf[0], micro)
            params = merge(state.train, frozen)
            grads = jax.grad(lambda params: trained_head_loss(model, params, batch))(params)
            scale = 1 / jnp.maximum(optax.global_norm(grads), 1)
            train = jax.tree.map(
                lambda leaf, grad: leaf - scale * grad, state.train["prefix"], grads["prefix"]
            )
            return dataclasses.replace(state, train={**state.train, "prefix": train}), scale

        return step

    result = audit(*compile_step(step_audit.TINY, make))
    assert ratio(step_audit.TINY, result) > 1.3
    # Seven matrices per layer, and the head.
    assert sum(product.count for product in result.weight_gradients) == 7 * 4 + 1
    assert result.weight_copies != ()


def trained_head_loss(model: PrefixModel, params: Any, batch: Batch) -> jax.Array:
    """A naive loss, with a gradient for every parameter."""
    h_BTD, _ = model.backbone.hidden(
        params["backbone"], batch.ids_BT, batch.layout, model.prefix(params)
    )
    h_BMD = jnp.take_along_axis(h_BTD, batch.index_BM[..., None], axis=1)
    logits_BMV = model.backbone.unembed(params["backbone"], h_BMD)
    losses_BM = optax.softmax_cross_entropy_with_integer_labels(logits_BMV, batch.label_BM)
    return jnp.sum(losses_BM * batch.weight_BM)


def test_detects_a_copy_of_the_backbone() -> None:
    def make(model: PrefixModel, optimizer: optax.GradientTransformation) -> Any:
        step = make_step(model, optimizer)

        def noisy(state: TrainState, frozen: Any, micro: Batch) -> Any:
            return step(state, jax.tree.map(lambda leaf: 1.001 * leaf, frozen), micro)

        return noisy

    result = audit(*compile_step(step_audit.TINY, make))
    assert result.weight_gradients == ()
    assert result.weight_copies != ()


def test_detects_an_optimizer_of_all_parameters() -> None:
    compiled, backbone, state = compile_step(step_audit.TINY)
    whole = {"backbone": backbone, "prefix": state.train["prefix"]}
    state = dataclasses.replace(state, optimizer=jax.eval_shape(optax.adam(1e-3).init, whole))
    result = audit(compiled, backbone, state)
    assert result.optimizer_elements > 2 * result.train_elements
