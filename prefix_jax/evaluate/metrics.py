"""Corpus metrics of generated text, by name, each with the signature that makes it comparable.

All of them are percentages, 0 to 100, and all take several references per prediction. BLEU and
chrF are sacrebleu's, ROUGE is Google's rouge-score.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.metadata
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Any

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from prefix_jax.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class Score:
    """A metric's value and how it was computed.

    Attributes:
        value: percent.
        signature: options and library version, to be reported with the value (Post 2018).
    """

    value: float
    signature: str


Metric = Callable[[Sequence[str], Sequence[Sequence[str]]], Score]


def measure(
    names: Iterable[str], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, Score]:
    """Scores predictions against their references.

    Args:
        names: of `METRICS`.
        predictions: one text per input; empty texts are allowed, and score low.
        references: for each prediction one or more texts, not necessarily equally many.

    Raises:
        ConfigError: a name is unknown.
        DataError: there are no predictions, or one of them has no reference.
    """
    metrics = {name: _find(name) for name in names}
    if len(predictions) != len(references):
        raise DataError(
            f"{len(predictions)} predictions came with {len(references)} sets of references: "
            "give one set for each"
        )
    if not predictions:
        raise DataError("there are no predictions to score")
    for i, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise DataError(f"references[{i}] is {texts!r}: expected one or more texts in a list")
    return {name: metric(predictions, references) for name, metric in metrics.items()}


def score(
    names: Iterable[str], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """The values of `measure` alone."""
    scores = measure(names, predictions, references)
    return {name: found.value for name, found in scores.items()}


def _find(name: str) -> Metric:
    if name in METRICS:
        return METRICS[name]
    near = difflib.get_close_matches(name, METRICS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"unknown metric {name!r}: {hint}there are {', '.join(METRICS)}")


def _sacrebleu(
    kind: type[BLEU] | type[CHRF],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
) -> Score:
    """BLEU (Papineni et al. 2002) or chrF (Popović 2015), with sacrebleu's defaults."""
    metric = kind()
    # sacrebleu wants the first reference of every input, then the second …, None where none is.
    streams = list(itertools.zip_longest(*references))
    value = metric.corpus_score(predictions, streams).score
    return Score(float(value), str(metric.get_signature()))


def _rouge(kind: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """ROUGE (Lin 2004): mean over the inputs of the best F1 over the references, stemmed.

    rouge-score knows the letters a to z and the digits alone: any other script scores 0.
    """
    # Imported here because it brings NLTK, whose import takes a second.
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([kind], use_stemmer=True)
    best = [
        scorer.score_multi(texts, prediction)[kind].fmeasure
        for prediction, texts in zip(predictions, references, strict=True)
    ]
    version = importlib.metadata.version("rouge-score")
    return Score(
        100 * float(sum(best)) / len(best),
        f"{kind}|refs:best-f1|stem:porter|tok:a-z0-9|mean:inputs|version:{version}",
    )


def _exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """How often the prediction is one of the references, but for the amount of whitespace."""

    def plain(texts: Sequence[str]) -> list[str]:
        return [" ".join(text.split()) for text in texts]

    hits = _hits(plain(predictions), [plain(texts) for texts in references])
    return Score(hits, "refs:any|case:mixed|space:normalised")


def _final_number(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """How often the last number of the prediction is the last one of a reference.

    The usual reading of answers to GSM8K (Cobbe et al. 2021): the reasoning before is not looked
    at, and "1,000", "$1000" and "1000.0" are one number.
    """

    def last(text: str) -> Decimal:
        found = _NUMBER.findall(text)
        # A NaN equals no other: a text without a number is never right. Decimals compare exactly.
        return Decimal(found[-1].replace(",", "") if found else "NaN")

    wanted = [[last(text) for text in texts] for texts in references]
    return Score(_hits([last(text) for text in predictions], wanted), "refs:any|number:last")


# A comma stands between groups of three digits alone, and a full stop inside a number alone.
_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def _accuracy(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """How often the predicted label is a right one, to the letter."""
    return Score(_hits(predictions, references), "refs:any|case:mixed|space:exact")


def _hits(predictions: Sequence[Any], references: Sequence[Sequence[Any]]) -> float:
    pairs = zip(predictions, references, strict=True)
    return 100 * sum(prediction in texts for prediction, texts in pairs) / len(predictions)


METRICS: dict[str, Metric] = {
    "bleu": functools.partial(_sacrebleu, BLEU),
    "chrf": functools.partial(_sacrebleu, CHRF),
    **{
        kind: functools.partial(_rouge, kind)
        for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum")
    },
    "exact_match": _exact_match,
    "final_number": _final_number,
    "accuracy": _accuracy,
}
"""The metrics that `measure` knows. rougeLsum takes every line for a sentence."""
