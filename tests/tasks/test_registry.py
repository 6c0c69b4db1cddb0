"""Tests that configs and cards become tasks."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from prefix_jax.config import DataConfig, EvaluateConfig, TaskConfig
from prefix_jax.config.task import TaskName
from prefix_jax.errors import ConfigError, DataError, PrefixError
from prefix_jax.nn.head import Head
from prefix_jax.tasks import (
    GENERATE,
    TASKS,
    ChatTask,
    Classify,
    ExtractSpan,
    Regress,
    Tag,
    TextTask,
    check_head,
    check_metrics,
    from_card,
    make_task,
    name_of,
    sections_of,
    to_card,
)

# An encoder with a pooler, such as BERT, and models that generate.
ENCODER: Any = SimpleNamespace(
    model_type="bert", causal=False, pooler=True, encoder=None, token_types=2
)
DECODER: Any = SimpleNamespace(model_type="llama", causal=True, pooler=False, encoder=None)
SEQ2SEQ: Any = SimpleNamespace(model_type="t5", causal=True, pooler=False, encoder=DECODER)


def task_of(data: dict[str, Any] | None = None, **task: Any) -> Any:
    return make_task(DataConfig(**(data or {})), TaskConfig(**task))


@pytest.mark.parametrize("name", TASKS)
def test_every_task_survives_configs_and_cards(name: str) -> None:
    task = TASKS[name](max_length=9)
    assert name_of(task) == name
    assert from_card(to_card(task)) == task
    sections = sections_of(task)
    if name != "chat":
        assert task_of(sections["data"], **sections["task"]) == task
    assert "loss" in task.metrics


def test_configs_name_every_task() -> None:
    assert {"text", "chat", *get_args(TaskName)} == {GENERATE, *TASKS}


def test_generation_is_a_text_or_a_chat() -> None:
    assert task_of({"input": "{a}", "target": "{b}"}) == TextTask("{a}", "{b}")
    assert task_of({"messages": "turns", "loss": "all"}) == ChatTask("turns", loss="all")
    sections = sections_of(ChatTask("turns"))
    assert task_of(sections["data"], **sections["task"]) == ChatTask("turns")


def test_unregistered_task_is_an_error() -> None:
    @dataclasses.dataclass(frozen=True)
    class Own(Regress):
        pass

    with pytest.raises(ConfigError, match="the task Own is not registered"):
        name_of(Own())


@pytest.mark.parametrize(
    ("data", "task", "message"),
    [
        ({"pair": "{b}"}, {}, r"data\.pair has no meaning for task\.name generate"),
        ({"target": "{b}"}, {"name": "classify"}, r"data\.target has no meaning for task\.name cl"),
        ({"references": "b"}, {"name": "tag"}, r"data\.references has no meaning"),
        ({"input": "{a}"}, {"name": "tag"}, r"data\.input has no meaning for task\.name tag"),
        ({"pair": "{a}"}, {"name": "choice"}, r"data\.pair has no meaning for task\.name choice"),
        ({}, {"name": "classify", "choices": ("{a}",)}, r"task\.choices has no meaning"),
        ({}, {"name": "tag", "reads_soft": True}, r"task\.reads_soft has no meaning for .* tag"),
        ({}, {"name": "clasify"}, "name: must be one of .*, got 'clasify'; did you mean classify"),
        ({}, {"name": "classify", "labels": ("a", "a")}, "labels must name each label once"),
        ({}, {"name": "tag", "labels": ("O", " ")}, "contains an empty tag"),
    ],
)
def test_rejects_fields_that_the_task_does_not_have(
    data: dict[str, Any], task: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        task_of(data, **task)


def test_malformed_template_is_an_error() -> None:
    with pytest.raises(DataError, match="write a literal brace twice"):
        TextTask("{", "{a}")


@pytest.mark.parametrize(
    ("task", "architecture", "message"),
    [
        (TextTask("{a}"), DECODER, r"data\.target: missing; give a template"),
        (TextTask("{a}", "{b}"), ENCODER, "task.name: bert is an encoder, which writes no text"),
        (TextTask("{a}", "{b}", loss="all"), SEQ2SEQ, r"use data\.loss: target"),
        (ChatTask(), SEQ2SEQ, "an encoder-decoder cannot train on chats"),
        (Classify(), ENCODER, r"data\.input: missing; give a template"),
        (Classify("{a}"), SEQ2SEQ, "let it generate the label as text"),
        (Classify("{a}", reads_soft=True), ENCODER, "no soft tokens precede an encoder's text"),
        (ExtractSpan("{a}"), ENCODER, r"data\.pair: missing; give a template"),
        (TASKS["choice"](input="{a}"), ENCODER, "task.choices: missing; give the templates"),  # type: ignore[call-arg]
    ],
)
def test_rejects_task_that_does_not_fit_the_model(
    task: Any, architecture: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        task.check(architecture, None)


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        (TextTask(), {"metrics": ["f1"]}, r"task\.name generate: unknown metric 'f1': .*bleu"),
        (TextTask(), {"metrics": ["accuracy"]}, "accuracy chooses among texts; name at least two"),
        (Classify(), {"metrics": ["bleu"]}, r"task\.name classify: unknown metric 'bleu'"),
        (Tag(), {"metrics": ["acuracy"]}, "did you mean 'accuracy'"),
        (Classify(), {"labels": ["a", "b"]}, r"the labels of a task with a head are task\.labels"),
        (Classify(), {"compare_baseline": True}, "a task has no head before training"),
    ],
)
def test_rejects_settings_that_do_not_fit_the_task(
    task: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_metrics(task, EvaluateConfig(**settings))


def test_metrics_of_the_task_are_accepted() -> None:
    for cls in TASKS.values():
        task = cls()
        labels = {"labels": ["a", "b"]} if task.generates else {}
        check_metrics(task, EvaluateConfig(metrics=tuple(task.metrics), **labels))


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({}, "task.name is None, expected one of text, chat"),
        ({"name": "sort"}, "task.name is 'sort', expected one of"),
        ({"name": "classify", "stride": 3}, "prefix.json: task.stride: unknown key.*damaged"),
        ({"name": "span", "stride": "x"}, "prefix.json: task.stride: .*; the card is damaged"),
        ({"name": "text", "input": "{"}, "prefix.json: template .*; the card is damaged"),
    ],
)
def test_damaged_task_is_an_error(stored: dict[str, Any], message: str) -> None:
    with pytest.raises(PrefixError, match=message):
        from_card(stored)


@pytest.mark.parametrize(
    ("task", "head"),
    [
        (Classify(labels=("a", "b", "c")), Head(2, pooled=True)),
        (Classify(labels=("a", "b")), Head(2, bias=False)),
        (Classify(labels=("a", "b")), None),
        (ExtractSpan(), Head(2, pooled=True)),
        (Regress(), Head(2, pooled=True)),
        (TextTask(), Head(2)),
    ],
)
def test_rejects_head_of_another_task(task: Any, head: Head | None) -> None:
    with pytest.raises(PrefixError, match=r"prefix\.json: the task \w+ needs .*, got "):
        check_head(task, head, ENCODER)


def test_dropout_of_a_stored_head_may_differ() -> None:
    check_head(Classify(labels=("a", "b")), Head(2, pooled=True), ENCODER)
    check_head(TextTask(), None, ENCODER)


@pytest.mark.parametrize(
    ("task", "model", "expected"),
    [
        (Classify(), {}, Head(3, pooled=True, dropout=0.1)),
        (TASKS["choice"](), {}, Head(1, pooled=True, dropout=0.1)),
        (Regress(), {}, Head(1, pooled=True, dropout=0.1)),
        (Tag(), {}, Head(3, dropout=0.1)),
        (ExtractSpan(), {}, Head(2)),
        (Classify(), {"model_type": "roberta"}, Head(3, activation="tanh", dropout=0.1)),
        (TASKS["choice"](), {"model_type": "roberta"}, Head(1, pooled=True, dropout=0.1)),
        (
            Classify(),
            {"model_type": "electra", "pooler": False},
            Head(3, activation="gelu", dropout=0.1),
        ),
        (
            Classify(),
            {"model_type": "distilbert", "pooler": False},
            Head(3, activation="relu", dropout=0.1, drop_input=False),
        ),
        (Classify(), {"pooler": False}, Head(3, activation="tanh", dropout=0.1)),
        (
            Classify(),
            {"model_type": "llama", "causal": True, "pooler": False},
            Head(3, bias=False),
        ),
    ],
)
def test_head_matches_model_type(task: Any, model: dict[str, Any], expected: Head) -> None:
    """The heads are those of transformers."""
    if isinstance(task, Classify | Tag):
        task = dataclasses.replace(task, labels=("a", "b", "c"))
    assert task.head(SimpleNamespace(**vars(ENCODER) | model)) == expected
