"""The sections of a run's configuration, as frozen dataclasses that check themselves.

The `method` section stays a mapping, because `methods` builds it: every method has its own fields.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from prefix_jax.config.data import DataConfig
from prefix_jax.config.decode import DecodeConfig
from prefix_jax.config.evaluate import EvaluateConfig
from prefix_jax.config.task import TaskConfig
from prefix_jax.nn.remat import Remat
from prefix_jax.validation import (
    Count,
    Fraction,
    Interval,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Seed,
    Share,
    Size,
    check_conditions,
    check_fields,
    renamed,
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The frozen backbone.

    Attributes:
        path: a directory in Hugging Face layout, a GGUF file, `package:NAME` for either of these
            inside an installed Python package, or a hub id.
        dtype: type of the weights and activations; "auto" is bfloat16 on TPU and GPU, and float32
            on CPU. Trainable parameters are always float32.
        quantize: storage of the frozen weight matrices, which are quantized as they load: "none"
            keeps `dtype`; "int8" has one scale per output; "int4" has a scale and a zero point per
            32 inputs of an output, and int8 token tables.
        remat: activations that each layer saves for the backward pass, from the most memory to the
            least: "none" saves all; "dots" the products of all weight matrices and the output of
            attention; "mlp" the products of the feed-forward network; "projections" those of
            attention and the first of the feed-forward network; "attention" those of attention;
            "full" only the layer's input.
    """

    path: str
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantize: Literal["none", "int8", "int4"] = "none"
    remat: Remat = "none"

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Initialization of the prefix.

    Attributes:
        start: "text", the frozen model's cache after reading a text (the best start for modern
            models); "vocab", the same for random tokens; "labels", the embeddings of `labels` (soft
            tokens only); "zeros"; "normal"; "random", the initialization of the method's paper; or
            "prefix", a stored prefix. None is "text", or "random" for the methods adapter,
            multitask and plus.
        text: for "text", the text, repeated or cut to the prefix's length; None for the first
            rendered training examples.
        text_file: for "text", a file with the text, such as the corpus of a cartridge.
        labels: for "labels", the names of the classes. Each fills one slot with the mean of its
            token embeddings; the other slots are drawn as for "vocab" (Lester et al. 2021).
        top: for "vocab" and "labels", draw from this many tokens at the start of the vocabulary,
            usually the most frequent ones (5,000 in prompt tuning's paper); None for all.
        std: for "normal", the standard deviation.
        path: for "prefix", the directory of a stored prefix or a run.
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
                "text must not be empty, and requires start: text",
            ),
            (
                self.text_file is None or (self.start in (None, "text") and self.text is None),
                "text_file requires start: text and excludes text",
            ),
            (
                bool(self.labels) == (self.start == "labels"),
                "labels and start: labels require each other; give both or neither",
            ),
            (
                self.top is None or self.start in ("vocab", "labels"),
                "top requires start: vocab or start: labels",
            ),
            (
                (self.path is not None) == (self.start == "prefix"),
                "path and start: prefix require each other; give both or neither",
            ),
        )


