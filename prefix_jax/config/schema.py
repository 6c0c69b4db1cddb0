"""The sections of a configuration, as frozen dataclasses that check themselves.

The `method` section stays a plain mapping: the methods registry knows which dataclass its name
stands for, and builds it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

from prefix_jax.errors import ConfigError

Preparing = Literal["e2e", "web_nlg", "dart", "copa", "sst2", "mrpc", "rte"]

Metric = Literal[
    "loss",
    "accuracy",
    "bleu",
    "chrf",
    "rouge1",
    "rouge2",
    "rougeL",
    "rougeLsum",
    "exact_match",
    "final_number",
    "f1",
    "f1_macro",
    "matthews",
    "pearson",
    "spearman",
]


# Beams x vocabulary are counted in 32 bits, and hardly any search gains from more than ten.
_MOST_BEAMS = 1024


def _require(*checks: tuple[bool, str]) -> None:
    """Raises one `ConfigError` that lists every check that does not hold."""
    broken = [message for holds, message in checks if not holds]
    if broken:
        raise ConfigError("; ".join(broken))


def _at_least(config: object, low: float, *names: str) -> Iterator[tuple[bool, str]]:
    """Checks that each named field is `low` or more; None (absent) passes, NaN does not."""
    for name in names:
        value = getattr(config, name)
        yield value is None or value >= low, f"{name} must be at least {low}, not {value}"


def _fraction(config: object, *names: str) -> Iterator[tuple[bool, str]]:
    """Checks that each named field lies in [0, 1); None (absent) passes."""
    for name in names:
        value = getattr(config, name)
        yield value is None or 0 <= value < 1, f"{name} must lie in [0, 1), not {value}"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The frozen backbone.

    Attributes:
        path: a directory in Hugging Face layout, a GGUF file, `package:NAME` for the first of
            either inside an installed Python package, or a hub id.
        dtype: the backbone's weights and activations; "auto" is bfloat16 on TPU and GPU and
            float32 on CPU. What trains is float32 whatever stands here.
        remat: what the backward pass computes again instead of keeping: "none", every layer
            ("full"), or all but the matrix products ("dots").
    """

    path: str
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: Literal["none", "full", "dots"] = "none"


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """What the prefix is before the first step.

    Attributes:
        start: "text", what a text leaves under the frozen model (the best start on modern models);
            "vocab", the same of tokens drawn at random; "labels", the embeddings of `labels` (soft
            tokens alone); "zeros"; "normal"; "random", the random initialisation of the method's
            own paper; or "prefix", one that was stored before. None takes "text", and "random"
            for the methods adapter, multitask and plus.
        text: for "text", the text, repeated or cut to the prefix's length; None takes the first
            training examples as they are rendered.
        text_file: for "text", a file that holds it: the corpus of a cartridge.
        labels: for "labels", the classes; each takes one slot, with the mean of its tokens'
            embeddings, and the slots that remain are drawn as for "vocab" (Lester et al. 2021).
        top: tokens for "vocab" and "labels" are drawn from so many first ones of the vocabulary,
            which are the most frequent as a rule (5,000 in prompt tuning's paper); None, or more
            than there are, draws from all.
        std: for "normal".
        path: for "prefix", the directory of a stored prefix or of a run.
    """

    start: Literal["text", "vocab", "labels", "zeros", "normal", "random", "prefix"] | None = None
    text: str | None = None
    text_file: str | None = None
    labels: tuple[str, ...] | None = None
    top: int | None = None
    std: float = 0.02
    path: str | None = None

    def __post_init__(self) -> None:
        _require(
            (
                self.text is None or (self.start in (None, "text") and self.text != ""),
                "text is what start: text begins with; it is not empty",
            ),
            (
                self.text_file is None or (self.start in (None, "text") and self.text is None),
                "text_file is what start: text begins with, in place of text",
            ),
            (
                bool(self.labels) == (self.start == "labels"),
                "start: labels needs labels, the names of the classes; nothing else does",
            ),
            (
                self.top is None or self.start in ("vocab", "labels"),
                "top is where start: vocab and start: labels draw tokens from",
            ),
            *_at_least(self, 1, "top"),
            (
                (self.path is not None) == (self.start == "prefix"),
                "start: prefix needs path, the directory of a stored prefix; nothing else does",
            ),
            *_at_least(self, 0, "std"),
        )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where examples come from and how they become tokens.

    Relative paths are relative to the working directory. An example is either an input and a
    target, rendered from templates with `{field}`, or a chat.

    Attributes:
        train: a .jsonl, .csv or .parquet file, or `tfds:NAME/SPLIT`. None when the records come
            from Python.
        dev: like `train`, for evaluation during training; None does without.
        test: like `train`, for the evaluation after training; None does without.
        prepare: what records of a published set need before templates render them: each name
            adds a field (see `data/prepare.py`); None adds nothing.
        input: template of the text that is given; None gives nothing (plain text modelling).
        pair: template of a second text, for a task that reads two; of the text to search, for
            `task.name: span`.
        target: template of the text to learn.
        messages: the field that holds a chat, a list of {"role": …, "content": …}. Excludes
            `input` and `target`; not for encoder-decoders.
        references: the field that holds every acceptable target, for evaluation; None takes the
            rendered target.
        task: the field that names the task of a record, where several train together, each with a
            prefix of its own (`method.name: multitask`); None trains one.
        loss: learn "target" tokens only (of a chat, the assistant's turns) or "all" tokens, which
            an encoder-decoder cannot.
        reduction: the loss of a step is the mean over its target "token"s, or the sum over each
            "example"'s targets, averaged over examples (Li & Liang 2021).
        max_length: tokens of an example at most, the prefix not counted; None allows what the
            backbone's positions allow. For an encoder-decoder, tokens of its input at most.
        truncate: the side on which an example that is too long loses tokens of its input. The
            target is never cut.
        on_overflow: what happens to an example whose target alone is too long.
        pack: put several examples into one row; each still sees itself and the prefix only.
            Behind soft tokens before an encoder, each has a row of its own whatever stands here.
        group_by_source: let targets that share their input meet in one row and share its tokens.
        batch_size: examples per optimizer step, over all hosts and micro-batches.
        tfds_dir: the data directory of TensorFlow Datasets; None takes its default.
    """

    train: str | None = None
    dev: str | None = None
    test: str | None = None
    prepare: Preparing | None = None
    input: str | None = None
    pair: str | None = None
    target: str | None = None
    messages: str | None = None
    references: str | None = None
    task: str | None = None
    loss: Literal["target", "all"] = "target"
    reduction: Literal["token", "example"] = "token"
    max_length: int | None = None
    truncate: Literal["left", "right"] = "left"
    on_overflow: Literal["error", "drop"] = "error"
    pack: bool = True
    group_by_source: bool = False
    batch_size: int = 8
    tfds_dir: str | None = None

    def __post_init__(self) -> None:
        templates = self.input is not None or self.target is not None
        _require(
            (
                not (templates and self.messages is not None),
                "messages excludes input and target: a chat has its own turns",
            ),
            (
                not self.group_by_source or self.pack,
                "group_by_source shares tokens inside packed rows: it needs pack: true",
            ),
            *_at_least(self, 1, "batch_size"),
            *_at_least(self, 2, "max_length"),
        )


TaskName = Literal["generate", "classify", "regress", "tag", "span", "choice"]


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """What is made of a text: more text, or the answer of a head that trains beside the prefix.

    Attributes:
        name: "generate" text; "classify" a text, or a pair of them; "regress" a number; "tag" every
            word; mark the "span" of a text that answers a question; or make a "choice" among texts.
        label: the field of what is to be found: a label; a number; the tags of all words, in a
            list; the answers, as SQuAD has them ({"text": […], "answer_start": […]}); the choice,
            counted from 0.
        labels: the names of the labels, in order; None collects them from the training data,
            sorted. A number in the data counts them from 0.
        words: for "tag", the field that holds the words, in a list.
        choices: for "choice", templates of the texts to choose among. A field that holds a list
            gives one for each of its texts.
        stride: for "span", how many tokens successive windows of a long text share.
        answer_tokens: for "span", how long an answer is at most.
        unanswerable: for "span", whether a question may have no answer (SQuAD 2.0).
        dropout: of the head's input, in training; where the model's own heads have it.
    """

    name: TaskName = "generate"
    label: str = "label"
    labels: tuple[str, ...] | None = None
    words: str = "tokens"
    choices: tuple[str, ...] | None = None
    stride: int = 128
    answer_tokens: int = 30
    unanswerable: bool = False
    dropout: float = 0.1

    def __post_init__(self) -> None:
        _require(
            (
                (self.choices is not None) == (self.name == "choice"),
                "choices are the templates of the texts that name: choice chooses among; give them "
                "there, and there alone",
            ),
            (
                self.labels is None or len(set(self.labels)) == len(self.labels) >= 2,
                "labels names each label once, and at least two",
            ),
            *_at_least(self, 0, "stride"),
            *_at_least(self, 1, "answer_tokens"),
            *_fraction(self, "dropout"),
        )


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """How what trains is updated.

    Attributes:
        name: "adamw" (Loshchilov & Hutter 2019) or "adafactor" (Shazeer & Stern 2018, without
            parameter scaling, as prompt tuning uses it).
        head_learning_rate: the peak of a task's head; None is that of the prefix.
        learning_rate: the peak. What works follows the parameterisation: about 1e-2 for raw keys
            and values, 5e-5 under the paper's MLP, 0.3 for soft prompts with Adafactor.
        schedule: after the warmup, "constant", or "linear" or "cosine" down to 0 at the last step.
        warmup: optimizer steps of linear growth from 0.
        weight_decay: decoupled, times the learning rate.
        clip: the global norm at which gradients of the trained part are clipped; None is off.
        b1: decay of the first moment, AdamW only.
        b2: decay of the second moment, AdamW only.
        eps: added to the root of the second moment, AdamW only.
        accumulate: micro-batches per optimizer step; divides `data.batch_size`.
    """

    name: Literal["adamw", "adafactor"] = "adamw"
    learning_rate: float = 1e-2
    head_learning_rate: float | None = None
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup: int = 0
    weight_decay: float = 0.0
    clip: float | None = 1.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    accumulate: int = 1

    def __post_init__(self) -> None:
        _require(
            (self.learning_rate > 0, f"learning_rate must be positive, not {self.learning_rate}"),
            (
                self.head_learning_rate is None or self.head_learning_rate > 0,
                f"head_learning_rate must be positive, not {self.head_learning_rate}",
            ),
            (self.eps > 0, f"eps must be positive, not {self.eps}"),
            (
                self.clip is None or self.clip > 0,
                f"clip must be positive, or null for no clipping, not {self.clip}",
            ),
            *_at_least(self, 0, "warmup", "weight_decay"),
            *_at_least(self, 1, "accumulate"),
            *_fraction(self, "b1", "b2"),
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long training runs, and what it does on the way.

    Attributes:
        steps: optimizer steps; exactly one of this and `epochs`.
        epochs: passes over the training data, fractions allowed.
        seed: of the initial values, the order of the data and dropout.
        eval_every: optimizer steps between evaluations on `data.dev`; None evaluates at the end.
        checkpoint_every: optimizer steps between checkpoints.
        keep: how many of the latest checkpoints stay on disk; the best one stays besides.
        patience: evaluations without improvement after which training stops; None never does.
        log_every: optimizer steps between lines of metrics.
    """

    steps: int | None = None
    epochs: float | None = None
    seed: int = 0
    eval_every: int | None = None
    checkpoint_every: int = 100
    keep: int = 2
    patience: int | None = None
    log_every: int = 10

    def __post_init__(self) -> None:
        _require(
            (
                (self.steps is None) != (self.epochs is None),
                "give exactly one of steps (optimizer steps) and epochs (passes over the data)"
                + ("; set the other to null" if self.steps is not None else ""),
            ),
            (
                self.epochs is None or self.epochs > 0,
                f"epochs must be positive, not {self.epochs}",
            ),
            (
                self.patience is None or self.eval_every is not None,
                "patience counts evaluations: it needs eval_every",
            ),
            *_at_least(self, 0, "seed"),
            *_at_least(
                self, 1, "steps", "eval_every", "checkpoint_every", "keep", "patience", "log_every"
            ),
        )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are laid out, as `data × fsdp × tensor`; -1 takes the devices that remain.

    Attributes:
        data: copies of the backbone, each with its share of the batch.
        fsdp: shares of every weight, gathered for use; the batch is split here too.
        tensor: shares of every layer's heads and features.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        _require(
            *(
                (size == -1 or size >= 1, f"{axis} must be -1 or at least 1, not {size}")
                for axis, size in sizes.items()
            ),
            (
                list(sizes.values()).count(-1) <= 1,
                "only one of data, fsdp and tensor can be -1 (the devices that remain)",
            ),
        )


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How text is generated.

    Attributes:
        max_new_tokens: tokens generated at most; the start token of an encoder-decoder does not
            count.
        min_new_tokens: tokens before the end of text becomes possible.
        beams: hypotheses kept by beam search; 1 is none.
        length_penalty: a finished beam's score is its log-probability over length to this power.
        early_stopping: stop a beam search as soon as `beams` hypotheses have finished.
        temperature: divides the logits before sampling; 0 is greedy.
        top_k: sample among so many of the likeliest tokens; None is off.
        top_p: sample among the likeliest tokens that reach this probability together (nucleus
            sampling, Holtzman et al. 2020); None is off.
        min_p: drop tokens below this share of the likeliest token's probability; None is off.
        repetition_penalty: divides (positive) or multiplies (negative) the logits of tokens that
            have occurred (Keskar et al. 2019); 1 is off.
        no_repeat_ngram: the length of n-grams that may not occur twice; 0 is off.
        banned_words: texts that are never generated.
        stop: texts that end the generation, and are cut from it.
        samples: continuations per prompt.
        seed: of the sampling.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    banned_words: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        sampling = self.temperature > 0
        _require(
            (
                self.min_new_tokens <= self.max_new_tokens,
                f"min_new_tokens {self.min_new_tokens} exceeds "
                f"max_new_tokens {self.max_new_tokens}",
            ),
            (
                not (sampling and self.beams > 1),
                "beam search does not sample: give beams or a temperature",
            ),
            (
                self.beams <= _MOST_BEAMS,
                f"beams must be {_MOST_BEAMS} at most, not {self.beams}",
            ),
            (
                sampling or self.samples <= self.beams,
                f"samples {self.samples} would be equal to each other: give a temperature, "
                "or as many beams",
            ),
            (
                self.top_p is None or 0 < self.top_p <= 1,
                f"top_p must lie in (0, 1], not {self.top_p}",
            ),
            (
                self.repetition_penalty > 0,
                f"repetition_penalty must be positive, not {self.repetition_penalty}",
            ),
            (
                not any(text == "" for text in (*self.stop, *self.banned_words)),
                "stop and banned_words hold no empty text",
            ),
            *_fraction(self, "min_p"),
            *_at_least(self, 0, "min_new_tokens", "temperature", "no_repeat_ngram", "seed"),
            *_at_least(self, 1, "max_new_tokens", "beams", "top_k", "samples"),
        )


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What is measured on held-out examples.

    Attributes:
        metrics: "loss" (token loss, with its perplexity), "accuracy" (the likeliest of `labels`),
            and of generated text "bleu", "chrf", "rouge1", "rouge2", "rougeL", "rougeLsum" and
            "exact_match". During training the first one alone is measured, and selects the best
            checkpoint.
            Of a task with labels, the loss and what `METRICS_OF` lists: "accuracy", "f1" (of the
            last of two labels, else the mean over all; of entities, for tags; of words, for spans),
            "f1_macro", "matthews", "pearson", "spearman", "exact_match".
        labels: the answers among which accuracy chooses; of generated text alone.
        before: measure the bare model on the test data too, for comparison.
        batch_size: examples at a time.
        limit: examples at most, of each task where there are several; None takes all.
    """

    metrics: tuple[Metric, ...] = ("loss",)
    labels: tuple[str, ...] | None = None
    before: bool = False
    batch_size: int = 16
    limit: int | None = None

    def __post_init__(self) -> None:
        _require(
            (bool(self.metrics), "metrics must name at least one"),
            *_at_least(self, 1, "batch_size", "limit"),
        )


# The metrics of each task.
METRICS_OF: dict[str, tuple[Metric, ...]] = {
    "classify": ("loss", "accuracy", "f1", "f1_macro", "matthews"),
    "regress": ("loss", "pearson", "spearman"),
    "tag": ("loss", "accuracy", "f1"),
    "span": ("loss", "exact_match", "f1"),
    "choice": ("loss", "accuracy"),
}
_OF_LABELS = ("f1", "f1_macro", "matthews", "pearson", "spearman")


def check_metrics(task: TaskName, evaluate: EvaluateConfig) -> None:
    """Raises ConfigError if the metrics are not those of the task."""
    if task == "generate":
        wrong = [metric for metric in evaluate.metrics if metric in _OF_LABELS]
        _require(
            (not wrong, f"evaluate.metrics: {', '.join(wrong)} measure a task.name with labels"),
            (
                "accuracy" not in evaluate.metrics or len(evaluate.labels or ()) >= 2,
                "evaluate: accuracy chooses among labels: give at least two",
            ),
        )
        return
    known = METRICS_OF[task]
    wrong = [metric for metric in evaluate.metrics if metric not in known]
    _require(
        (
            not wrong,
            f"evaluate.metrics: {', '.join(wrong)} cannot measure task.name {task}; "
            f"there are {', '.join(known)}",
        ),
        (
            not evaluate.before,
            "evaluate.before measures the bare language model: a task has no head before training",
        ),
        (
            evaluate.labels is None,
            "evaluate.labels are the texts among which a language model chooses; the labels of a "
            "task are task.labels",
        ),
    )


def default_method() -> dict[str, Any]:
    """What `method` is where a configuration says nothing of it."""
    return {"name": "prefix", "length": 16}


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run.

    Attributes:
        model: the frozen backbone.
        data: examples.
        train: length of the run, evaluation and checkpoints.
        output: the run directory.
        method: what trains, by `name`, with the fields of that method; a bare name in YAML
            (`method: full`) stands for `{name: full}`.
        init: what the prefix is at first.
        optim: optimizer and schedule.
        mesh: layout of the devices.
        decode: generation, for evaluation and for the use of the prefix afterwards.
        evaluate: metrics.
        task: what is made of a text.
    """

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    output: str
    method: dict[str, Any] = dataclasses.field(default_factory=default_method)
    init: InitConfig = InitConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    decode: DecodeConfig = DecodeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    task: TaskConfig = TaskConfig()

    def __post_init__(self) -> None:
        check_metrics(self.task.name, self.evaluate)
        data, generates = self.data, self.task.name == "generate"
        _require(
            (
                not generates or data.target is not None or data.messages is not None,
                "data: give target (a template such as '{text}') or messages (the field of a "
                "chat), or a task.name that learns labels",
            ),
            (
                not generates or data.pair is None,
                "data.pair is the second text of a task with labels: give task.name",
            ),
            (
                generates or (data.target is data.messages is data.references is None),
                f"data: task.name {self.task.name} learns task.label, not a target, messages or "
                "references: leave them out",
            ),
            (
                generates or self.task.name == "tag" or data.input is not None,
                "data: give input, a template of the text to read, such as '{text}'",
            ),
            (
                self.task.name != "tag" or (data.input is data.pair is None),
                "data: task.name tag reads the list of words in the field task.words: leave input "
                "and pair out",
            ),
            (
                self.task.name != "span" or data.pair is not None,
                "data: task.name span looks for the answer to input in pair: give both templates",
            ),
            (
                self.task.name != "choice" or data.pair is None,
                "data: task.name choice pairs the input with each of task.choices: leave pair out",
            ),
            (isinstance(self.method.get("name"), str), "method.name must name a method"),
            (
                self.data.batch_size % self.optim.accumulate == 0,
                f"data.batch_size {self.data.batch_size} does not divide into "
                f"optim.accumulate {self.optim.accumulate} micro-batches",
            ),
        )


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """What can be set when a stored prefix generates.

    Attributes:
        decode: as in `Config`.
    """

    decode: DecodeConfig = DecodeConfig()


@dataclasses.dataclass(frozen=True)
class MeasureConfig(GenerateConfig):
    """What can be set when a stored prefix is measured.

    Attributes:
        evaluate: as in `Config`.
    """

    evaluate: EvaluateConfig = EvaluateConfig()
