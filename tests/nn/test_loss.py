"""The chunked losses match plain cross-entropy, in values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax.nn import loss as losses
from prefix_jax.nn import vocabulary

B, M, D, V = 3, 7, 5, 11


def unembed(params: jax.Array, h_BTD: jax.Array) -> jax.Array:
    return h_BTD.astype(jnp.float32) @ params


@pytest.fixture
def arrays() -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.normal(keys[0], (D, V)),
        jax.random.normal(keys[1], (B, M, D)),
        jax.random.randint(keys[2], (B, M), 0, V),
        jax.random.uniform(keys[3], (B, M)).at[0, 2].set(0.0).at[2].set(0.0),
    )


def plain(params, h_BMD, label_BM, weight_BM):
    logp_BMV = jax.nn.log_softmax(unembed(params, h_BMD))
    picked_BM = (logp_BMV * jax.nn.one_hot(label_BM, V)).sum(-1)
    return -(picked_BM * weight_BM).sum()


# With 2 targets per chunk the last chunk is half empty; 1 is the minimum; 99 is one chunk.
@pytest.fixture(params=[1, 2 * B, 99 * B], ids=["single", "ragged", "whole"])
def chunked(request, monkeypatch):
    monkeypatch.setattr(vocabulary, "chunk_targets", lambda: request.param)


@pytest.mark.usefixtures("chunked")
def test_frozen_head_gives_exact_gradients_of_hidden_states(arrays):
    value, grad = jax.value_and_grad(losses.frozen_head_loss, argnums=2)(unembed, *arrays)
    expected, expected_grad = jax.value_and_grad(plain, argnums=1)(*arrays)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-6)
    assert (grad[2] == 0).all()
    assert (grad[0, 2] == 0).all()


@pytest.mark.usefixtures("chunked")
def test_training_head_has_a_gradient(arrays):
    value, grads = jax.value_and_grad(losses.training_head_loss, argnums=(1, 2))(unembed, *arrays)
    expected, expected_grads = jax.value_and_grad(plain, argnums=(0, 1))(*arrays)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("chunked")
def test_row_losses_are_independent_of_other_rows(arrays):
    params, *rows = arrays
    loss_B = losses.row_losses(unembed, params, *rows)
    expected = [plain(params, *(x[row] for x in rows)) for row in range(B)]
    np.testing.assert_allclose(loss_B, expected, rtol=1e-5)
    assert loss_B[2] == 0


def test_frozen_head_gradient_scales_with_the_cotangent(arrays):
    params, h_BMD, *targets = arrays

    def value(h_BMD):
        return losses.frozen_head_loss(unembed, params, h_BMD, *targets)

    tripled = jax.grad(lambda h: 3 * value(h))(h_BMD)
    np.testing.assert_allclose(tripled, 3 * jax.grad(value)(h_BMD), rtol=1e-5)


def test_frozen_head_has_no_gradient(arrays):
    assert (jax.grad(losses.frozen_head_loss, argnums=1)(unembed, *arrays) == 0).all()


def test_bfloat16_hidden_states_have_bfloat16_gradients(arrays):
    params, h_BMD, *targets = arrays
    grad = jax.grad(losses.frozen_head_loss, argnums=2)(
        unembed, params, h_BMD.astype(jnp.bfloat16), *targets
    )
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        grad.astype(jnp.float32), jax.grad(plain, argnums=1)(*arrays), atol=0.02
    )


def test_gradients_of_targets_in_the_same_column_add_up():
    h_BTD = jax.random.normal(jax.random.key(0), (1, 3, D))
    index_BM = jnp.array([[1, 1, 2]])
    gathered = losses.gather_targets(h_BTD, index_BM)
    np.testing.assert_array_equal(gathered[0], h_BTD[0, jnp.array([1, 1, 2])])
    grad = jax.grad(lambda h: losses.gather_targets(h, index_BM).sum())(h_BTD)
    np.testing.assert_array_equal(grad[0, :, 0], [0, 2, 1])


def test_extreme_logits_give_finite_losses():
    logits = jnp.array([[[1e4, 0.0], [0.0, 1e4]]])
    loss_BM = losses.token_losses(logits, jnp.array([[0, 0]]))
    np.testing.assert_allclose(loss_BM, [[0.0, 1e4]])


# Candidates of one question.


@pytest.mark.parametrize("answers", [1, 2])
def test_candidate_loss_is_a_softmax_within_each_question(answers):
    """Independent of the rest of the row, including padding."""
    logits_BMY = jax.random.normal(jax.random.key(0), (2, 7, answers)) * 3
    question_BM = jnp.array([[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 0]])
    weight_BM = jnp.array([[1, 0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]], jnp.float32)
    right = {(0, 1): [2, 0], (0, 2): [3, 4], (1, 1): [5, 1]}
    label_BM = np.zeros((2, 7), np.int32)
    for (row, _), columns in right.items():
        for answer in range(answers):
            label_BM[row, columns[answer]] |= 1 << answer

    def plain(logits_BMY):
        total = 0.0
        for (row, question), columns in right.items():
            members = jnp.flatnonzero(question_BM[row] == question)
            for answer in range(answers):
                log_p = jax.nn.log_softmax(logits_BMY[row, members, answer])
                total -= log_p[columns[answer] - int(members[0])] / answers
        return total

    def ours(logits_BMY):
        actual = losses.candidate_losses(logits_BMY, jnp.array(label_BM), weight_BM, question_BM)
        return actual.sum()

    expected, actual = jax.value_and_grad(plain)(logits_BMY), jax.value_and_grad(ours)(logits_BMY)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), actual, expected)
    large = losses.candidate_losses(1e4 * logits_BMY, jnp.array(label_BM), weight_BM, question_BM)
    assert np.isfinite(large).all()
