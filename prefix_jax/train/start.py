"""What a prefix is before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prefix_jax import artifact
from prefix_jax.backbones.load import Pretrained
from prefix_jax.backbones.stack import Params
from prefix_jax.config import InitConfig
from prefix_jax.data.batch import Example
from prefix_jax.errors import ConfigError, PrefixError
from prefix_jax.methods.base import Method, normal, zeros
from prefix_jax.model import start_from_ids
from prefix_jax.prefix import Prefix, Produced


def init_prefix(
    method: Method[Any],
    config: InitConfig,
    pretrained: Pretrained,
    examples: Sequence[Example],
    seed: int,
) -> Params:
    """The method's parameters before the first step, float32.

    Args:
        method: what trains.
        config: what it starts as.
        pretrained: the frozen model.
        examples: training examples; the first tokens of them are the default text.
        seed: of what is random.

    Raises:
        PrefixError: the stored prefix to start from is of another kind, length or backbone.
    """
    start_rng, method_rng = jax.random.split(jax.random.key(seed))
    start = make_start(method, config, pretrained, examples, start_rng)
    return method.init(method_rng, pretrained.backbone.geometry, start)


def make_start(
    method: Method[Any],
    config: InitConfig,
    pretrained: Pretrained,
    examples: Sequence[Example],
    rng: jax.Array,
) -> Produced | None:
    """What the method is to produce at first; None leaves it to the method's own randomness."""
    geometry, kind, P = pretrained.backbone.geometry, method.produces, method.length
    if config.start == "random":
        return None
    if config.start == "zeros":
        return zeros(kind, geometry, P)
    if config.start == "normal":
        return normal(kind, geometry, P, rng, config.std)
    if config.start == "prefix":
        return _stored(config.path, method, pretrained)
    if config.start == "vocab":
        ids = np.asarray(jax.random.randint(rng, (P,), 0, geometry.vocab, jnp.int32))
    else:
        ids = _text_ids(config.text, pretrained, examples, P)
    return start_from_ids(pretrained.backbone, pretrained.params, kind, ids, P)


def _text_ids(
    text: str | None, pretrained: Pretrained, examples: Sequence[Example], length: int
) -> np.ndarray:
    """The tokens of a text, or the first ones of the training examples as they are rendered."""
    if text is not None:
        ids = pretrained.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ConfigError(f"init.text {text!r} has no tokens")
        return np.asarray(ids, np.int32)
    return np.concatenate([example.ids_T for example in examples[:length]])


def _stored(path: str | None, method: Method[Any], pretrained: Pretrained) -> Produced:
    assert path is not None  # as InitConfig checks
    produced, card = artifact.load(path)
    artifact.check(card, pretrained.backbone.geometry, pretrained.fingerprint)
    expected = jax.eval_shape(
        lambda rng: method(method.init(rng, pretrained.backbone.geometry, None)),
        jax.random.key(0),
    )
    if artifact.facts(produced) != artifact.facts(expected):
        raise PrefixError(
            f"{path} holds a prefix of {_describe(produced)}; the method trains one of "
            f"{_describe(expected)}: let its fields agree with what is stored"
        )
    if len(jax.tree.leaves(produced)) != len(jax.tree.leaves(expected)):
        raise PrefixError(f"{path} holds a prefix with other parts than the method trains")
    return produced


def _describe(produced: Produced) -> str:
    known = artifact.facts(produced)
    described = f"kind {known.kind!r}, length {known.length}, offset {known.offset}"
    if isinstance(produced, Prefix):
        described += f", sites {', '.join(produced.sites)}"
    if known.layers:
        described += f", layers {known.layers}"
    return described + (", pinned" if known.pinned else "")
