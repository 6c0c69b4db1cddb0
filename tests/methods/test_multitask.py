"""Multitask prompt tuning: a shared prompt times a low-rank one."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from prefix_jax.errors import ConfigError, PrefixError
from prefix_jax.methods.base import normal
from prefix_jax.methods.multitask import MultitaskPromptTuning
from prefix_jax.prefix import Embeds, Geometry, SiteShape

G = Geometry(d_model=12, vocab=50, decoder=SiteShape(2, 4, 2, 8))
P, R, TASKS, KEY = 5, 2, 3, jax.random.key(0)
RNG = np.random.default_rng(0)
ARRAYS = {
    "prompt_embeddings": RNG.normal(size=(P, 12)).astype(np.float32),
    "prefix_task_cols": RNG.normal(size=(TASKS, P, R)).astype(np.float32),
    "prefix_task_rows": RNG.normal(size=(TASKS, R, 12)).astype(np.float32),
}


@pytest.fixture
def source(tmp_path: Path) -> str:
    save_file(ARRAYS, tmp_path / "adapter_model.safetensors")
    return str(tmp_path)


def produced(source: str, **fields) -> np.ndarray:
    method = MultitaskPromptTuning(P, ranks=R, source=source, **fields)
    return np.asarray(method(method.init(KEY, G, None)).x_PD)


def test_exact_copies_a_source_task(source):
    shared, cols, rows = ARRAYS.values()
    for task in range(TASKS):
        expected = shared * (cols[task] @ rows[task])
        x_PD = produced(source, source_init="exact", source_task=task)
        np.testing.assert_allclose(x_PD, expected, rtol=1e-5, atol=1e-6)


def test_average_means_cols_and_rows_separately(source):
    shared, cols, rows = ARRAYS.values()
    expected = shared * (cols.mean(0) @ rows.mean(0))
    np.testing.assert_allclose(produced(source), expected, rtol=1e-5, atol=1e-6)


def test_shared_draws_the_task_part_at_random(source):
    method = MultitaskPromptTuning(P, ranks=R, source=source, source_init="shared")
    params = method.init(KEY, G, None)
    np.testing.assert_array_equal(params["shared_PD"], ARRAYS["prompt_embeddings"])
    assert 0.01 < float(params["cols_PR"].std()) < 0.04


def test_source_may_be_a_file(source):
    file = f"{source}/adapter_model.safetensors"
    np.testing.assert_array_equal(produced(file), produced(source))


def test_every_parameter_receives_a_gradient_after_a_start():
    method = MultitaskPromptTuning(P, ranks=R)
    params = method.init(KEY, G, normal(Embeds, G, P, KEY, std=1.0))
    grads = jax.grad(lambda params: jnp.sum(method(params).x_PD ** 2))(params)
    # The rows of ranks with zero columns receive no gradient until these columns change.
    assert grads["cols_PR"].all()
    assert grads["shared_PD"].all()
    assert grads["rows_RD"][0].all()


def test_rejects_invalid_sources(source, tmp_path):
    with pytest.raises(PrefixError, match=r"nowhere: no such file"):
        produced("nowhere")
    (tmp_path / "text.safetensors").write_text("no arrays at all")
    with pytest.raises(PrefixError, match=r"text.safetensors is truncated or corrupt"):
        produced(str(tmp_path / "text.safetensors"))
    save_file({"prompt_embeddings": ARRAYS["prompt_embeddings"]}, tmp_path / "one.safetensors")
    with pytest.raises(
        PrefixError, match="not a multitask prompt: prefix_task_cols, prefix_task_row"
    ):
        produced(str(tmp_path / "one.safetensors"))
    save_file(
        ARRAYS | {"prefix_task_cols": np.array(1, np.float32)}, tmp_path / "scalar.safetensors"
    )
    with pytest.raises(PrefixError, match=r"have shapes .* \(\) and .*; expected \(P, D\)"):
        produced(str(tmp_path / "scalar.safetensors"))
    broken = {name: x * np.nan for name, x in ARRAYS.items()}
    save_file(broken, tmp_path / "nan.safetensors")
    with pytest.raises(PrefixError, match="NaN or infinite values"):
        produced(str(tmp_path / "nan.safetensors"))
    with pytest.raises(PrefixError, match=r"expected \(\(4, 12\), .* for 4 slots of"):
        MultitaskPromptTuning(4, ranks=R, source=source).init(KEY, G, None)
    with pytest.raises(ConfigError, match=r"source_task is 3; .* has tasks 0 to 2"):
        produced(source, source_init="exact", source_task=3)


def test_rejects_a_source_together_with_another_start(source):
    method = MultitaskPromptTuning(P, ranks=R, source=source)
    with pytest.raises(ConfigError, match=r"remove init\.start"):
        method.init(KEY, G, normal(Embeds, G, P, KEY, std=1.0))
