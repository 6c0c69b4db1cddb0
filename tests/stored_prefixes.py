"""Small prefixes and heads of every kind with their cards, and edits of stored ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax.artifact import BackboneCard, Card, TokenizerCard, make_card, store
from prefix_jax.artifact.arrays import to_arrays
from prefix_jax.nn.head import Head
from prefix_jax.prefix import Embeds, Geometry, Hidden, KVPrefix, Prefix, Produced, Site, SiteShape

GEOMETRY = Geometry(d_model=32, vocab=96, decoder=SiteShape(3, 4, 2, 8))
BACKBONE = BackboneCard(source="some/model", model_type="llama", fingerprint="f00", dtype="float32")
CONTAINERS = ["orbax", "safetensors"]


def random(*shape: int, seed: int = 0) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def keys_values(length: int = 5, seed: int = 0, **fields: Any) -> Prefix:
    k_LPKH, v_LPKH = random(2, 3, length, 2, 8, seed=seed)
    return Prefix(Site(KVPrefix(k_LPKH, v_LPKH)), **{"text_position": length} | fields)


def with_absent_slots() -> Prefix:
    bias_LPN = random(3, 5, 4).at[1, 2].set(-jnp.inf)
    return Prefix(Site(KVPrefix(random(3, 5, 2, 8), random(3, 5, 2, 8), bias_LPN)), text_position=5)


PREFIXES: dict[str, Produced] = {
    "embeds": Embeds(random(5, 32)),
    "hidden": Hidden(random(3, 5, 32)),
    "kv": keys_values(),
    "kv without a shift": keys_values(text_position=0),
    "kv pinned": keys_values(pinned=True),
    "kv with a bias": with_absent_slots(),
}


def card_of(produced: Produced) -> Card:
    return make_card(
        produced,
        GEOMETRY,
        BACKBONE,
        method={"name": "prefix", "length": 5, "mid_dim": None, "dropout": 0.1},
        init="text: the café",
        steps=300,
        task={"name": "text", "input": "{name} →", "target": " {text}"},
        tokenizer=TokenizerCard.of("GPT2Tokenizer", {"a": 0, "b": 1}),
        metrics={"loss": 1.25},
    )


HEAD = {"out_DY": random(32, 2), "out_bias_Y": random(2)}
TASK = {"name": "classify", "labels": ["no", "yes"]}
LAYERS = Head(2)
in_both_containers = pytest.mark.parametrize("stored", CONTAINERS, indirect=True)


def files(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def array_files(path: Path) -> list[Path]:
    """The files with array data; Orbax stores small arrays twice."""
    return [
        file for file in path.rglob("*") if file.parent.name == "d" or file.suffix == ".safetensors"
    ]


def assert_equal(a: Produced, b: Produced) -> None:
    arrays_a, arrays_b = to_arrays(a), to_arrays(b)
    assert arrays_a.keys() == arrays_b.keys()
    assert all(np.array_equal(arrays_a[name], arrays_b[name]) for name in arrays_a)


def edit_card(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads((path / "prefix.json").read_text())
    change(fields)
    (path / "prefix.json").write_text(json.dumps(fields))


def sign(path: Path) -> None:
    """Adds a valid digest to an edited card."""
    edit_card(path, lambda card: card.update(sha256=store._digest(card)))
