"""The sections of a configuration, as frozen dataclasses that check themselves.

The `method` section stays a plain mapping: the methods registry knows which dataclass its name
stands for, and builds it.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from prefix_jax.config.examples import DataConfig, TaskConfig
from prefix_jax.config.results import DecodeConfig, EvaluateConfig, check_metrics
from prefix_jax.nn.remat import Remat
from prefix_jax.validation import (
    Count,
    Fraction,
    Interval,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Seed,
    Size,
    check_conditions,
    check_fields,
    renamed,
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The frozen backbone.

    Attributes:
        path: a directory in Hugging Face layout, a GGUF file, `package:NAME` for the first of
            either inside an installed Python package, or a hub id.
        dtype: the backbone's weights and activations; "auto" is bfloat16 on TPU and GPU and
            float32 on CPU. What trains is float32 whatever stands here.
        quantize: in how many bits the weights' matrices are held while they stay frozen: those of
            `dtype` ("none"); "int8", one scale an output; or "int4", a scale and a zero for every
            32 inputs of an output, the token tables in int8. They are quantised as they load.
        remat: what the backward pass keeps of each layer instead of computing it again, from the
            most memory to the least: all that it needs ("none"), the products of all weight
            matrices and what attention mixes ("dots"), those of the feed-forward ("mlp"), of
            attention's matrices and the feed-forward's first ("projections"), those of
            attention ("attention"), or the layer's input alone ("full").
    """

    path: str
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantize: Literal["none", "int8", "int4"] = "none"
    remat: Remat = "none"

    def __post_init__(self) -> None:
        check_fields(self)


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
    top: PositiveInt | None = None
    std: NonNegativeFloat = 0.02
    path: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_conditions(
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
            (
                (self.path is not None) == (self.start == "prefix"),
                "start: prefix needs path, the directory of a stored prefix; nothing else does",
            ),
        )


@renamed(warmup="warmup_steps", clip="clip_norm", accumulate="grad_accum_steps")
@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """How what trains is updated.

    Attributes:
        name: "adamw" (Loshchilov & Hutter 2019) or "adafactor" (Shazeer & Stern 2018, without
            parameter scaling, as prompt tuning uses it).
        head_learning_rate: the peak of a task's head; None is that of the prefix.
        learning_rate: the peak. What works follows the parameterisation: about 1e-2 for raw keys
            and values, 5e-5 under the paper's MLP, 0.3 for soft prompts with Adafactor.
        schedule: after the warmup, "constant", or "linear" or "cosine" down to 0 at the last step,
            or "exponential", which multiplies the rate by `decay` after every `decay_every` steps.
        warmup_steps: optimizer steps of linear growth from 0.
        decay: of the schedule "exponential".
        decay_every: steps; those of an epoch, as P-tuning v2 has it for tags and spans.
        weight_decay: decoupled, times the learning rate.
        clip_norm: the global norm at which gradients of the trained part are clipped; None is off.
        b1: decay of the first moment, AdamW only.
        b2: decay of the second moment, AdamW only.
        eps: added to the root of the second moment, AdamW only.
        grad_accum_steps: micro-batches per optimizer step; divides `data.batch_size`.
    """

    name: Literal["adamw", "adafactor"] = "adamw"
    learning_rate: PositiveFloat = 1e-2
    head_learning_rate: PositiveFloat | None = None
    schedule: Literal["constant", "linear", "cosine", "exponential"] = "linear"
    warmup_steps: Count = 0
    decay: Annotated[float, Interval(gt=0, le=1)] = 0.95
    decay_every: PositiveInt | None = None
    weight_decay: NonNegativeFloat = 0.0
    clip_norm: PositiveFloat | None = 1.0
    b1: Fraction = 0.9
    b2: Fraction = 0.999
    eps: PositiveFloat = 1e-8
    grad_accum_steps: Size = 1

    def __post_init__(self) -> None:
        check_fields(self)
        check_conditions(
            (
                (self.schedule == "exponential") == (self.decay_every is not None),
                "schedule: exponential needs decay_every, the steps after which the rate falls; "
                "nothing else does",
            ),
        )


