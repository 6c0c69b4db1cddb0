"""Decodes and scores the answers of a head: labels, values, tags, spans and choices.

Scores are percentages, like those of generated text. F1 and Matthews correlation come from
scikit-learn, Pearson and Spearman correlation from scipy, and entity F1 from seqeval, which scores
like CoNLL's script. Exact match and F1 of spans follow SQuAD's script.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.metadata
import re
import string
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import scipy.special
import scipy.stats
import seqeval.metrics
import sklearn.metrics

from prefix_jax.config import TaskConfig
from prefix_jax.data.batch import Example
from prefix_jax.errors import DataError
from prefix_jax.evaluate.metrics import Score
from prefix_jax.evaluate.report import Prediction

# Maximum number of span starts and ends to pair, as in the question-answering example of
# transformers.
_BEST = 20


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer for one input.

    Attributes:
        prediction: the answer for people and files.
        found, right: the predicted and the correct answer that metrics compare: a class, a value,
            the tags of all words, a text (with a tuple of correct texts), or the index of a choice.
            `right` is None if it is unknown.
    """

    prediction: Prediction
    found: Any
    right: Any


def read_answers(
    task: TaskConfig, examples: Sequence[Example], outputs: Sequence[np.ndarray]
) -> list[Answer]:
    """Decodes the outputs of a head.

    Args:
        task: the task, with its labels.
        examples: the examples.
        outputs: out_MY of each example, without padding.

    Returns:
        One answer per example; for spans, one per question.
    """
    if task.name == "span":
        return _spans(task, examples, outputs)
    read = {"classify": _class, "regress": _value, "tag": _tags, "choice": _choice}[task.name]
    return [read(task, example, out) for example, out in zip(examples, outputs, strict=True)]


def score_answers(
    task: TaskConfig, names: Iterable[str], answers: Sequence[Answer]
) -> dict[str, Score]:
    """Scores answers using the named metrics.

    Raises:
        DataError: there are no answers, or a correct answer is unknown.
    """
    if not answers or any(answer.right is None for answer in answers):
        raise DataError("there is nothing to score: the examples have no labels")
    found, right = [a.found for a in answers], [a.right for a in answers]
    with warnings.catch_warnings():
        # If a label never occurs, or all values are equal, libraries warn and return 0 or NaN.
        warnings.simplefilter("ignore")
        return {name: _METRICS[task.name, name](task, found, right) for name in names}


# Outputs → answers.


def _made(example: Example, text: str, scores: dict[str, float] | None = None) -> Prediction:
    return Prediction(example.source, example.prompt, text, example.references, scores)


def _class(task: TaskConfig, example: Example, out_MY: np.ndarray) -> Answer:
    names = task.labels or ()
    probabilities = scipy.special.softmax(out_MY[0].astype(np.float64))
    best = int(probabilities.argmax())
    scores = {name: float(p) for name, p in zip(names, probabilities, strict=True)}
    right = int(example.label_M[0]) if example.references else None
    return Answer(_made(example, names[best], scores), best, right)


def _value(_: TaskConfig, example: Example, out_MY: np.ndarray) -> Answer:
    value = float(out_MY[0, 0])
    right = float(example.label_M[0]) if example.references else None
    return Answer(_made(example, f"{value:.6g}"), value, right)


def _tags(task: TaskConfig, example: Example, out_MY: np.ndarray) -> Answer:
    names = task.labels or ()
    tags = [names[best] for best in out_MY.argmax(axis=1)]
    right = list(example.references) if example.references else None
    made = dataclasses.replace(_made(example, " ".join(tags)), references=())
    if right is not None:
        made = dataclasses.replace(made, references=(" ".join(right),))
    return Answer(made, tags, right)


def _choice(_: TaskConfig, example: Example, out_MY: np.ndarray) -> Answer:
    probabilities = scipy.special.softmax(out_MY[:, 0].astype(np.float64))
    best = int(probabilities.argmax())
    scores = {str(i): float(p) for i, p in enumerate(probabilities)}
    right = int(example.label_M.argmax()) if example.references else None
    return Answer(_made(example, example.choices[best], scores), best, right)


def _spans(
    task: TaskConfig, examples: Sequence[Example], outputs: Sequence[np.ndarray]
) -> list[Answer]:
    windows: dict[int, list[tuple[Example, np.ndarray]]] = {}
    for example, out in zip(examples, outputs, strict=True):
        assert example.window is not None  # as the examples of this task have it
        windows.setdefault(example.window.question, []).append((example, out))
    answers = []
    for of_question in windows.values():
        texts = [_best_span(task, example, out) for example, out in of_question]
        score, text = max(texts, key=lambda pair: pair[0])
        # The score of "no answer" is the minimum over the windows.
        nothing = min(float(out[0].sum()) for _, out in of_question)
        if task.unanswerable and nothing > score:
            text = ""
        example = of_question[0][0]
        made = _made(example, text, {"span": score, "none": nothing})
        answers.append(Answer(made, text, example.references or None))
    return answers


