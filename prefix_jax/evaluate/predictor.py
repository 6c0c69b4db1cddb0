"""Runs a model on examples: likelihoods, head outputs, likeliest labels and generated texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from prefix_jax.backbones.stacking import Params
from prefix_jax.config import DecodeConfig
from prefix_jax.data.batch import Batch, Example
from prefix_jax.data.pipeline import evaluation_batches
from prefix_jax.decode.generate import Generator
from prefix_jax.errors import ConfigError, ContextError, NonFiniteError
from prefix_jax.mesh import batch_shards, place_rows, replicated
from prefix_jax.model import PrefixModel, packs
from prefix_jax.prefix import Prefix
from prefix_jax.tasks import Reader
from prefix_jax.untrusted.tokenizer import token_ids


class Steered(NamedTuple):
    """The weights of a model and what steers it.

    Attributes:
        params: the backbone's weights; for generated text, the unstacked form is faster.
        prefix: precedes every example; None runs the bare model.
        head: the weights of the task's head; None if it has no head.
    """

    params: Params
    prefix: Prefix | None
    head: Params | None = None


class Outputs(NamedTuple):
    """The result of one pass over the examples.

    Attributes:
        inputs: the examples with distinct inputs.
        outputs: one per input; None if the pass computes only a loss.
        loss: the mean over all targets; None if the pass does not compute it.
    """

    inputs: Sequence[Example]
    outputs: Sequence[Any] | None
    loss: float | None


class Predictor:
    """Computes the outputs of a model for a task.

    `passes` has a function for everything that a metric can read (see `Metric.reads`). Reuse one
    predictor: it caches its compiled functions.

    Args:
        model: backbone and task.
        reader: how the model reads text.
        mesh: the mesh of the backbone's weights.
        decode: decoding options.
        labels: the texts that the pass "label" chooses from.
        batch_size: examples per batch.
    """

    def __init__(
        self,
        model: PrefixModel,
        reader: Reader,
        mesh: Mesh,
        *,
        decode: DecodeConfig = DecodeConfig(),
        labels: Sequence[str] = (),
        batch_size: int = 16,
    ):
        self._model, self._task, self._reader, self._mesh = model, model.task, reader, mesh
        self._decode, self._labels, self._batch_size = decode, labels, batch_size
        self._ends = model.task.ends(reader)
        # Every host needs the scores of all rows.
        self._score = jax.jit(model.score, out_shardings=replicated(mesh))
        self._answer = jax.jit(model.head_outputs, out_shardings=replicated(mesh))
        self.passes: dict[str, Callable[[Steered, Sequence[Example]], Outputs]] = {
            "head": self._head,
            "likelihood": self._likelihood,
            "label": self._label,
            "text": self._text,
        }

    def check(self, examples: Sequence[Example], reads: str) -> None:
        """Checks that the texts to generate or choose fit the model, before a long run starts.

        Args:
            examples: the examples.
            reads: the pass.

        Raises:
            ConfigError: none of the labels is a target of the examples, or a text would be
                generated from an empty input.
            ContextError: prefix and prompt leave no room for `max_new_tokens`, or for a label.
        """
        sides = self._model.encoder_decoder
        room = self._model.room if sides is None else sides.max_target
        if reads == "label":
            self._candidates(examples, room)
        if reads != "text":
            return
        if empty := [example.origin for example in examples if not len(example.prompt_ids)]:
            raise ConfigError(
                f"evaluate.metrics: {empty[0]} has no input from which to generate a text; give "
                "data.input, or only metrics that read the targets, such as loss"
            )
        longest = max(examples, key=lambda example: example.prompt_length)
        # The input of an encoder was cut to fit, and its decoder contains only the generated text.
        given = longest.prompt_length if sides is None else 0
        new = self._decode.max_new_tokens
        if given + new > room:
            positions = self._model.backbone.arch.max_positions
            raise ContextError(
                f"{longest.origin}: {given} tokens of input and "
                f"decode.max_new_tokens {new} exceed the model's {positions} positions, of which "
                f"the prefix leaves {room}; lower decode.max_new_tokens or data.max_length"
            )

    def loss(self, model: Steered, examples: Sequence[Example]) -> float:
        """Computes the mean negative log-likelihood of the target tokens, in nats."""
        total = sum(
            float(self._losses(model, batch).sum())
            for batch in self._batches(examples, pack=packs(model.prefix))
        )
        # A batch has only this host's rows, but its scores cover the rows of all hosts.
        return total / sum(example.targets for example in examples)

    def generate(self, model: Steered, inputs: Sequence[Example]) -> list[str]:
        """Generates a text for each input's prompt."""
        generator = Generator(
            self._model.backbone, model.params, self._reader.tokenizer, model.prefix, self._ends
        )
        generations = generator.generate(
            [example.prompt_ids for example in inputs], self._decode, batch_size=self._batch_size
        )
        return [generation.text.strip() for generation in generations]

    def _likelihood(self, model: Steered, examples: Sequence[Example]) -> Outputs:
        return Outputs(self._task.inputs(examples), None, self.loss(model, examples))

    def _text(self, model: Steered, examples: Sequence[Example]) -> Outputs:
        inputs = self._task.inputs(examples)
        return Outputs(inputs, self.generate(model, inputs), None)

    def _head(self, model: Steered, examples: Sequence[Example]) -> Outputs:
        """Computes out_MY of the head for every example, and its mean loss.

        Raises:
            NonFiniteError: an output is NaN or infinite.
        """
        outputs: list[np.ndarray] = []
        total = 0.0
        for batch in self._batches(examples, pack=False):
            with jax.set_mesh(self._mesh):
                placed = place_rows(batch, self._mesh)
                out_BMY, loss_B = jax.device_get(
                    self._answer(model.params, model.head, model.prefix, placed)
                )
            total += float(loss_B.sum())
            # A batch may end in padding rows, and a row in padding targets.
            some = examples[len(outputs) : len(outputs) + self._batch_size]
            for example, out_MY in zip(some, out_BMY, strict=False):
                outputs.append(out_MY[: len(example.index_M)])
                if not np.isfinite(outputs[-1]).all():
                    raise NonFiniteError.of(example.origin, "the outputs of the head")
        return Outputs(examples, outputs, total / sum(example.targets for example in examples))

    def _label(self, model: Steered, examples: Sequence[Example]) -> Outputs:
        """Chooses the label with the largest summed log-probability for each input."""
        inputs = self._task.inputs(examples)
        candidates = self._candidates(inputs, self._model.backbone.room(model.prefix, "decoder"))
        rows = [
            np.asarray(self._losses(model, batch))
            for batch in self._batches(candidates, pack=False)
        ]
        # The last batch may end in padding rows.
        losses = np.concatenate(rows)[: len(candidates)].reshape(len(inputs), len(self._labels))
        for example, losses_Y in zip(inputs, losses, strict=True):
            if not np.isfinite(losses_Y).all():
                raise NonFiniteError.of(example.origin, "the likelihoods of the labels")
        return Outputs(inputs, [self._labels[best] for best in losses.argmin(axis=1)], None)

    def _batches(self, examples: Sequence[Example], pack: bool) -> Iterator[Batch]:
        part = (jax.process_index(), jax.process_count())
        shards = batch_shards(self._mesh)
        return evaluation_batches(
            examples, self._batch_size, pack=pack, rows_multiple=shards, part=part
        )

    def _losses(self, model: Steered, batch: Batch) -> jax.Array:
        with jax.set_mesh(self._mesh):
            return self._score(model.params, model.prefix, place_rows(batch, self._mesh))

    def _candidates(self, examples: Sequence[Example], room: int) -> list[Example]:
        """Pairs every example with every label as its target.

        Args:
            examples: examples with references.
            room: tokens that fit after the prefix; in an encoder-decoder, tokens of a target.
        """
        targets = list(dict.fromkeys(text for example in examples for text in example.references))
        if not {*self._labels} & {*targets}:
            raise ConfigError(
                f"evaluate.labels: {', '.join(map(repr, self._labels))} do not occur as targets in "
                f"the data, such as {targets[0]!r}; write labels exactly like targets, including "
                "spaces"
            )
        ids = token_ids(self._reader.tokenizer, self._labels, "evaluate.labels", ConfigError)
        candidates = [
            _with_target(example, [*label_ids, *self._end(example)])
            for example in examples
            for label_ids in ids
        ]
        longest = max(candidates, key=lambda candidate: len(candidate.ids_T))
        # The start token of a decoder does not count as part of a target.
        needed = len(longest.ids_T) - (longest.source_ids_S is not None)
        if needed > room:
            raise ContextError(
                f"{longest.origin}: with the longest of evaluate.labels, {needed} tokens exceed "
                f"the {room} positions left by the prefix; lower data.max_length"
            )
        return candidates

    def _end(self, example: Example) -> list[int]:
        """Returns the token that ends the target; in a chat, the end of the assistant turn."""
        ids: list[int] = example.ids_T[np.isin(example.ids_T, self._ends)][-1:].tolist()
        return ids


def _with_target(example: Example, target: Sequence[int]) -> Example:
    """Replaces the target of an example by other tokens to score."""
    prompt = example.ids_T[: example.prompt_length]
    return Example.of_text(
        np.concatenate([prompt, np.asarray(target, np.int32)]),
        np.arange(len(prompt) + len(target)) >= max(len(prompt), 1),
        example.origin,
        source_ids_S=example.source_ids_S,
    )
