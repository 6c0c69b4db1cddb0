"""Combines a backbone, a method and a task: method → lift → hidden → head."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from prefix_jax.backbones.backbone import Backbone
from prefix_jax.backbones.starts import adapter_from_states, starts_from_text
from prefix_jax.data.batch import Batch
from prefix_jax.errors import ContextError
from prefix_jax.mesh import on_mesh_of
from prefix_jax.methods.base import Method
from prefix_jax.nn.head import Head
from prefix_jax.nn.loss import (
    frozen_head_loss,
    gather_targets,
    row_losses,
    training_head_loss,
)
from prefix_jax.prefix import Adapter, Embeds, Hidden, Prefix, Produced, StackName
from prefix_jax.tasks import EncoderDecoder, Reader, Task, TextTask

if TYPE_CHECKING:  # its import takes seconds
    from transformers import PreTrainedTokenizerFast

# {"backbone": …, "prefix": …, "head": …}: a single tree, so that one label function partitions it.
Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class PrefixModel:
    """A frozen backbone and the method that steers it.

    Attributes:
        backbone: the pretrained model.
        method: the tuning method; None for full fine-tuning without a prefix, the baseline.
        task: what the model is asked to do.
    """

    backbone: Backbone
    method: Method[Any] | None
    task: Task = dataclasses.field(default_factory=TextTask)

    @functools.cached_property
    def head(self) -> Head | None:
        """A trainable head on the last hidden states; None for the language model's own."""
        return self.task.head(self.backbone.arch)

    def produced(self, params: Params, rng: jax.Array | None = None) -> Produced | None:
        """The output of the method, with dropout if `rng` is given."""
        return None if self.method is None else self.method(params["prefix"], rng)

    def prefix(self, params: Params, rng: jax.Array | None = None) -> Prefix | None:
        """The prefix that attention reads, differentiable in `params["prefix"]`."""
        return self.backbone.lift(params["backbone"], self.produced(params, rng))

    def loss(self, params: Params, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
        """The summed loss of the batch's targets: with the language model's own head, the negative
        log-likelihood in nats. Differentiable.

        Args:
            params: {"backbone": …, "prefix": …, "head": …}.
            batch: packed rows.
            rng: for dropout; None disables it.
        """
        if self.head is not None:
            prefix_rng, head_rng = (None, None) if rng is None else jax.random.split(rng)
            prefix = self.prefix(params, prefix_rng)
            out_BMY = self._head_outputs(
                params["backbone"], params["head"], prefix, batch, head_rng
            )
            return self.task.losses(out_BMY, batch).sum()
        h_BMD = self._target_states(params["backbone"], self.prefix(params, rng), batch)
        head_loss = training_head_loss if self.method is None else frozen_head_loss
        weights = self.backbone.unembedding(params["backbone"])
        return head_loss(self.backbone.unembed, weights, h_BMD, batch.label_BM, batch.weight_BM)

    def score(self, backbone: Any, prefix: Prefix | None, batch: Batch) -> jax.Array:
        """The summed negative log-likelihood of each row's targets, [B], in nats.

        Args:
            backbone: the weights of the backbone.
            prefix: a lifted prefix; None scores the bare model.
            batch: packed rows.
        """
        h_BMD = self._target_states(backbone, prefix, batch)
        weights = self.backbone.unembedding(backbone)
        return row_losses(self.backbone.unembed, weights, h_BMD, batch.label_BM, batch.weight_BM)

    def head_outputs(
        self, backbone: Any, head: Any, prefix: Prefix | None, batch: Batch
    ) -> tuple[jax.Array, jax.Array]:
        """The outputs and losses of the head.

        Args:
            backbone, head: the weights of each.
            prefix: a lifted prefix; None is the bare model.
            batch: packed rows.

        Returns:
            out_BMY, and the summed loss of each row's targets, [B].
        """
        out_BMY = self._head_outputs(backbone, head, prefix, batch)
        return out_BMY, self.task.losses(out_BMY, batch)

    def _head_outputs(
        self,
        backbone: Any,
        head: Any,
        prefix: Prefix | None,
        batch: Batch,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        assert self.head is not None
        h_BMD = self._target_states(backbone, prefix, batch)
        if self.head.pooled:
            h_BMD = self.backbone.pool(backbone, h_BMD)
        return self.head(head, h_BMD, rng)

    def _target_states(self, backbone: Any, prefix: Prefix | None, batch: Batch) -> jax.Array:
        """The hidden states that predict the targets, h_BMD."""
        encoded = None
        if batch.source is not None:
            source = batch.source
            encoded = self.backbone.encode(backbone, source.ids_BS, source.layout, prefix)
        h_BTD, _ = self.backbone.hidden(
            backbone, batch.ids_BT, batch.layout, prefix, encoded=encoded
        )
        # Soft tokens before an encoder are the first columns of its output.
        soft = h_BTD.shape[1] - batch.ids_BT.shape[1]
        if soft and self.head is not None and self.head.soft:
            return gather_targets(h_BTD, jnp.zeros_like(batch.index_BM))
        return gather_targets(h_BTD, batch.index_BM + soft)

    @functools.cached_property
    def _abstract(self) -> Prefix | None:
        """The shape of the prefix."""
        method = self.method
        if method is None:
            return None

        def make(rng: jax.Array) -> Prefix | None:
            prefix = method.init(rng, self.backbone.geometry, None)
            return self.prefix({"backbone": self.backbone.init(rng), "prefix": prefix})

        shape: Prefix | None = jax.eval_shape(make, jax.random.key(0))
        return shape

    @property
    def packs(self) -> bool:
        """True if several examples can be packed into a row; see `packs`."""
        return packs(self._abstract)

    def reader(self, tokenizer: PreTrainedTokenizerFast) -> Reader:
        """How the model reads text after its prefix: see `reader_of`."""
        return reader_of(self.backbone, self._abstract, tokenizer)

    @property
    def encoder_decoder(self) -> EncoderDecoder | None:
        """Tokenisation settings of an encoder-decoder; see `encoder_decoder`."""
        return encoder_decoder(self.backbone, self._abstract)

    @property
    def room(self) -> int:
        """The number of text tokens that fit the model's positions after the prefix. For an
        encoder-decoder, this is the encoder's."""
        return self.backbone.room(self._abstract, self.backbone.input_stack)

    def check_context(self, max_length: int | None) -> None:
        """Raises ContextError if prefix and text do not fit the model's positions.

        Args:
            max_length: maximum number of text tokens; None for as many as fit.
        """
        backbone, reader = self.backbone, self.backbone.input_stack
        stacks: tuple[StackName, ...] = (
            (reader,) if backbone.arch.encoder is None else (reader, "decoder")
        )
        # Checked before tracing all layers, which would last minutes for a million states.
        most, method = backbone.room(None, reader), self.method
        if (
            method
            and method.produces in (Embeds, Hidden)
            and method.resolved_text_position > most - 2
        ):
            raise _no_room(method.resolved_text_position, most, reader)
        for stack in stacks:
            positions, room = (backbone.room(p, stack) for p in (None, self._abstract))
            start = positions - room
            if room < 2:
                raise _no_room(start, positions, stack)
            if stack == reader and max_length is not None and max_length > room:
                raise ContextError(
                    f"data.max_length {max_length} and text that starts at position {start}, after "
                    f"the prefix, exceed the model's {positions} positions; at most {room} tokens "
                    "fit, or use a shorter prefix"
                )


def _no_room(start: int, positions: int, stack: StackName) -> ContextError:
    return ContextError(
        f"text would start at position {start}, after the prefix, which leaves no room for it in "
        f"the {positions} positions of the {stack}; use a shorter prefix (method.length)"
    )


def packs(prefix: Prefix | None) -> bool:
    """True if several examples can be packed into a row after a prefix. Soft tokens before an
    encoder exclude packing, because their hidden states depend on the text."""
    return prefix is None or prefix.embeds_PD is None


def reader_of(
    backbone: Backbone, prefix: Prefix | None, tokenizer: PreTrainedTokenizerFast
) -> Reader:
    """How a backbone with a prefix reads text."""
    return Reader(
        tokenizer,
        room=backbone.room(prefix, backbone.input_stack),
        causal=backbone.arch.causal,
        token_types=backbone.arch.token_types > 0,
        end_ids=backbone.arch.end_ids,
        encoder_decoder=encoder_decoder(backbone, prefix),
    )


def encoder_decoder(backbone: Backbone, prefix: Prefix | None) -> EncoderDecoder | None:
    """Tokenisation settings of an encoder-decoder with a prefix; None for a single stack."""
    start_id = backbone.arch.start_id
    if backbone.arch.encoder is None or start_id is None:
        return None
    room = backbone.room(prefix, "decoder")
    return EncoderDecoder(start_id, max_target=room, source_needed=packs(prefix))


def start_from_ids(
    backbone: Backbone, params: Any, kind: type[Produced], ids: np.ndarray, length: int
) -> Produced:
    """Initial value of a prefix, computed from a text by the frozen model.

    Args:
        backbone, params: the frozen model and its weights.
        kind: the type that the method produces.
        ids: token ids of the text; repeated or truncated to `length` tokens.
        length: P.
    """
    ids_P = jnp.asarray(np.resize(np.asarray(ids, np.int32), length))
    with on_mesh_of(params):
        embeds, hidden, prefix = jax.jit(starts_from_text, static_argnums=0)(
            backbone, params, ids_P
        )
        if kind is Adapter:
            return jax.jit(adapter_from_states, static_argnums=0)(backbone, params, hidden)
    return {Embeds: embeds, Hidden: hidden, Prefix: prefix}[kind]