@renamed(warmup="warmup_steps", clip="clip_norm", accumulate="grad_accum_steps")
@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning rate schedule.

    Attributes:
        name: "adamw" (Loshchilov & Hutter 2019) or "adafactor" (Shazeer & Stern 2018, without
            parameter scaling, as in prompt tuning).
        learning_rate: peak learning rate. It depends on the parameterization: about 1e-2 for keys
            and values, 5e-5 for the paper's MLP, 0.3 for soft prompts with Adafactor.
        head_learning_rate: peak learning rate of the task's head; None for `learning_rate`.
        schedule: after the warmup, "constant"; "linear" or "cosine" decay to 0 at the last step; or
            "exponential", which multiplies the rate by `decay` every `decay_every` steps.
        warmup_steps: optimizer steps of linear warmup from 0.
        decay: factor of the exponential schedule.
        decay_every: steps between decays of the exponential schedule; P-tuning v2 uses the steps
            of an epoch for tags and spans.
        weight_decay: decoupled weight decay, multiplied by the learning rate.
        clip_norm: maximum global norm of the trainable parameters' gradients; None is off.
        b1: decay of the first moment (AdamW).
        b2: decay of the second moment (AdamW).
        eps: added to the root of the second moment (AdamW).
        grad_accum_steps: micro-batches per optimizer step; must divide `data.batch_size`.
    """

    name: Literal["adamw", "adafactor"] = "adamw"
    learning_rate: PositiveFloat = 1e-2
    head_learning_rate: PositiveFloat | None = None
    schedule: Literal["constant", "linear", "cosine", "exponential"] = "linear"
    warmup_steps: Count = 0
    decay: Share = 0.95
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
                "decay_every and schedule: exponential require each other; give both or neither",
            ),
        )


@renamed(keep="keep_checkpoints", profile="profile_steps")
@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length of training, evaluation, checkpoints and logging.

    Attributes:
        steps: optimizer steps; give exactly one of `steps` and `epochs`.
        epochs: passes over the training data; may be a fraction.
        seed: seed for initialization, data order and dropout.
        eval_every: optimizer steps between evaluations on `data.dev`; None for one at the end.
        checkpoint_every: optimizer steps between checkpoints.
        keep_checkpoints: number of latest checkpoints to keep, in addition to the best one.
        patience: number of evaluations without improvement after which training stops; None never
            stops early.
        log_every: optimizer steps between lines of metrics.
        profile_steps: number of steps to trace for XProf, starting with the third; None is off.
        speculative_ngrams: store an n-gram table of the training targets with a prefix that
            generates text, at most 256 KiB of hashed contexts and token ids, from which the engine
            drafts tokens for speculative decoding.
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
    speculative_ngrams: bool = True

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
                "patience counts evaluations; set eval_every",
            ),
        )


# -1 stands for the remaining devices.
_Devices = Annotated[int, Interval(ge=-1, le=2**15)]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Layout of the devices, `data × fsdp × sequence × tensor`; -1 uses the remaining devices.

    Attributes:
        data: replicas of the backbone, which divide the batch.
        fsdp: shards of every weight, gathered for use; they divide the batch, too.
        tensor: shards of every layer's heads and features.
        sequence: shards of the columns of every row, and of the weights as in `fsdp`; for rows that
            are too long for one device, or batches with fewer rows than devices.
        auto: choose the sizes by compiling the step for several candidates (see docs/plan.md); TPUs
            only. `mesh: auto` in YAML stands for `{auto: true}`.
    """

    data: _Devices = -1
    fsdp: _Devices = 1
    tensor: _Devices = 1
    sequence: _Devices = 1
    auto: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the axes, by name."""
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
                "auto chooses data, fsdp, sequence and tensor; leave them out",
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
    """Returns the default of the `method` section."""
    return {"name": "prefix", "length": 16}


@renamed(output="output_dir")
@dataclasses.dataclass(frozen=True)
class Config:
    """Configuration of a training run.

    Attributes:
        model: the frozen backbone.
        data: training and evaluation data.
        train: length of the run, evaluation and checkpoints.
        output_dir: the run directory, local or `gs://BUCKET/PATH`.
        method: the tuning method by `name`, with its fields; `method: full` in YAML stands for
            `{name: full}`.
        init: initialization of the prefix.
        optim: optimizer and schedule.
        mesh: layout of the devices.
        decode: generation settings, in evaluation and as defaults of the stored prefix.
        evaluate: metrics.
        task: what the model is asked to do.
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
        data = self.data
        method = self.method.get("name")
        check_conditions(
            (method is not None, "method.name is missing; name a method"),
            (
                isinstance(method, str | None),
                f"method.name must be the name of a method, got {method!r}",
            ),
            (
                data.batch_size % self.optim.grad_accum_steps == 0,
                f"data.batch_size {data.batch_size} is not divisible by optim.grad_accum_steps "
                f"{self.optim.grad_accum_steps}",
            ),
        )


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Settings for generating with a stored prefix.

    Attributes:
        decode: as in `Config`.
    """

    decode: DecodeConfig = dataclasses.field(default_factory=DecodeConfig)


@dataclasses.dataclass(frozen=True)
class MeasureConfig(GenerateConfig):
    """Settings for evaluating a stored prefix.

    Attributes:
        evaluate: as in `Config`.
    """

    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
