"""The shapes in which examples travel: tokenised, then packed into rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from prefix_jax.nn.mask import Tokens


@dataclasses.dataclass(frozen=True)
class Window:
    """A stretch of a text in which the answer to a question may stand.

    Attributes:
        question: its number; successive windows of one text share it.
        context: the whole text.
        offset_T2: int32, where each token starts and ends in it, in characters; -1 for those that
            are not of the text.
    """

    question: int
    context: str
    offset_T2: np.ndarray


@dataclasses.dataclass(frozen=True)
class Example:
    """One tokenised example: its tokens, and what is predicted from where.

    Attributes:
        ids_T: int32 token ids; of an encoder-decoder, those of the decoder, its start token first.
        index_M: int32, ascending; for every target the column whose hidden state predicts it.
        label_M: what is predicted there: int32, a token or a class, or float32, a value.
        source: where the example came from, for messages: "train.jsonl:17".
        references: every acceptable target text, for evaluation.
        prompt: the text before the target (of a chat, before its last answer), as it was rendered.
        prompt_length: how many of `ids_T` stand before the target, or before a chat's last answer.
        source_ids_S: int32, what the encoder of an encoder-decoder reads; None for a single stack.
        whole: whether every token plays a part, as in an example with labels. Otherwise those
            behind the last column of `index_M` do not, and are not laid.
        segment_T: int32, which of two texts a token belongs to; None where nothing asks.
        part_T: int32 from 0; tokens of several parts do not see each other, and each part counts
            its positions from 0 (the choices of one question). None is one part; several are
            `whole`.
        candidates: whether the targets are candidates for one answer: the loss is that of choosing
            among them, and they count as one target. A label's bits then say of which answers its
            candidate is the right one (bit 0 the first answer, bit 1 the second).
        window: what its tokens are, where an answer is to be found among them.
        choices: the texts of the candidates, where they are texts.
        task: which of several tasks it is of, from 0; None where there is one.
    """

    ids_T: np.ndarray
    index_M: np.ndarray
    label_M: np.ndarray
    source: str
    references: Sequence[str] = ()
    prompt: str = ""
    prompt_length: int = 0
    source_ids_S: np.ndarray | None = None
    whole: bool = False
    segment_T: np.ndarray | None = None
    part_T: np.ndarray | None = None
    candidates: bool = False
    window: Window | None = None
    choices: tuple[str, ...] = ()
    task: int | None = None

    @classmethod
    def of_text(
        cls, ids_T: np.ndarray, target_T: np.ndarray, source: str, **fields: Any
    ) -> Example:
        """Text of which the tokens where `target_T` is True are predicted, each from the one
        before it: it is never True at 0. `fields` are further attributes."""
        index_M = np.flatnonzero(target_T).astype(np.int32) - 1
        return cls(ids_T, index_M, ids_T[index_M + 1], source, **fields)

    @property
    def target_T(self) -> np.ndarray:
        """Of text, the mask that `of_text` takes."""
        target_T = np.zeros(len(self.ids_T), bool)
        target_T[self.index_M + 1] = True
        return target_T

    @property
    def source_length(self) -> int:
        """The number of tokens before the first target: what several targets may share."""
        return len(self.ids_T) if self.whole else int(self.index_M[0]) + 1

    @property
    def targets(self) -> int:
        """How many targets it counts as."""
        return 1 if self.candidates else len(self.index_M)

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
        label_BM: what to predict: int32, a token or a class, or float32, a value.
        weight_BM: float32, 1 for a target and 0 for padding. Of candidates for one answer the
            first has it.
        examples: float32 scalar, the number of examples in the batch: what a summed loss is
            divided by.
        source: what the encoder of an encoder-decoder reads; None for a single stack.
        question_BM: int32, from 1; candidates of equal number in a row stand for one answer, and 0
            marks padding. None where no targets are candidates.
    """

    ids_BT: jax.Array
    tokens: Tokens
    index_BM: jax.Array
    label_BM: jax.Array
    weight_BM: jax.Array
    examples: jax.Array
    source: Source | None = None
    question_BM: jax.Array | None = None

    @property
    def read(self) -> jax.Array:
        """How many tokens the rows hold on both sides, padding not counted."""
        written = jnp.sum(self.tokens.group_BT > 0)
        if self.source is None:
            return written
        return written + jnp.sum(self.source.tokens.group_BT > 0)
