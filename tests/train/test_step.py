"""The training step updates exactly the trained parameters, by the right amount."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from decoders import batch_of, decoder, examples, weights

from prefix_jax.config import OptimConfig
from prefix_jax.mesh import make_mesh, place_rows, replicated, weight_shardings
from prefix_jax.methods.adapter import LlamaAdapter
from prefix_jax.methods.base import Method
from prefix_jax.methods.cartridge import Cartridge
from prefix_jax.methods.plus import PrefixTuningPlus
from prefix_jax.methods.prefix import PrefixTuning
from prefix_jax.methods.prompt import PromptTuning
from prefix_jax.methods.ptuning import PTuning
from prefix_jax.model import PrefixModel
from prefix_jax.train.optimizer import make_optimizer, make_schedule
from prefix_jax.train.partition import labels, merge, split
from prefix_jax.train.step import Step, TrainState, init_state, make_step

BACKBONE = decoder("llama")
PREFIX, PROMPT = PrefixTuning(4), PromptTuning(4)
EXAMPLES = examples(8)


@functools.cache
def one_device():
    return make_mesh(1, 1, 1, jax.devices()[:1])


def initial(method: Method | None) -> dict[str, Any]:
    params: dict[str, Any] = {"backbone": weights(BACKBONE)}
    if method is not None:
        params["prefix"] = method.init(jax.random.key(7), BACKBONE.geometry, None)
    return params


class Trainer:
    """Returns a jitted step and its inputs."""

    def __init__(self, method: Method | None, optimizer=None, mesh=None, **options):
        self.mesh = mesh or one_device()
        self.model = PrefixModel(BACKBONE, method)
        params = initial(method)
        placed = jax.device_put(
            params,
            {
                name: weight_shardings(part, self.mesh)
                if name == "backbone"
                else jax.tree.map(lambda _: replicated(self.mesh), part)
                for name, part in params.items()
            },
        )
        partition = labels(placed, full=method is None)
        self.train, self.frozen = split(placed, partition)
        # Plain gradient descent, so that the update is the gradient.
        transforms = {"train": optax.sgd(0.1), "freeze": optax.set_to_zero()}
        self.optimizer = optimizer or optax.multi_transform(transforms, partition)
        # The same shardings as the input, as in `make_program`.
        lies = jax.tree.map(lambda leaf: leaf.sharding, self.start())
        self.step: Step = jax.jit(
            make_step(self.model, self.optimizer, **options),
            donate_argnums=0,
            out_shardings=(lies, replicated(self.mesh)),
        )

    def start(self) -> TrainState:
        return init_state(self.train, self.frozen, self.optimizer, self.mesh)

    def run(self, batch, state: TrainState | None = None):
        with jax.set_mesh(self.mesh):
            placed = place_rows(batch, self.mesh, leading=1)
            return self.step(state or self.start(), self.frozen, placed)


def adamw(method: Method | None, **fields) -> optax.GradientTransformation:
    config = OptimConfig(**{"learning_rate": 0.05, "schedule": "constant", **fields})
    abstract = jax.eval_shape(lambda: initial(method))
    return make_optimizer(config, make_schedule(config, 100), labels(abstract, method is None))


@functools.cache
def adamw_trainer() -> Trainer:
    return Trainer(PREFIX, adamw(PREFIX, weight_decay=0.1))


@functools.cache
def sgd_trainer() -> Trainer:
    return Trainer(PREFIX)


@functools.cache
def sgd_step():
    """Returns the state and the metrics after one step on all examples."""
    return jax.tree.map(np.asarray, sgd_trainer().run(batch_of(EXAMPLES)))


def assert_close(tree, expected, rtol=1e-4, atol=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), tree, expected
    )


# Updates.


@pytest.mark.parametrize(
    "method",
    [
        PTuning(4, hidden=8),
        LlamaAdapter(4, layers=2),
        Cartridge(4, frozen=2),
        PrefixTuningPlus(layers=(1, 2)),
    ],
    ids=["ptuning", "adapter", "cartridge", "plus"],
)
def test_updates_all_trained_parameters_of_a_method_and_nothing_else(method):
    trainer = Trainer(method, adamw(method))
    before = jax.tree.map(np.asarray, trainer.train)
    frozen = jax.tree.map(np.asarray, trainer.frozen)
    state = None
    for _ in range(2):  # the first step opens gates, the second updates what they gate
        state, metrics = trainer.run(batch_of(EXAMPLES), state)
        assert metrics.finite
    moved = jax.tree.map(lambda old, new: bool((old != new).any()), before, state.train)
    assert all(jax.tree.leaves(moved))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.train)} == {jnp.dtype("float32")}
    jax.tree.map(np.testing.assert_array_equal, trainer.frozen, frozen)
    sinks = jax.tree.leaves(frozen["prefix"])
    assert len(sinks) == (2 if isinstance(method, Cartridge) else 0)


def test_reduces_the_loss_and_keeps_frozen_weights():
    trainer, batch = adamw_trainer(), batch_of(EXAMPLES)
    before = jax.tree.map(np.asarray, trainer.frozen)
    state, losses = None, []
    for _ in range(25):
        state, metrics = trainer.run(batch, state)
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 0.3
    assert int(state.step) == 25
    jax.tree.map(np.testing.assert_array_equal, trainer.frozen, before)
    assert jax.tree.leaves(state.train["backbone"]) == []


def test_step_equals_adamw():
    """Two steps in numpy: clipped gradient, bias-corrected moments, decoupled decay."""
    trainer, batch = adamw_trainer(), batch_of(EXAMPLES)
    micro = jax.tree.map(lambda leaf: leaf[0], batch)

    @jax.jit
    @jax.value_and_grad
    def mean_loss(prefix):
        params = merge({"backbone": trainer.train["backbone"], "prefix": prefix}, trainer.frozen)
        return trainer.model.loss(params, micro) / micro.weight_BM.sum()

    x = jax.tree.map(np.asarray, trainer.train["prefix"])
    m = v = jax.tree.map(np.zeros_like, x)
    state = None
    for step in (1, 2):
        state, metrics = trainer.run(batch, state)
        loss, grad = mean_loss(x)
        norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(grad)))
        np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
        np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-4)
        lengths = [float((leaf**2).sum()) for leaf in jax.tree.leaves(x)]
        np.testing.assert_allclose(metrics.param_norm, np.sqrt(sum(lengths)), rtol=1e-5)
        grad = jax.tree.map(lambda g, norm=norm: np.asarray(g) / max(norm, 1.0), grad)
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, grad)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, v, grad)

        def moved(x, m, v, step=step):
            rise = m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
            return x - 0.05 * (rise + 0.1 * x)

        x = jax.tree.map(moved, x, m, v)
        # The sign of a gradient near zero is arbitrary in float32.
        assert_close(state.train["prefix"], x, rtol=1e-3, atol=2e-3)


def test_metrics_count_targets_and_tokens():
    _, metrics = sgd_step()
    batch = batch_of(EXAMPLES)
    assert metrics.targets == sum(example.target_T.sum() for example in EXAMPLES)
    assert metrics.tokens == (batch.layout.segment_BT > 0).sum()
    assert metrics.tokens < batch.ids_BT.size
    assert metrics.finite == 1


@pytest.mark.parametrize("accumulate", [2, 4])
def test_step_does_not_depend_on_the_number_of_micro_batches(accumulate):
    batch = batch_of(EXAMPLES, accumulate)
    counts = batch.weight_BM.sum((1, 2))
    assert len(set(counts.tolist())) > 1, "micro-batches of equal target counts prove nothing"
    split_step = sgd_trainer().run(batch)
    state, metrics = sgd_step()
    assert_close(split_step[0], state)
    for name in ("loss", "targets", "grad_norm", "param_norm"):
        np.testing.assert_allclose(
            getattr(split_step[1], name), getattr(metrics, name), rtol=1e-4, err_msg=name
        )


def test_loss_is_a_mean_over_tokens_or_a_sum_per_example():
    state, metrics = sgd_step()
    by_example, its_metrics = Trainer(PREFIX, reduction="example").run(batch_of(EXAMPLES))
    targets_each = float(metrics.targets) / len(EXAMPLES)
    np.testing.assert_allclose(its_metrics.loss, metrics.loss * targets_each, rtol=1e-5)
    np.testing.assert_allclose(its_metrics.grad_norm, metrics.grad_norm * targets_each, rtol=1e-4)
    first = sgd_trainer().train["prefix"]
    assert_close(
        jax.tree.map(jnp.subtract, by_example.train["prefix"], first),
        jax.tree.map(lambda a, b: (a - b) * targets_each, state.train["prefix"], first),
    )


# Failures and donation.


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_loss_changes_nothing(value):
    trainer, batch = adamw_trainer(), batch_of(EXAMPLES)
    state, _ = trainer.run(batch)
    before = jax.tree.map(np.asarray, state)
    weight = batch.weight_BM.copy()
    weight[0, 0, 0] = value
    state, metrics = trainer.run(batch.replace(weight_BM=weight), state)
    assert float(metrics.finite) == 0
    jax.tree.map(np.testing.assert_array_equal, state, before)
    state, metrics = trainer.run(batch, state)
    assert (float(metrics.finite), int(state.step)) == (1, 2)


def test_step_consumes_its_state_but_not_the_initial_parameters():
    trainer, batch = adamw_trainer(), batch_of(EXAMPLES)
    first = trainer.start()
    second, _ = trainer.run(batch, first)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.train))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((trainer.train, trainer.frozen)))
    again, _ = trainer.run(batch, trainer.start())
    jax.tree.map(np.testing.assert_array_equal, again, second)


def test_optimizer_state_covers_only_the_trained_part():
    state = adamw_trainer().start()
    size = sum(leaf.size for leaf in jax.tree.leaves(state.train))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim) == 2 * size


# Dropout.


def test_dropout_depends_on_seed_and_step_and_is_off_outside_training():
    method, batch = PrefixTuning(4, dropout=0.5), batch_of(EXAMPLES)
    trainer, other = (Trainer(method, seed=seed) for seed in (0, 1))

    def loss(trainer: Trainer, step: int) -> float:
        state = trainer.start().replace(step=jnp.int32(step))
        return float(trainer.run(batch, state)[1].loss)

    assert loss(trainer, 0) == loss(trainer, 0)
    assert len({loss(trainer, 0), loss(trainer, 1), loss(other, 0)}) == 3
    micro = jax.tree.map(lambda leaf: leaf[0], batch)
    params = merge(trainer.train, trainer.frozen)
    bare = sgd_step()[1]
    np.testing.assert_allclose(
        jax.jit(trainer.model.loss)(params, micro) / bare.targets, bare.loss, rtol=1e-5
    )


# Several devices.


# 4 devices share the columns, or 2 do and each pair splits the layers.
MESHES = [
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 1, "fsdp": 2, "sequence": 4},
    {"data": 2, "sequence": 2, "tensor": 2},
]


@pytest.mark.parametrize("method", [PREFIX, PROMPT, None], ids=["prefix", "prompt", "full"])
@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "-".join(sizes))
def test_eight_devices_equal_one(method, sizes, compiler_warnings):
    batch = batch_of(EXAMPLES, rows_multiple=4)
    single = Trainer(method) if method is not PREFIX else sgd_trainer()
    meshed = Trainer(method, mesh=make_mesh(**sizes))
    (state, metrics), (expected, expected_metrics) = meshed.run(batch), single.run(batch)
    assert_close(state, expected)
    assert_close(metrics, expected_metrics)
    # XLA warns if it copies the activations of the whole batch to every device.
    assert "Involuntary full rematerialization" not in compiler_warnings()


def test_moments_are_sharded_like_their_parameters():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    state = Trainer(None, adamw(None), mesh).start()
    (adam,) = (
        part
        for part in jax.tree.leaves(
            state.optimizer, is_leaf=lambda part: isinstance(part, optax.ScaleByAdamState)
        )
        if isinstance(part, optax.ScaleByAdamState)
    )
    for moment in (adam.mu, adam.nu):
        for moment_leaf, leaf in zip(*map(jax.tree.leaves, (moment, state.train)), strict=True):
            assert moment_leaf.sharding.is_equivalent_to(leaf.sharding, moment_leaf.ndim)
    assert not adam.mu["backbone"]["embed"]["tokens_VD"].sharding.is_fully_replicated


def test_full_fine_tuning_updates_every_weight():
    trainer = Trainer(None)
    assert jax.tree.leaves(trainer.frozen) == []
    state, metrics = trainer.run(batch_of(EXAMPLES))
    micro = jax.tree.map(lambda leaf: leaf[0], batch_of(EXAMPLES))
    grads = jax.jit(jax.grad(lambda params: trainer.model.loss(params, micro)))(trainer.train)
    expected = jax.tree.map(lambda x, g: x - 0.1 * g / metrics.targets, trainer.train, grads)
    assert_close(state.train, expected)
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(grads))
