"""The calls that most programs need: tune a prefix, store it, load it, use it."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from prefix_jax import artifact, config
from prefix_jax.artifact import Card, Container
from prefix_jax.backbones.load import Pretrained, load
from prefix_jax.config import DecodeConfig, EvaluateConfig
from prefix_jax.data.pipeline import load_examples
from prefix_jax.data.source import Record
from prefix_jax.data.template import Template
from prefix_jax.decode.generate import Generation, Generator, OnText
from prefix_jax.errors import DataError, PrefixError
from prefix_jax.evaluate.run import Evaluation, Evaluator
from prefix_jax.methods import name_of
from prefix_jax.methods.base import Method
from prefix_jax.model import PrefixModel
from prefix_jax.prefix import Prefix, Produced
from prefix_jax.train.fit import Run
from prefix_jax.train.fit import fit as fit_config

Source = str | Path | Iterable[Mapping[str, Any]]
Prompt = str | Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A backbone with the prefix that was tuned for it.

    Attributes:
        pretrained: the backbone.
        produced: the prefix as its method produces it; None is the bare backbone.
        card: what is known about the prefix.
        run: the run that trained it; None if it was loaded.
    """

    pretrained: Pretrained
    produced: Produced | None
    card: Card | None
    run: Run | None = None

    @functools.cached_property
    def prefix(self) -> Prefix | None:
        """The prefix as plain keys and values, float32: `bake`d once, whatever the method."""
        return bake(self.pretrained, self.produced)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        on_text: OnText | None = None,
        **options: Any,
    ) -> Any:
        """Generates text.

        Args:
            prompts: a prompt or several: texts that are taken as they are, or records that the
                template of the training data renders.
            on_text: called with (index of the prompt, of the sample, the next piece of its text).
            options: fields of `DecodeConfig`: max_new_tokens=100, beams=5, temperature=0.7, …

        Returns:
            A text for one prompt, a list for several; with `samples` above 1, a list of texts in
            place of each text.
        """
        single = isinstance(prompts, str | Mapping)
        decode = config.build(DecodeConfig, options)
        found = self.generations([prompts] if single else prompts, decode, on_text=on_text)
        texts = [
            generation.text
            if decode.samples == 1
            else [continuation.text for continuation in generation.samples]
            for generation in found
        ]
        return texts[0] if single else texts

    def generations(
        self,
        prompts: Sequence[Prompt],
        decode: DecodeConfig = DecodeConfig(),  # noqa: B008
        **options: Any,
    ) -> list[Generation]:
        """Generates with token ids, log-probabilities and reasons: see `Generator.generate`."""
        generator = Generator(
            self.pretrained.backbone,
            self.pretrained.listed(),
            self.pretrained.tokenizer,
            self.prefix,
        )
        return generator.generate([self.render(prompt) for prompt in prompts], decode, **options)

    def render(self, prompt: Prompt) -> str:
        """The prompt of a record, by the template that the prefix was trained with.

        Raises:
            DataError: the template needs a field that the record lacks.
            PrefixError: the prefix was stored without its template.
        """
        if isinstance(prompt, str):
            return prompt
        template = None if self.card is None else self.card.template
        if template is None:
            raise PrefixError("this prefix has no template: give prompts as text, not as records")
        if template.messages is not None:
            if template.messages not in prompt:
                raise DataError(f"the record has no field {template.messages!r} with a chat")
            turns = prompt[template.messages]
            return str(
                self.pretrained.tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=True
                )
            )
        if template.input is None:
            raise PrefixError("this prefix was trained without inputs: give the text to continue")
        (text,) = Template(template.input).render(Record(prompt, "the prompt"))
        return text

    def evaluate(
        self,
        data: Source,
        metrics: Sequence[str] = ("loss",),
        *,
        references: str | None = None,
        decode: DecodeConfig = DecodeConfig(),  # noqa: B008
        **options: Any,
    ) -> Evaluation:
        """Measures the prefix on held-out records, rendered as the training data was.

        Args:
            data: a file, `tfds:NAME/SPLIT`, or records.
            metrics: "loss", "accuracy", "bleu", …: see `EvaluateConfig`.
            references: the field of acceptable texts; None takes the rendered targets.
            decode: how text is generated.
            options: further fields of `EvaluateConfig`.
        """
        template = None if self.card is None else self.card.template
        if template is None:
            raise PrefixError("this prefix has no template: nothing says how to render records")
        model = PrefixModel(self.pretrained.backbone, None)
        evaluate = config.build(EvaluateConfig, {"metrics": tuple(metrics), **options})
        start = 0 if self.prefix is None else self.prefix.offset
        examples = load_examples(
            data,
            self.pretrained.tokenizer,
            references=references,
            max_length=self.pretrained.backbone.arch.max_positions - start,
            **dataclasses.asdict(template),
        )
        evaluator = Evaluator(
            model, self.pretrained.tokenizer, self.pretrained.mesh, evaluate, decode
        )
        return evaluator.compare(self.pretrained, {"": self.prefix}, examples)[""]

    def save(self, path: str | Path, arrays: Container = "orbax") -> None:
        """Writes the prefix, without the backbone: see `artifact.save`."""
        if self.produced is None or self.card is None:
            raise PrefixError("there is no prefix to save: this is full fine-tuning")
        artifact.save(path, self.produced, self.card, arrays)


