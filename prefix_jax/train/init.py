"""Initial values of what trains: the prefix and the head."""

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
from prefix_jax.mesh import replicated
from prefix_jax.methods.base import Method, normal_like
from prefix_jax.model import PrefixModel, start_from_ids
from prefix_jax.prefix import Adapter, Embeds, Prefix, Produced
from prefix_jax.untrusted.paths import read_text
from prefix_jax.untrusted.tokenizer import token_ids


def init_params(
    model: PrefixModel,
    pretrained: Pretrained,
    config: InitConfig,
    examples: Sequence[Example],
    seed: int,
) -> Params:
    """Makes all parameters before the first step, {"backbone": …, "prefix": …, "head": …}.

    The backbone is stacked. Prefix and head are float32, and replicated over its mesh.

    Args:
        model: backbone, method and head.
        pretrained: the weights of the backbone.
        config: the `init` section of the config.
        examples: training examples, whose first tokens are the default text.
        seed: the seed of random values.

    Raises:
        ConfigError: the method does not support this start.
        PrefixError: the stored prefix to start from has another kind, length or backbone.
    """
    everywhere = replicated(pretrained.mesh)
    params: dict[str, Any] = {"backbone": pretrained.stacked()}
    if model.method is not None:
        prefix = init_prefix(model.method, config, pretrained, examples, seed)
        params["prefix"] = jax.device_put(prefix, everywhere)
    if model.head is not None:
        # Independent of the random numbers of the prefix.
        rng = jax.random.fold_in(jax.random.key(seed), 1)
        head = model.head.init(rng, model.backbone.arch.d_model)
        params["head"] = jax.device_put(head, everywhere)
    return params


def init_prefix(
    method: Method[Any],
    config: InitConfig,
    pretrained: Pretrained,
    examples: Sequence[Example],
    seed: int,
) -> Params:
    """Makes the method's parameters before the first step, in float32.

    Args:
        method: the method.
        config: the `init` section of the config.
        pretrained: the frozen model.
        examples: training examples, whose first tokens are the default text.
        seed: the seed of random values.

    Raises:
        ConfigError: the method does not support this start.
        PrefixError: the stored prefix to start from has another kind, length or backbone.
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
    """Makes the value that the method should produce at first.

    Returns:
        None if the method should use its own random initialization.

    Raises:
        ConfigError: the method does not support this start.
    """
    backbone, kind, P = pretrained.backbone, method.produces, method.length
    start = start_of(method, config)
    if start == "random":
        return None
    if start == "zeros":
        if kind is Adapter:
            raise ConfigError(
                "init.start: zeros would leave an adapter without gradients, because its gates are "
                "also zero; use random, normal or text"
            )
        return method.blank(backbone.geometry)
    if start == "normal":
        return normal_like(method.blank(backbone.geometry), rng, config.std)
    if start == "prefix":
        return _stored(config.path, method, pretrained)
    if not method.slots:
        raise ConfigError(
            f"init.start: {start} fills slots, but this method has none; use random (its own "
            "initialization), zeros, normal or prefix"
        )
    if start == "labels":
        return _labels(config, method, pretrained, rng)
    if start == "vocab":
        ids = _drawn_ids(config.top, backbone.geometry.vocab, rng, P)
    else:
        ids = _text_ids(config, pretrained, examples, P)
    return start_from_ids(backbone, pretrained.params, kind, ids, P)


def start_of(method: Method[Any], config: InitConfig) -> str:
    """Returns the name of the start: the one in the config, or else the method's default."""
    if config.start is not None:
        return config.start
    if config.text is not None or config.text_file is not None:
        return "text"
    return method.default_start


def _text_ids(
    config: InitConfig, pretrained: Pretrained, examples: Sequence[Example], length: int
) -> np.ndarray:
    """Tokenizes the text of the config, or returns the first tokens of the rendered examples.

    For an encoder-decoder, these are the tokens of the encoder's input.
    """
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
                "init.start: text uses the inputs of the first examples, which are empty; set "
                "init.text, or choose another start"
            )
        return np.concatenate(texts)
    name = "init.text" if config.text_file is None else f"init.text_file {config.text_file}"
    (ids,) = token_ids(pretrained.tokenizer, [text], name, ConfigError)
    if not ids:
        raise ConfigError(f"{name} {text[:40]!r} has no tokens")
    return np.asarray(ids, np.int32)


def _drawn_ids(top: int | None, vocab: int, rng: jax.Array, count: int) -> np.ndarray:
    """Draws tokens from the first `top` of the vocabulary, or from all of it."""
    limit = vocab if top is None else min(top, vocab)
    return np.asarray(jax.random.randint(rng, (count,), 0, limit, jnp.int32))


def _labels(
    config: InitConfig, method: Method[Any], pretrained: Pretrained, rng: jax.Array
) -> Embeds:
    """Makes soft tokens from class labels, followed by random tokens in the remaining slots."""
    labels, P = config.labels or (), method.length
    if method.produces is not Embeds:
        raise ConfigError(
            "init.start: labels requires soft tokens (method.name: prompt, ptuning or multitask); "
            "for other methods, set init.text to a text that names the classes"
        )
    if len(labels) > P:
        raise ConfigError(f"init.labels has {len(labels)} classes, but the prefix has {P} slots")
    pieces = token_ids(pretrained.tokenizer, labels, "init.labels", ConfigError)
    if not all(pieces):
        raise ConfigError("init.labels contains a label without tokens")
    pieces += [[int(i)] for i in _drawn_ids(config.top, pretrained.backbone.geometry.vocab, rng,
                                            P - len(labels))]  # fmt: skip
    ids = np.concatenate(pieces).astype(np.int32)
    embeds: Any = start_from_ids(pretrained.backbone, pretrained.params, Embeds, ids, len(ids))
    bounds = np.cumsum([len(piece) for piece in pieces])[:-1]
    means = [rows_TD.mean(0) for rows_TD in np.split(np.asarray(embeds.x_PD), bounds)]
    return Embeds(jnp.asarray(np.stack(means)))


def _stored(path: str | None, method: Method[Any], pretrained: Pretrained) -> Produced:
    """Loads a stored prefix of the kind that the method produces."""
    assert path is not None  # checked by InitConfig
    produced, card = artifact.load(path)
    artifact.check(card, pretrained.backbone.geometry, pretrained.fingerprint, pretrained.quantize)

    def make(rng: jax.Array) -> Produced:
        value: Produced = method(method.init(rng, pretrained.backbone.geometry, None))
        # Several datasets start from the same value.
        return value.split_bank()[0] if isinstance(value, Embeds) else value

    expected = jax.eval_shape(make, jax.random.key(0))
    if artifact.prefix_spec(produced) != artifact.prefix_spec(expected):
        raise PrefixError(
            f"{path} contains a prefix of {_describe(produced)}, but the method trains one of "
            f"{_describe(expected)}; change the method to match the stored prefix"
        )
    expected_shapes, shapes = (
        [leaf.shape for leaf in jax.tree.leaves(tree)] for tree in (expected, produced)
    )
    if shapes != expected_shapes:
        raise PrefixError(
            f"{path} contains a prefix with other parts (sites, biases, gates) than the method "
            "trains"
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