@renamed(keep="keep_checkpoints", profile="profile_steps")
@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long training runs, and what it does on the way.

    Attributes:
        steps: optimizer steps; exactly one of this and `epochs`.
        epochs: passes over the training data, fractions allowed.
        seed: of the initial values, the order of the data and dropout.
        eval_every: optimizer steps between evaluations on `data.dev`; None evaluates at the end.
        checkpoint_every: optimizer steps between checkpoints.
        keep_checkpoints: number of latest checkpoints to keep, in addition to the best one.
        patience: evaluations without improvement after which training stops; None never does.
        log_every: optimizer steps between lines of metrics.
        profile_steps: number of steps to trace for XProf, starting with the third; None is off.
    """

    steps: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    seed: Seed = 0
    eval_every: PositiveInt | None = None
    checkpoint_every: PositiveInt = 100
    keep_checkpoints: PositiveInt = 2
    patience: PositiveInt | None = None
    log_every: PositiveInt = 10
    profile_steps: PositiveInt | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_conditions(
            (
                (self.steps is None) != (self.epochs is None),
                "give exactly one of steps (optimizer steps) and epochs (passes over the data)"
                + ("; set the other to null" if self.steps is not None else ""),
            ),
            (
                self.patience is None or self.eval_every is not None,
                "patience counts evaluations: it needs eval_every",
            ),
        )


# -1 for the devices that remain.
_Devices = Annotated[int, Interval(ge=-1, le=2**15)]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are laid out, as `data × fsdp × sequence × tensor`; -1 takes the devices that
    remain.

    Attributes:
        data: copies of the backbone, each with its share of the batch.
        fsdp: shares of every weight, gathered for use; the batch is split here too.
        tensor: shares of every layer's heads and features.
        sequence: shares of the columns of every row, and of weights as with fsdp: for rows that
            are too long for a device, or fewer than devices.
        auto: choose the sizes, by compiling the step for a few (see docs/plan.md); TPUs only. A
            bare word in YAML, `mesh: auto`, stands for `{auto: true}`.
    """

    data: _Devices = -1
    fsdp: _Devices = 1
    tensor: _Devices = 1
    sequence: _Devices = 1
    auto: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        """Of the axes, by name."""
        return {
            "data": self.data,
            "fsdp": self.fsdp,
            "sequence": self.sequence,
            "tensor": self.tensor,
        }

    def __post_init__(self) -> None:
        check_fields(self)
        sizes = self.sizes
        check_conditions(
            (
                not self.auto or sizes == MeshConfig().sizes,
                "auto chooses data, fsdp, sequence and tensor: leave them out",
            ),
            *(
                (size != 0, f"{axis} must be -1 or at least 1, got 0")
                for axis, size in sizes.items()
            ),
            (
                list(sizes.values()).count(-1) <= 1,
                "only one of data, fsdp, sequence and tensor can be -1 (the devices that remain)",
            ),
        )


def default_method() -> dict[str, Any]:
    """What `method` is where a configuration says nothing of it."""
    return {"name": "prefix", "length": 16}


@renamed(output="output_dir")
@dataclasses.dataclass(frozen=True)
class Config:
    """One training run.

    Attributes:
        model: the frozen backbone.
        data: examples.
        train: length of the run, evaluation and checkpoints.
        output_dir: the run directory.
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
    output_dir: str
    method: dict[str, Any] = dataclasses.field(default_factory=default_method)
    init: InitConfig = InitConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    decode: DecodeConfig = dataclasses.field(default_factory=DecodeConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        check_metrics(self.task.name, self.evaluate)
        data, generates = self.data, self.task.name == "generate"
        check_conditions(
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
                self.data.batch_size % self.optim.grad_accum_steps == 0,
                f"data.batch_size {self.data.batch_size} does not divide into "
                f"optim.grad_accum_steps {self.optim.grad_accum_steps} micro-batches",
            ),
        )


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """What can be set when a stored prefix generates.

    Attributes:
        decode: as in `Config`.
    """

    decode: DecodeConfig = dataclasses.field(default_factory=DecodeConfig)


@dataclasses.dataclass(frozen=True)
class MeasureConfig(GenerateConfig):
    """What can be set when a stored prefix is measured.

    Attributes:
        evaluate: as in `Config`.
    """

    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
