"""P-tuning: soft tokens computed by a prompt encoder (Liu et al. 2021)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp

from prefix_jax.methods.base import Method, Params, torch_linear
from prefix_jax.prefix import Embeds, Geometry
from prefix_jax.validation import Fraction, Interval, Width


@dataclasses.dataclass(frozen=True)
class PTuning(Method[Embeds]):
    """Trains an embedding per slot and a network that maps them to soft tokens.

    The networks are those of PEFT's `PromptEncoder`, with width X and ReLU between linear layers:

        mlp    Embedding(P, D) → Linear(X) → Linear(X) → Linear(D)
        lstm   Embedding(P, D) → bidirectional LSTM(X) → Linear(2X) → Linear(D)

    The paper uses the second, with two layers and X = D/2. After training, only the soft tokens are
    stored. The paper inserts them between the parts of a cloze template; here, as in PEFT, they
    precede the text.

    Attributes:
        encoder: "mlp" or "lstm".
        hidden: X, for an LSTM the width of each direction; None for D, as in PEFT.
        lstm_layers: the number of LSTM layers.
        lstm_dropout: dropout rate between LSTM layers, in training.
    """

    encoder: Literal["mlp", "lstm"] = "mlp"
    hidden: Width | None = None
    lstm_layers: Annotated[int, Interval(ge=1, le=64)] = 2
    lstm_dropout: Fraction = 0.0

    produces = Embeds

    @property
    def draws(self) -> bool:
        return super().draws or (self.encoder == "lstm" and self.lstm_dropout > 0)

    def init(self, rng: jax.Array, geometry: Geometry, start: Embeds | None) -> Params:
        P, D = self.length, geometry.input_dim
        X = D if self.hidden is None else self.hidden
        rng, embedding_rng = jax.random.split(rng)
        params: dict[str, Any] = {"embedding_PD": jax.random.normal(embedding_rng, (P, D))}
        if self.encoder == "mlp":
            widths = [D, X, X, D]
        else:
            rng, lstm_rng = jax.random.split(rng)
            params["lstm"] = _init_lstm(lstm_rng, D, X, self.lstm_layers)
            widths = [2 * X, 2 * X, D]
        params["linear"] = {
            str(number): _init_linear(key, *widths[number : number + 2])
            for number, key in enumerate(jax.random.split(rng, len(widths) - 1))
        }
        if start is not None:
            # The last layer can match P vectors exactly if the P features are independent.
            *inner, last = params["linear"].values()
            features_PX = _relus(inner, self._read(params, None))
            missing_PD = start.x_PD - _linear(last, features_PX)
            last["weight_XY"] += jnp.linalg.lstsq(features_PX, missing_PD)[0]
        return params

    def __call__(self, params: Params, rng: jax.Array | None = None) -> Embeds:
        lstm_rng = None
        if rng is not None:
            rng, lstm_rng = jax.random.split(rng)
        *inner, last = (params["linear"][key] for key in sorted(params["linear"]))
        x_PD = _linear(last, _relus(inner, self._read(params, lstm_rng)))
        return Embeds(self.drop(x_PD, rng))

    def _read(self, params: Params, rng: jax.Array | None) -> jax.Array:
        """The input of the first linear layer."""
        x_PX: jax.Array = params["embedding_PD"]
        if self.encoder == "mlp":
            return x_PX
        for number in range(self.lstm_layers):
            if number and rng is not None and self.lstm_dropout:
                keep = 1 - self.lstm_dropout
                kept = jax.random.bernoulli(jax.random.fold_in(rng, number), keep, x_PX.shape)
                x_PX = jnp.where(kept, x_PX / keep, 0)
            layer = params["lstm"][str(number)]
            directions = [
                _lstm(layer["forward"], x_PX),
                _lstm(layer["backward"], x_PX, reverse=True),
            ]
            x_PX = jnp.concatenate(directions, axis=-1)
        return x_PX


def _init_linear(rng: jax.Array, width_in: int, width_out: int) -> dict[str, jax.Array]:
    weight_rng, bias_rng = jax.random.split(rng)
    return {
        "weight_XY": torch_linear(weight_rng, (width_in, width_out), fan_in=width_in),
        "bias_Y": torch_linear(bias_rng, (width_out,), fan_in=width_in),
    }


def _linear(params: Params, x_PX: jax.Array) -> jax.Array:
    y_PY: jax.Array = x_PX @ params["weight_XY"] + params["bias_Y"]
    return y_PY


def _relus(layers: Sequence[Params], x_PX: jax.Array) -> jax.Array:
    for layer in layers:
        x_PX = jax.nn.relu(_linear(layer, x_PX))
    return x_PX


def _init_lstm(rng: jax.Array, d_model: int, width: int, layers: int) -> Params:
    """The default initialisation of `torch.nn.LSTM`: uniform within ±X ** -0.5.

    There are two biases, as in torch, although one would suffice: an optimizer moves their sum
    twice as fast, so results match torch only with both.
    """
    params: dict[str, Params] = {}
    for number in range(layers):
        width_in = 2 * width if number else d_model
        shapes = {
            "input_Y4X": (width_in, 4 * width),
            "state_X4X": (width, 4 * width),
            "input_bias_4X": (4 * width,),
            "state_bias_4X": (4 * width,),
        }
        layer: dict[str, Params] = {}
        for direction in ("forward", "backward"):
            rng, *keys = jax.random.split(rng, 1 + len(shapes))
            layer[direction] = {
                name: torch_linear(key, shape, fan_in=width)
                for key, (name, shape) in zip(keys, shapes.items(), strict=True)
            }
        params[str(number)] = layer
    return params


def _lstm(params: Params, x_PY: jax.Array, reverse: bool = False) -> jax.Array:
    """One direction of one layer over the slots (Hochreiter & Schmidhuber 1997), [P, X].

    The gates are in torch's order: input, forget, cell, output.
    """
    X = params["state_X4X"].shape[0]
    inputs_P4X = x_PY @ params["input_Y4X"] + params["input_bias_4X"] + params["state_bias_4X"]

    def step(
        carry: tuple[jax.Array, jax.Array], inputs_4X: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        state_X, cell_X = carry
        gates_4X = inputs_4X + state_X @ params["state_X4X"]
        write_X, keep_X, new_X, show_X = jnp.split(gates_4X, 4)
        cell_X = jax.nn.sigmoid(keep_X) * cell_X + jax.nn.sigmoid(write_X) * jnp.tanh(new_X)
        state_X = jax.nn.sigmoid(show_X) * jnp.tanh(cell_X)
        return (state_X, cell_X), state_X

    empty_X = jnp.zeros(X)
    return jax.lax.scan(step, (empty_X, empty_X), inputs_P4X, reverse=reverse)[1]
