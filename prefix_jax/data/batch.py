"""The shapes in which examples travel: tokenised, then packed into rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from prefix_jax.nn.mask import Tokens


@dataclasses.dataclass(frozen=True)
class Example:
    """One tokenised example.

    Attributes:
        ids_T: int32 token ids; of an encoder-decoder, those of the decoder, its start token first.
        target_T: bool; True where the token is predicted and counts in the loss. Never True at 0:
            nothing stands before the first token.
        source: where the example came from, for messages: "train.jsonl:17".
        references: every acceptable target text, for evaluation.
        prompt: the text before the target (of a chat, before its last answer), as it was rendered.
        prompt_length: how many of `ids_T` stand before the target, or before a chat's last answer.
        source_ids_S: int32, what the encoder of an encoder-decoder reads; None for a single stack.
    """

    ids_T: np.ndarray
    target_T: np.ndarray
    source: str
    references: Sequence[str] = ()
    prompt: str = ""
    prompt_length: int = 0
    source_ids_S: np.ndarray | None = None

    @property
    def source_length(self) -> int:
        """The number of tokens before the first target: what several targets may share."""
        return int(np.argmax(self.target_T)) if self.target_T.any() else len(self.ids_T)

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens that generation starts from: of an encoder-decoder, its source."""
        if self.source_ids_S is not None:
            return [int(token) for token in self.source_ids_S]
        return [int(token) for token in self.ids_T[: self.prompt_length]]


@flax.struct.dataclass
class Source:
    """What an encoder reads, row by row. A group of it is what the decoder's group attends to.

    Attributes:
        ids_BS: int32 token ids.
        tokens: where each token stands.
    """

    ids_BS: jax.Array
    tokens: Tokens


@flax.struct.dataclass
class Batch:
    """Packed rows with their targets listed, so that logits are asked only where one is.

    Attributes:
        ids_BT: int32 token ids.
        tokens: where each token stands.
        index_BM: int32, for every target the column in its row whose hidden state predicts it.
            Several targets may name one column: the last source token predicts the first token
            of every target that shares the source.
        label_BM: int32, the token to predict.
        weight_BM: float32, 1 for a target and 0 for padding.
        examples: float32 scalar, the number of examples in the batch: what a summed loss is
            divided by.
        source: what the encoder of an encoder-decoder reads; None for a single stack.
    """

    ids_BT: jax.Array
    tokens: Tokens
    index_BM: jax.Array
    label_BM: jax.Array
    weight_BM: jax.Array
    examples: jax.Array
    source: Source | None = None

    @property
    def read(self) -> jax.Array:
        """How many tokens the rows hold on both sides, padding not counted."""
        written = jnp.sum(self.tokens.group_BT > 0)
        if self.source is None:
            return written
        return written + jnp.sum(self.source.tokens.group_BT > 0)
