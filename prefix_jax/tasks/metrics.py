"""Metrics: functions of predicted and correct answers.

Scores are percentages, 0 to 100, with signatures that make them comparable. BLEU and chrF come from
sacrebleu, ROUGE from Google's rouge-score, F1 and Matthews correlation from scikit-learn, Pearson
and Spearman correlation from scipy, and entity F1 from seqeval, which scores like CoNLL's script.
Exact match and F1 of spans follow SQuAD's script.

Libraries are imported where they are used, because some of them take a second.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import functools
import importlib.metadata
import itertools
import re
import string
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Any, Literal

import numpy as np

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


# (predicted, correct) → score, with one item per input.
Scorer = Callable[[Sequence[Any], Sequence[Any]], Score]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of a task, and the outputs of the model that it needs.

    Attributes:
        reads: "likelihood" of the targets; the likeliest "label" for each input, among texts;
            generated "text"; or the outputs of the task's "head".
        score: compares predicted and correct answers; None for the loss, which the model computes.
    """

    reads: Literal["likelihood", "label", "text", "head"]
    score: Scorer | None = None


def head_metrics(**scorers: Scorer) -> dict[str, Metric]:
    """Returns the metrics of a task with a head: its loss, and these."""
    return {"loss": Metric("head")} | {name: Metric("head", f) for name, f in scorers.items()}