def bake(pretrained: Pretrained, produced: Produced | None) -> Prefix | None:
    """Turns what a method produced into plain keys and values under a backbone."""
    return jax.jit(pretrained.backbone.lift)(pretrained.params, produced)


def fit(
    pretrained: Pretrained,
    method: Method | None,
    train: Source,
    *,
    dev: Source | None = None,
    test: Source | None = None,
    input: str | None = None,
    target: str | None = None,
    messages: str | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 8,
    learning_rate: float = 1e-2,
    output: str | Path | None = None,
    overrides: Sequence[str] = (),
    console: Console | None = None,
    quiet: bool = False,
) -> Tuned:
    """Tunes a prefix.

    Args:
        pretrained: of `load`.
        method: what trains: `PrefixTuning(length=16)`, say; None fine-tunes the whole backbone.
        train, dev, test: files, `tfds:NAME/SPLIT`, or iterables of records.
        input: template of the text that is given: "{facts} =>".
        target: template of the text to learn: " {text}".
        messages: the field that holds a chat, in place of both templates.
        steps, epochs: how long; one of them.
        batch_size: examples per step.
        learning_rate: the peak.
        output: the run directory; None takes a temporary one. A run that was interrupted continues.
        overrides: anything else of the config, as on the command line: "optim.schedule=cosine".
        console: where progress is shown.
        quiet: show nothing.

    Raises:
        PrefixJaxError: see `prefix_jax.train.fit.fit`.
    """
    splits = {"train": train, "dev": dev, "test": test}
    named = {name: str(s) for name, s in splits.items() if isinstance(s, str | Path)}
    records = {
        name: s for name, s in splits.items() if s is not None and not isinstance(s, str | Path)
    }
    fields = {} if method is None else dataclasses.asdict(method)
    values = {
        "model": {"path": pretrained.source},
        "method": {"name": name_of(method), **fields},
        "data": {
            "input": input,
            "target": target,
            "messages": messages,
            "batch_size": batch_size,
            **named,
        },
        "optim": {"learning_rate": learning_rate},
        "train": {"steps": steps, "epochs": epochs},
        "output": str(output or tempfile.mkdtemp(prefix="prefix_jax-")),
    }
    run_config = config.parse(values, overrides)
    run = fit_config(
        run_config, pretrained=pretrained, records=records, console=console, quiet=quiet
    )
    return _tuned(run)


def load_prefix(
    path: str | Path, pretrained: Pretrained | None = None, *, allow_other_weights: bool = False
) -> Tuned:
    """Loads a stored prefix together with its backbone.

    Args:
        path: the directory of a prefix, or of a run that has ended.
        pretrained: its backbone; None loads the one that the prefix names.
        allow_other_weights: accept a backbone of the same shape with other weights.

    Raises:
        PrefixError: there is no prefix, it is damaged, or it belongs to another backbone.
        BackboneError: the backbone cannot be loaded.
    """
    produced, card = artifact.load(path)
    if pretrained is None:
        pretrained = load(card.backbone.source)
    artifact.check(
        card,
        pretrained.backbone.geometry,
        pretrained.fingerprint,
        allow_other_weights=allow_other_weights,
    )
    return Tuned(pretrained, produced, card)


def _tuned(run: Run) -> Tuned:
    return Tuned(run.pretrained, run.produced, run.card, run)
