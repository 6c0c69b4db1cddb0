"""Data structures for tokenised examples and packed batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from prefix_jax.nn.attention.mask import TokenLayout


@dataclasses.dataclass(frozen=True)
class Window:
    """A window of a text that may contain the answer to a question.

    Attributes:
        question: the index of the question; all windows of one text share it.
        context: the whole text.
        offset_T2: int32, the start and end of each token in the text, in characters; -1 for tokens
            outside the text.
    """

    question: int
    context: str
    offset_T2: np.ndarray


@dataclasses.dataclass(frozen=True)
class Example:
    """One tokenised example with its targets.

    Attributes:
        ids_T: int32 token ids; in an encoder-decoder, those of the decoder, starting with its start
            token.
        index_M: int32, ascending; for each target, the column whose hidden state predicts it.
        label_M: the targets: int32 tokens or classes, or float32 values.
        origin: where the example comes from, for messages: "train.jsonl:17".
        references: every acceptable target text, for evaluation.
        prompt: the rendered text before the target (in a chat, before the last answer).
        prompt_length: the number of tokens in `ids_T` before the target (in a chat, before the last
            answer).
        source_ids_S: int32 encoder input of an encoder-decoder; None for a single stack.
        whole: whether all tokens are needed, as in an example with labels. Otherwise the tokens
            after the last column of `index_M` are left out of the rows.
        token_type_T: int32, which of two texts each token belongs to; None if the model does not
            embed token types.
        part_T: int32 from 0. Tokens of different parts do not attend to each other, and each part
            counts its positions from 0 (the choices of one question). None means one part; several
            parts require `whole`.
        candidates: whether the targets are candidates for one answer. The loss is then the
            cross-entropy over them, and they count as one target. The bits of a label mark the
            answers for which its candidate is correct (bit 0 the first answer, bit 1 the second).
        window: character offsets of the tokens, for extracting an answer span.
        choices: the texts of the candidates, if they are texts.
        dataset: the index of its dataset in a mixture, from 0; None without a mixture.
    """

    ids_T: np.ndarray
    index_M: np.ndarray
    label_M: np.ndarray
    origin: str
    references: Sequence[str] = ()
    prompt: str = ""
    prompt_length: int = 0
    source_ids_S: np.ndarray | None = None
    whole: bool = False
    token_type_T: np.ndarray | None = None
    part_T: np.ndarray | None = None
    candidates: bool = False
    window: Window | None = None
    choices: tuple[str, ...] = ()
    dataset: int | None = None

    @classmethod
    def of_text(
        cls, ids_T: np.ndarray, target_T: np.ndarray, origin: str, **fields: Any
    ) -> Example:
        """Builds an example from text whose targets are the tokens where `target_T` is True.

        Each target is predicted from the token before it, so `target_T[0]` is False. `fields` are
        further attributes.
        """
        index_M = np.flatnonzero(target_T).astype(np.int32) - 1
        return cls(ids_T, index_M, ids_T[index_M + 1], origin, **fields)

    @property
    def target_T(self) -> np.ndarray:
        """The target mask of a text example, as passed to `of_text`."""
        target_T = np.zeros(len(self.ids_T), bool)
        target_T[self.index_M + 1] = True
        return target_T

    @property
    def source_length(self) -> int:
        """The number of tokens before the first target, which several targets may share."""
        return len(self.ids_T) if self.whole else int(self.index_M[0]) + 1

    @property
    def targets(self) -> int:
        """The number of targets; candidates for one answer count as one."""
        return 1 if self.candidates else len(self.index_M)

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens that generation starts from; in an encoder-decoder, the encoder input."""
        if self.source_ids_S is not None:
            return [int(token) for token in self.source_ids_S]
        return [int(token) for token in self.ids_T[: self.prompt_length]]


class Examples(list[Example]):
    """Tokenised examples, with the origins of those that the length limit affected.

    Attributes:
        truncated: origins of the examples whose input was cut.
        dropped: origins of the examples that were left out.
    """

    def __init__(
        self,
        examples: Iterable[Example] = (),
        truncated: Sequence[str] = (),
        dropped: Sequence[str] = (),
    ):
        super().__init__(examples)
        self.truncated = tuple(truncated)
        self.dropped = tuple(dropped)


@flax.struct.dataclass
class Source:
    """Packed encoder inputs. A decoder segment attends to the encoder segment of the same number.

    Attributes:
        ids_BS: int32 token ids.
        layout: the segment and position of each token.
    """

    ids_BS: jax.Array
    layout: TokenLayout


@flax.struct.dataclass
class Batch:
    """Packed rows with an explicit list of targets, so that logits are computed only there.

    Attributes:
        ids_BT: int32 token ids.
        layout: the segment, branch and position of each token.
        index_BM: int32, for each target, the column in its row whose hidden state predicts it.
            Several targets may share a column: the last source token predicts the first token
            of every target with that source.
        label_BM: the targets: int32 tokens or classes, or float32 values.
        weight_BM: float32, 1 for a target and 0 for padding. Among candidates for one answer, only
            the first has weight 1.
        examples: float32 scalar, the number of examples in the batch; it divides a summed loss.
        source: the encoder inputs of an encoder-decoder; None for a single stack.
        question_BM: int32 from 1; candidates with equal numbers in a row belong to one answer, and
            0 marks padding. None if the targets are not candidates.
    """

    ids_BT: jax.Array
    layout: TokenLayout
    index_BM: jax.Array
    label_BM: jax.Array
    weight_BM: jax.Array
    examples: jax.Array
    source: Source | None = None
    question_BM: jax.Array | None = None

    @property
    def read(self) -> jax.Array:
        """The number of tokens in the rows of encoder and decoder, without padding."""
        written = jnp.sum(self.layout.segment_BT > 0)
        if self.source is None:
            return written
        return written + jnp.sum(self.source.layout.segment_BT > 0)
