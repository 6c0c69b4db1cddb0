"""Corpus metrics for generated text, by name, with signatures that make scores comparable.

All metrics are percentages, 0 to 100, and accept several references per prediction. BLEU and chrF
come from sacrebleu, ROUGE from Google's rouge-score.
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
        signature: options and library version, to report with the value (Post 2018).
    """

    value: float
    signature: str


Metric = Callable[[Sequence[str], Sequence[Sequence[str]]], Score]


def measure(
    names: Iterable[str], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, Score]:
    """Scores predictions against their references.

    Args:
        names: keys of `METRICS`.
        predictions: one text per input; empty texts are allowed, and score low.
        references: one or more texts per prediction; their number may vary.

    Raises:
        ConfigError: a name is unknown.
        DataError: there are no predictions, or one of them has no reference.
    """
    metrics = {name: _find(name) for name in names}
    if len(predictions) != len(references):
        raise DataError(
            f"got {len(predictions)} predictions and {len(references)} lists of references; "
            "give one list per prediction"
        )
    if not predictions:
        raise DataError("there are no predictions to score")
    for i, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise DataError(f"references[{i}]: expected a non-empty list of texts, got {texts!r}")
    return {name: metric(predictions, references) for name, metric in metrics.items()}


def score(
    names: Iterable[str], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Returns only the values of `measure`."""
    scores = measure(names, predictions, references)
    return {name: found.value for name, found in scores.items()}


def _find(name: str) -> Metric:
    if name in METRICS:
        return METRICS[name]
    near = difflib.get_close_matches(name, METRICS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"unknown metric {name!r}: {hint}choose from {', '.join(METRICS)}")


def _sacrebleu(
    kind: type[BLEU] | type[CHRF],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
) -> Score:
    """Computes BLEU (Papineni et al. 2002) or chrF (Popović 2015) with sacrebleu's defaults."""
    metric = kind()
    # sacrebleu expects the first reference of every input, then the second, …; None if missing.
    streams = list(itertools.zip_longest(*references))
    value = metric.corpus_score(predictions, streams).score
    return Score(float(value), str(metric.get_signature()))


def _rouge(kind: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Computes stemmed ROUGE (Lin 2004): the best F1 over the references, averaged over the inputs.

    rouge-score recognises only the letters a to z and digits: text in other scripts scores 0.
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
    """Counts predictions that equal a reference, ignoring differences in whitespace."""

    def plain(texts: Sequence[str]) -> list[str]:
        return [" ".join(text.split()) for text in texts]

    hits = _hits(plain(predictions), [plain(texts) for texts in references])
    return Score(hits, "refs:any|case:mixed|space:normalised")


def _final_number(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Counts predictions whose last number equals the last number of a reference.

    This is the usual metric for GSM8K (Cobbe et al. 2021): it ignores the reasoning before the
    number, and "1,000", "$1000" and "1000.0" are equal.
    """

    def last(text: str) -> Decimal:
        found = _NUMBER.findall(text)
        # NaN equals nothing, so a text without a number is never correct. Decimals compare exactly.
        return Decimal(found[-1].replace(",", "") if found else "NaN")

    wanted = [[last(text) for text in texts] for texts in references]
    return Score(_hits([last(text) for text in predictions], wanted), "refs:any|number:last")


# Commas only separate groups of three digits, and a full stop must be inside a number.
_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def _accuracy(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Counts predicted labels that exactly equal a reference."""
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
"""The metrics that `measure` supports. rougeLsum treats every line as a sentence."""
