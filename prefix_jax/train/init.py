"""What a prefix is before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prefix_jax import artifact
from prefix_jax.backbones.loading.pretrained import Pretrained
from prefix_jax.backbones.stacking import Params
from prefix_jax.config import InitConfig
from prefix_jax.data.batch import Example
from prefix_jax.errors import ConfigError, PrefixError
from prefix_jax.methods.base import Method, normal_like
from prefix_jax.model import start_from_ids
from prefix_jax.prefix import Adapter, Embeds, Prefix, Produced
from prefix_jax.untrusted.paths import read_text
from prefix_jax.untrusted.tokenizer import token_ids


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
        ConfigError: the method cannot start so.
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
    """What the method is to produce at first; None leaves it to the method's own randomness.

    Raises:
        ConfigError: the method cannot start so.
    """
    backbone, kind, P = pretrained.backbone, method.produces, method.length
    start = start_of(method, config)
    if start == "random":
        return None
    if start == "zeros":
        if kind is Adapter:
            raise ConfigError(
                "init.start: zeros would leave an adapter without gradients, since its gates are "
                "zero already; take random, normal or text"
            )
        return method.blank(backbone.geometry)
    if start == "normal":
        return normal_like(method.blank(backbone.geometry), rng, config.std)
    if start == "prefix":
        return _stored(config.path, method, pretrained)
    if not method.slots:
        raise ConfigError(
            f"init.start: {start} fills slots, and this method has none; take random (its own "
            "start), zeros, normal or prefix"
        )
    if start == "labels":
        return _labels(config, method, pretrained, rng)
    if start == "vocab":
        ids = _drawn_ids(config.top, backbone.geometry.vocab, rng, P)
    else:
        ids = _text_ids(config, pretrained, examples, P)
    return start_from_ids(backbone, pretrained.params, kind, ids, P)


def start_of(method: Method[Any], config: InitConfig) -> str:
    """The name of the start: the config's, or the one that the method is best off with."""
    if config.start is not None:
        return config.start
    if config.text is not None or config.text_file is not None:
        return "text"
    return method.default_start


def _text_ids(
    config: InitConfig, pretrained: Pretrained, examples: Sequence[Example], length: int
) -> np.ndarray:
    """The tokens of a text, or the first ones of the training examples as they are rendered; for
    an encoder-decoder, of what its encoder reads."""
    text = config.text
    if config.text_file is not None:
        try:
            text = read_text(config.text_file, ConfigError)
        except ConfigError as error:
            raise ConfigError(f"init.text_file {error}") from None
    if text is None:
        texts = [
            example.ids_T if example.source_ids_S is None else example.source_ids_S
            for example in examples[:length]
        ]
        if not sum(map(len, texts)):
            raise ConfigError(
                "init.start: text begins as the inputs of the first examples, which are empty; "
                "give init.text, or another start"
            )
        return np.concatenate(texts)
    name = "init.text" if config.text_file is None else f"init.text_file {config.text_file}"
    (ids,) = token_ids(pretrained.tokenizer, [text], name, ConfigError)
    if not ids:
        raise ConfigError(f"{name} {text[:40]!r} has no tokens")
    return np.asarray(ids, np.int32)


def _drawn_ids(top: int | None, vocab: int, rng: jax.Array, count: int) -> np.ndarray:
    """Tokens drawn from the first `top` of the vocabulary, or from all of it."""
    most = vocab if top is None else min(top, vocab)
    return np.asarray(jax.random.randint(rng, (count,), 0, most, jnp.int32))


def _labels(
    config: InitConfig, method: Method[Any], pretrained: Pretrained, rng: jax.Array
) -> Embeds:
    """Class labels as soft tokens, and drawn tokens in the slots behind them."""
    labels, P = config.labels or (), method.length
    if method.produces is not Embeds:
        raise ConfigError(
            "init.start: labels is for soft tokens (method.name: prompt, ptuning, multitask); give "
            "others a text that names the classes (init.text)"
        )
    if len(labels) > P:
        raise ConfigError(f"init.labels has {len(labels)} classes, and the prefix {P} slots")
    pieces = token_ids(pretrained.tokenizer, labels, "init.labels", ConfigError)
    if not all(pieces):
        raise ConfigError("init.labels holds a text that has no tokens")
    pieces += [[int(i)] for i in _drawn_ids(config.top, pretrained.backbone.geometry.vocab, rng,
                                            P - len(labels))]  # fmt: skip
    ids = np.concatenate(pieces).astype(np.int32)
    embeds: Any = start_from_ids(pretrained.backbone, pretrained.params, Embeds, ids, len(ids))
    bounds = np.cumsum([len(piece) for piece in pieces])[:-1]
    means = [rows_TD.mean(0) for rows_TD in np.split(np.asarray(embeds.x_PD), bounds)]
    return Embeds(jnp.asarray(np.stack(means)))


def _stored(path: str | None, method: Method[Any], pretrained: Pretrained) -> Produced:
    assert path is not None  # as InitConfig checks
    produced, card = artifact.load(path)
    artifact.check(card, pretrained.backbone.geometry, pretrained.fingerprint, pretrained.quantize)

    def make(rng: jax.Array) -> Produced:
        made: Produced = method(method.init(rng, pretrained.backbone.geometry, None))
        # Several tasks start alike.
        return made.split_tasks()[0] if isinstance(made, Embeds) else made

    expected = jax.eval_shape(make, jax.random.key(0))
    if artifact.prefix_spec(produced) != artifact.prefix_spec(expected):
        raise PrefixError(
            f"{path} holds a prefix of {_describe(produced)}; the method trains one of "
            f"{_describe(expected)}: let its fields agree with what is stored"
        )
    ours, theirs = jax.tree.leaves(expected), jax.tree.leaves(produced)
    if [leaf.shape for leaf in ours] != [leaf.shape for leaf in theirs]:
        raise PrefixError(
            f"{path} holds a prefix with other parts (sites, biases, gates) than the method trains"
        )
    return produced


def _describe(produced: Produced) -> str:
    known = artifact.prefix_spec(produced)
    described = f"kind {known.kind!r}, length {known.length}, text_position {known.text_position}"
    if isinstance(produced, Prefix):
        described += f", sites {', '.join(produced.sites)}"
    if known.layers:
        described += f", layers {known.layers}"
    return described + (", pinned" if known.pinned else "")