def _best_span(task: TaskConfig, example: Example, out_T2: np.ndarray) -> tuple[float, str]:
    """Returns the best span of a window with its score, the sum of start and end logits."""
    window = example.window
    assert window is not None
    inside = np.flatnonzero(window.offset_T2[:, 0] >= 0)
    starts, ends = (inside[np.argsort(-out_T2[inside, i], kind="stable")[:_BEST]] for i in (0, 1))
    spans = [
        (float(out_T2[start, 0] + out_T2[end, 1]), int(start), int(end))
        for start in starts
        for end in ends
        if start <= end < start + task.answer_tokens
    ]
    if not spans:
        return -np.inf, ""
    score, start, end = max(spans, key=lambda span: span[0])
    return score, window.context[window.offset_T2[start, 0] : window.offset_T2[end, 1]]


# Metrics: found and right → a score.

Metric = Callable[[TaskConfig, Sequence[Any], Sequence[Any]], Score]


def _accuracy(_: TaskConfig, found: Sequence[Any], right: Sequence[Any]) -> Score:
    return Score(100 * float(np.mean(np.array(found) == np.array(right))), "inputs")


def _word_accuracy(_: TaskConfig, found: Sequence[Any], right: Sequence[Any]) -> Score:
    pairs = [
        (one, other)
        for ours, theirs in zip(found, right, strict=True)
        for one, other in zip(ours, theirs, strict=True)
    ]
    return Score(100 * sum(one == other for one, other in pairs) / len(pairs), "words")


def _f1(average: str | None) -> Metric:
    def metric(task: TaskConfig, found: Sequence[Any], right: Sequence[Any]) -> Score:
        labels = range(len(task.labels or ()))
        how = average or ("binary" if len(labels) == 2 else "macro")
        positive: dict[str, Any] = {"labels": list(labels)} if how == "macro" else {"pos_label": 1}
        value = sklearn.metrics.f1_score(right, found, average=how, zero_division=0, **positive)
        return Score(100 * float(value), f"average:{how}|{_version('scikit-learn')}")

    return metric


def _matthews(_: TaskConfig, found: Sequence[Any], right: Sequence[Any]) -> Score:
    value = sklearn.metrics.matthews_corrcoef(right, found)
    return Score(100 * float(value), _version("scikit-learn"))


def _correlation(kind: Callable[..., Any]) -> Metric:
    def metric(_: TaskConfig, found: Sequence[Any], right: Sequence[Any]) -> Score:
        value = kind(found, right).statistic if len(found) > 1 else np.nan
        return Score(100 * float(value), _version("scipy"))

    return metric


def _entity_f1(_: TaskConfig, found: Sequence[Any], right: Sequence[Any]) -> Score:
    value = seqeval.metrics.f1_score(list(right), list(found), zero_division=0)
    return Score(100 * float(value), f"entities|average:micro|{_version('seqeval')}")


def _exact_match(_: TaskConfig, found: Sequence[Any], right: Sequence[Any]) -> Score:
    def hit(text: str, references: Sequence[str]) -> bool:
        return any(_plain(text) == _plain(reference) for reference in references)

    return Score(100 * float(np.mean([hit(*p) for p in zip(found, right, strict=True)])), "squad")


def _word_f1(_: TaskConfig, found: Sequence[Any], right: Sequence[Any]) -> Score:
    def best(text: str, references: Sequence[str]) -> float:
        return max(_overlap(_plain(text), _plain(reference)) for reference in references)

    return Score(100 * float(np.mean([best(*p) for p in zip(found, right, strict=True)])), "squad")


def _plain(text: str) -> list[str]:
    """Normalises an answer as SQuAD does: lower-case words without punctuation or articles."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _overlap(found: list[str], right: list[str]) -> float:
    """Computes the F1 of words; if either list is empty, 1 if both are and else 0."""
    if not found or not right:
        return float(found == right)
    same = sum((collections.Counter(found) & collections.Counter(right)).values())
    return 2 * same / (len(found) + len(right))


def _version(library: str) -> str:
    return f"{library}:{importlib.metadata.version(library)}"


_METRICS: dict[tuple[str, str], Metric] = {
    ("classify", "accuracy"): _accuracy,
    ("classify", "f1"): _f1(None),
    ("classify", "f1_macro"): _f1("macro"),
    ("classify", "matthews"): _matthews,
    ("regress", "pearson"): _correlation(scipy.stats.pearsonr),
    ("regress", "spearman"): _correlation(scipy.stats.spearmanr),
    ("tag", "accuracy"): _word_accuracy,
    ("tag", "f1"): _entity_f1,
    ("span", "exact_match"): _exact_match,
    ("span", "f1"): _word_f1,
    ("choice", "accuracy"): _accuracy,
}