def unknown_metric(name: str, known: Iterable[str]) -> str:
    """Returns a message about a metric that does not exist."""
    near = difflib.get_close_matches(name, known := [*known], n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown metric {name!r}: {hint}choose from {', '.join(known)}"


# Generated text. Every prediction is compared with one or more references.


def measure(
    names: Iterable[str], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, Score]:
    """Scores texts against their references.

    Args:
        names: keys of `TEXT_METRICS`.
        predictions: one text per input; empty texts are allowed, and score low.
        references: one or more texts per prediction; their number may vary.

    Raises:
        ConfigError: a name is unknown.
        DataError: there are no predictions, or one of them has no reference.
    """
    names = list(names)
    for name in names:
        if name not in TEXT_METRICS:
            raise ConfigError(unknown_metric(name, TEXT_METRICS))
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
    return {name: TEXT_METRICS[name](predictions, references) for name in names}


def score(
    names: Iterable[str], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Returns only the values of `measure`."""
    scores = measure(names, predictions, references)
    return {name: result.value for name, result in scores.items()}


def _bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Computes BLEU (Papineni et al. 2002) with sacrebleu's defaults."""
    from sacrebleu.metrics.bleu import BLEU

    return _sacrebleu(BLEU(), predictions, references)


def _chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Computes chrF (Popović 2015) with sacrebleu's defaults."""
    from sacrebleu.metrics.chrf import CHRF

    return _sacrebleu(CHRF(), predictions, references)


def _sacrebleu(
    metric: Any, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> Score:
    # sacrebleu expects the first reference of every input, then the second, …; None if missing.
    streams = list(itertools.zip_longest(*references))
    value = metric.corpus_score(predictions, streams).score
    return Score(float(value), str(metric.get_signature()))


def _rouge(kind: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Computes stemmed ROUGE (Lin 2004): the best F1 over the references, averaged over the inputs.

    rouge-score recognises only the letters a to z and digits: text in other scripts scores 0.
    """
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
        numbers = _NUMBER.findall(text)
        # NaN equals nothing, so a text without a number is never correct. Decimals compare exactly.
        return Decimal(numbers[-1].replace(",", "") if numbers else "NaN")

    wanted = [[last(text) for text in texts] for texts in references]
    return Score(_hits([last(text) for text in predictions], wanted), "refs:any|number:last")


# Commas only separate groups of three digits, and a full stop must be inside a number.
_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def _label_accuracy(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Counts predicted labels that exactly equal a reference."""
    return Score(_hits(predictions, references), "refs:any|case:mixed|space:exact")


def _hits(predictions: Sequence[Any], references: Sequence[Sequence[Any]]) -> float:
    pairs = zip(predictions, references, strict=True)
    return 100 * sum(prediction in texts for prediction, texts in pairs) / len(predictions)


TEXT_METRICS: dict[str, Scorer] = {
    "bleu": _bleu,
    "chrf": _chrf,
    **{
        kind: functools.partial(_rouge, kind)
        for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum")
    },
    "exact_match": _exact_match,
    "final_number": _final_number,
    "accuracy": _label_accuracy,
}
"""The metrics that `measure` supports. rougeLsum treats every line as a sentence."""


# Classes and values.


def accuracy(predicted: Sequence[Any], correct: Sequence[Any]) -> Score:
    """Counts correct answers."""
    return Score(100 * float(np.mean(np.array(predicted) == np.array(correct))), "inputs")


def f1(predicted: Sequence[int], correct: Sequence[int], labels: int, average: str = "") -> Score:
    """Computes F1 of classes.

    Args:
        predicted: classes.
        correct: classes.
        labels: the number of classes.
        average: "macro" averages over all classes; "" is the F1 of the last of two classes, and the
            macro average of more.
    """
    import sklearn.metrics

    average = average or ("binary" if labels == 2 else "macro")
    options: dict[str, Any] = {"average": average, "zero_division": 0}
    options |= {"labels": [*range(labels)]} if average == "macro" else {"pos_label": 1}
    value = sklearn.metrics.f1_score(correct, predicted, **options)
    return Score(100 * float(value), f"average:{average}|{_version('scikit-learn')}")


def matthews(predicted: Sequence[int], correct: Sequence[int]) -> Score:
    """Computes Matthews correlation."""
    import sklearn.metrics

    value = sklearn.metrics.matthews_corrcoef(correct, predicted)
    return Score(100 * float(value), _version("scikit-learn"))


def pearson(predicted: Sequence[float], correct: Sequence[float]) -> Score:
    """Computes Pearson correlation; NaN for one value."""
    import scipy.stats

    value = scipy.stats.pearsonr(predicted, correct).statistic if len(predicted) > 1 else np.nan
    return Score(100 * float(value), _version("scipy"))


def spearman(predicted: Sequence[float], correct: Sequence[float]) -> Score:
    """Computes Spearman correlation; NaN for one value."""
    import scipy.stats

    value = scipy.stats.spearmanr(predicted, correct).statistic if len(predicted) > 1 else np.nan
    return Score(100 * float(value), _version("scipy"))


# Tags: a list of names per input.


def word_accuracy(predicted: Sequence[Sequence[str]], correct: Sequence[Sequence[str]]) -> Score:
    """Counts correct tags over all words."""
    pairs = [
        pair
        for tags, references in zip(predicted, correct, strict=True)
        for pair in zip(tags, references, strict=True)
    ]
    return Score(100 * sum(tag == reference for tag, reference in pairs) / len(pairs), "words")


def entity_f1(predicted: Sequence[Sequence[str]], correct: Sequence[Sequence[str]]) -> Score:
    """Computes F1 of whole entities (B-PER I-PER)."""
    import seqeval.metrics

    value = seqeval.metrics.f1_score(list(correct), list(predicted), zero_division=0)
    return Score(100 * float(value), f"entities|average:micro|{_version('seqeval')}")


# Spans: a text per input, and the correct texts.


def squad_exact_match(predicted: Sequence[str], correct: Sequence[Sequence[str]]) -> Score:
    """Counts answers that equal a correct one after SQuAD's normalisation."""

    def hit(text: str, references: Sequence[str]) -> bool:
        return any(_squad_words(text) == _squad_words(reference) for reference in references)

    hits = [hit(*pair) for pair in zip(predicted, correct, strict=True)]
    return Score(100 * float(np.mean(hits)), "squad")


def squad_f1(predicted: Sequence[str], correct: Sequence[Sequence[str]]) -> Score:
    """Computes F1 of words, for the best of the correct answers."""

    def best(text: str, references: Sequence[str]) -> float:
        words = _squad_words(text)
        return max(_overlap(words, _squad_words(reference)) for reference in references)

    values = [best(*pair) for pair in zip(predicted, correct, strict=True)]
    return Score(100 * float(np.mean(values)), "squad")


def _squad_words(text: str) -> list[str]:
    """Normalises an answer as SQuAD does: lower-case words without punctuation or articles."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _overlap(words: list[str], correct: list[str]) -> float:
    """Computes the F1 of words; if either list is empty, 1 if both are and else 0."""
    if not words or not correct:
        return float(words == correct)
    same = sum((collections.Counter(words) & collections.Counter(correct)).values())
    return 2 * same / (len(words) + len(correct))


def _version(library: str) -> str:
    return f"{library}:{importlib.metadata.version(library)}"
