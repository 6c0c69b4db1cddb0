"""The sections that say what is made of a prefix: text, and measurements."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal, get_args

from prefix_jax.config.examples import TaskName
from prefix_jax.validation import (
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
_Beams = Annotated[int, Interval(ge=1, le=1024)]
# Every sample of a prompt is a row of the batch.
_Samples = Annotated[int, Interval(ge=1, le=4096)]
# Lengths to a higher power leave float32.
_LengthPenalty = Annotated[float, Interval(ge=-5, le=5)]
# Defaults of what only beam search reads.
_OF_BEAMS = {"length_penalty": 1.0, "early_stopping": False}


@renamed(beams="num_beams", samples="num_samples", no_repeat_ngram="no_repeat_ngram_size")
@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How text is generated. A checkpoint's `generation_config.json` changes none of these
    defaults (`repetition_penalty`, `num_beams`, … are not read): only its end tokens and forced
    tokens count.

    Attributes:
        max_new_tokens: tokens generated at most; the start token of an encoder-decoder does not
            count.
        min_new_tokens: tokens before the end of text becomes possible.
        num_beams: hypotheses kept by beam search; 1 is none.
        length_penalty: a finished beam's score is its log-probability over length to this power;
            between -5 and 5. This and `early_stopping` need `num_beams` above 1.
        early_stopping: when a beam search stops, as in transformers: true as soon as `num_beams`
            hypotheses have finished; false once the best running beam scores no better than the
            worst of them; "never" once it could not even at its best possible length.
        temperature: divides the logits before sampling; 0 is greedy.
        top_k: sample among so many of the likeliest tokens; None is off. This, `top_p` and `min_p`
            need a temperature above 0.
        top_p: sample among the likeliest tokens that reach this probability together (nucleus
            sampling, Holtzman et al. 2020); None is off.
        min_p: drop tokens below this share of the likeliest token's probability; None is off.
        repetition_penalty: divides (positive) or multiplies (negative) the logits of tokens that
            have occurred (Keskar et al. 2019); 1 is off.
        no_repeat_ngram_size: the length of n-grams that may not occur twice; 0 is off.
        banned_words: texts that are never generated.
        stop: texts that end the generation, and are cut from it.
        num_samples: continuations per prompt.
        seed: of the sampling. What is drawn for a record also depends on its place in the file.
    """

    max_new_tokens: Size = 64
    min_new_tokens: Annotated[int, Interval(ge=0, le=2**20)] = 0
    num_beams: _Beams = 1
    length_penalty: _LengthPenalty = 1.0
    early_stopping: bool | Literal["never"] = False
    temperature: NonNegativeFloat = 0.0
    top_k: PositiveInt | None = None
    top_p: Annotated[float, Interval(gt=0, le=1)] | None = None
    min_p: Fraction | None = None
    repetition_penalty: PositiveFloat = 1.0
    no_repeat_ngram_size: Annotated[int, Interval(ge=0, le=1024)] = 0
    banned_words: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    num_samples: _Samples = 1
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)
        sampling = self.temperature > 0
        searching = [name for name in _OF_BEAMS if getattr(self, name) != _OF_BEAMS[name]]
        defaults = ", ".join(f"{name}: {str(_OF_BEAMS[name]).lower()}" for name in searching)
        narrow = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        check_conditions(
            (
                self.min_new_tokens <= self.max_new_tokens,
                f"min_new_tokens {self.min_new_tokens} exceeds "
                f"max_new_tokens {self.max_new_tokens}",
            ),
            (
                not (sampling and self.num_beams > 1),
                "beam search does not sample: give num_beams or a temperature",
            ),
            (
                sampling or not narrow,
                f"{', '.join(narrow)} narrow{'s' * (len(narrow) == 1)} what is drawn: "
                f"{'it needs' if len(narrow) == 1 else 'they need'} a temperature above 0, "
                "and are null without",
            ),
            (
                self.num_beams > 1 or not searching,
                f"{', '.join(searching)} without beam search (num_beams is {self.num_beams}) would "
                f"do nothing; set num_beams above 1, or use the default {defaults}",
            ),
            (
                sampling or self.num_samples <= max(self.num_beams, 1),
                f"num_samples {self.num_samples} would be equal to each other: give a temperature, "
                "or as many beams",
            ),
            (
                not any(text == "" for text in (*self.stop, *self.banned_words)),
                "stop and banned_words hold no empty text",
            ),
        )


@renamed(before="compare_baseline", limit="max_examples")
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
        compare_baseline: measure the bare model on the test data too, for comparison.
        batch_size: examples at a time.
        max_examples: examples at most, of each task where there are several; None takes all.
    """

    metrics: tuple[Metric, ...] = ("loss",)
    labels: tuple[str, ...] | None = None
    compare_baseline: bool = False
    batch_size: Size = 16
    max_examples: PositiveInt | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_conditions((bool(self.metrics), "metrics must name at least one"))


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
        of_text = [metric for metric in get_args(Metric) if metric not in _OF_LABELS]
        check_conditions(
            (
                not wrong,
                f"evaluate.metrics: {', '.join(wrong)} measures predicted labels, and task.name is "
                f"generate; set task.name to one that learns labels, such as classify, or use "
                f"{', '.join(of_text)}",
            ),
            (
                "accuracy" not in evaluate.metrics or len(evaluate.labels or ()) >= 2,
                "evaluate.metrics: accuracy chooses among texts; name at least two as "
                "evaluate.labels (--labels)",
            ),
        )
        return
    known = METRICS_OF[task]
    wrong = [metric for metric in evaluate.metrics if metric not in known]
    check_conditions(
        (
            not wrong,
            f"evaluate.metrics: {', '.join(wrong)} cannot measure task.name {task}; "
            f"there are {', '.join(known)}",
        ),
        (
            not evaluate.compare_baseline,
            "evaluate.compare_baseline measures the bare language model: a task has no head before "
            "training",
        ),
        (
            evaluate.labels is None,
            "evaluate.labels are the texts among which a language model chooses; the labels of a "
            "task are task.labels",
        ),
    )
