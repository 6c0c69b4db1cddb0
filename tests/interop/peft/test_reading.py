"""Imported adapters compute the same as in PEFT."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from adapters import ADAPTERS, NAMES, WEIGHTS, T, imported
from safetensors.numpy import load_file

import prefix_jax as pj
from prefix_jax.errors import PrefixError
from prefix_jax.interop.peft import tasks_of
from prefix_jax.nn.attention.mask import TokenLayout
from prefix_jax.prefix import (
    Produced,
)


def answers(tuned: pj.Tuned, h_BTD: jax.Array) -> jax.Array:
    """Computes an adapter's head outputs for a text and any soft tokens before it.

    Returns [2, T, Y], or [2, Y] for the whole text.
    """
    head, model = tuned.card.head, tuned.pretrained
    soft = h_BTD.shape[1] - T
    if isinstance(tuned.task, pj.Classify):
        first = 0 if head.soft else soft
        h_BTD = h_BTD[:, -1 if model.backbone.arch.causal else first]
    else:
        h_BTD = h_BTD[:, soft:]
    if head.pooled:
        h_BTD = model.backbone.pool(model.params, h_BTD)
    return head(tuned.head, h_BTD)


@functools.partial(jax.jit, static_argnums=(0, 4))
def outputs(
    model: Any, params: Any, produced: Produced | None, given: Any, states: bool
) -> jax.Array:
    """Returns logits or states of the text and any soft tokens before an encoder: [2, T, …]."""
    prefix = model.lift(params, produced)
    tokens = TokenLayout.plain(jnp.ones(given["ids"].shape, bool))
    encoded, ids = None, given["ids"]
    if "decoder_ids" in given:
        encoded, ids = model.encode(params, ids, tokens, prefix), given["decoder_ids"]
    h_BTD, _ = model.hidden(params, ids, tokens, prefix, encoded=encoded)
    return h_BTD if states else model.unembed(params, h_BTD)


@pytest.mark.parametrize("name", NAMES)
def test_imported_adapter_computes_the_same_as_in_peft(name: str) -> None:
    tuned = imported(ADAPTERS / name, task=1 if name == "multitask" else None)
    stored = np.load(ADAPTERS / name / "expected.npz")
    given = {key: x for key, x in stored.items() if key != "expected"}
    model = tuned.pretrained
    states = tuned.head is not None or not model.backbone.arch.causal
    ours = outputs(model.backbone, model.params, tuned.produced, given, states)
    ours = ours[:, -T:] if tuned.head is None else answers(tuned, ours)
    np.testing.assert_allclose(ours, stored["expected"], rtol=0, atol=1e-5)
    bare = outputs(model.backbone, model.params, None, given, states)
    bare = bare if tuned.head is None else answers(tuned, bare)
    assert np.max(np.abs(bare - stored["expected"])) > 0.05


def test_multitask_prompt_has_one_prefix_per_task(tmp_path: Path) -> None:
    folder = ADAPTERS / "multitask"
    assert tasks_of(folder) == 3
    assert tasks_of(ADAPTERS / "prompt") is None
    arrays = load_file(folder / WEIGHTS)
    for task in range(3):
        product = arrays["prefix_task_cols"][task] @ arrays["prefix_task_rows"][task]
        produced = imported(folder, task).produced
        np.testing.assert_array_equal(produced.x_PD, arrays["prompt_embeddings"] * product)
    with pytest.raises(PrefixError, match=r"tasks 0 to 2; choose one"):
        imported(folder)
    with pytest.raises(PrefixError, match=r"tasks 0 to 2, not task 3; choose one"):
        imported(folder, 3)
    with pytest.raises(PrefixError, match="PROMPT_TUNING, which has no tasks"):
        imported(ADAPTERS / "prompt", 0)


def test_bfloat16_is_widened(copy: Callable[..., Path]) -> None:
    folder = copy("prompt")
    x = load_file(folder / WEIGHTS)["prompt_embeddings"]
    header = json.dumps(
        {"prompt_embeddings": {"dtype": "BF16", "shape": x.shape, "data_offsets": [0, 2 * x.size]}}
    ).encode()
    content = len(header).to_bytes(8, "little") + header + x.astype(ml_dtypes.bfloat16).tobytes()
    (folder / WEIGHTS).write_bytes(content)
    produced = imported(folder).produced
    assert produced.x_PD.dtype == np.float32
    np.testing.assert_array_equal(produced.x_PD, x.astype(ml_dtypes.bfloat16).astype("f4"))
