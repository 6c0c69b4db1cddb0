"""Converts the heads of adapters, using the names in transformers and PEFT.

PEFT stores the modules of `modules_to_save` next to `prompt_embeddings`, as
`base_model.NAME.weight` and `….bias`, with the output axis first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import jax.numpy as jnp
import numpy as np

from prefix_jax.backbones.loading.config import read_config
from prefix_jax.backbones.loading.pretrained import Pretrained
from prefix_jax.config import DataConfig, TaskConfig
from prefix_jax.config.task import TaskName
from prefix_jax.errors import PrefixError
from prefix_jax.interop.peft.files import Files
from prefix_jax.nn.head import Head
from prefix_jax.prefix import Embeds, Geometry, Produced
from prefix_jax.tasks import (
    NAMES,
    Classify,
    ExtractSpan,
    Regress,
    Tag,
    Task,
    make_task,
    name_of,
)
from prefix_jax.untrusted.names import check_storable_labels

# In PEFT, regression is classification with one label.
_TASK_TYPES: dict[type[Task], str] = {
    Classify: "SEQ_CLS",
    Regress: "SEQ_CLS",
    Tag: "TOKEN_CLS",
    ExtractSpan: "QUESTION_ANS",
}
TASK_TYPES = frozenset(_TASK_TYPES.values())
_MODULES = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}
_BASE = "base_model."
# Decoders whose tagging head has the same name as in encoders.
_CLASSIFIER = {"gpt2", "gpt_neox"}


def names(head: Head, task_type: str, model_type: str, causal: bool) -> dict[str, str]:
    """Maps each array of a head to its name in an adapter."""
    dense, out = _layers(head, task_type, model_type, causal)
    arrays = {"out_DY": f"{_BASE}{out}.weight"}
    if head.bias:
        arrays["out_bias_Y"] = f"{_BASE}{out}.bias"
    if head.activation is not None:
        arrays |= {"dense_DE": f"{_BASE}{dense}.weight", "dense_bias_E": f"{_BASE}{dense}.bias"}
    return arrays


def _layers(head: Head, task_type: str, model_type: str, causal: bool) -> tuple[str, str]:
    """Returns the names of the dense layer ("" without one) and of the last layer."""
    if task_type == "QUESTION_ANS":
        return "", "qa_outputs"
    if task_type == "TOKEN_CLS":
        return "", "score" if causal and model_type not in _CLASSIFIER else "classifier"
    if causal:
        return "", "score"
    if head.activation is None:
        return "", "classifier"
    if model_type == "distilbert":
        return "pre_classifier", "classifier"
    return "classifier.dense", "classifier.out_proj"


def to_arrays(
    weights: Mapping[str, Any],
    task: Task,
    head: Head,
    produced: Produced,
    model_type: str,
    geometry: Geometry,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the head's entries in an adapter's configuration, and its arrays.

    Raises:
        PrefixError: PEFT does not have the task, or its head reads another token.
    """
    task_type = _TASK_TYPES.get(type(task))
    if task_type is None:
        raise PrefixError(
            f"PEFT has no adapters for task.name={name_of(task)}; keep the prefix in our own "
            "format (--to safetensors, see docs/export.md)"
        )
    causal = geometry.decoder is not None
    if _reads_soft(task_type, produced, causal) and not head.soft:
        raise PrefixError(
            "with soft tokens, PEFT classifies by an encoder's first soft token, but this head "
            "reads the text's first token; train with task.reads_soft=true, or keys and values "
            "(method.name=prefix)"
        )
    arrays = {
        theirs: np.asarray(weights[ours]).T
        for ours, theirs in names(head, task_type, model_type, causal).items()
    }
    return {"task_type": task_type, "modules_to_save": _MODULES[task_type]}, arrays


def from_arrays(
    files: Files, pretrained: Pretrained, produced: Produced, data: DataConfig, given: TaskConfig
) -> tuple[dict[str, Any], Task]:
    """Reads the head of an adapter and its task.

    The label names come from `given`; or else from the backbone's configuration if it has the right
    number; or else they are "LABEL_0" and so on, as in transformers.

    Args:
        files: the adapter.
        pretrained: its backbone.
        produced: its prefix.
        data: the templates.
        given: the record fields and the label names.

    Raises:
        PrefixError: arrays are missing or unknown for the backbone's head, or the number of labels
            differs from `given`.
    """
    arch, task_type = pretrained.backbone.arch, files.config["task_type"]
    outputs = _outputs(files)
    kind = _kind(task_type, outputs)
    task = make_task(data, dataclasses.replace(given, name=cast(TaskName, NAMES[kind])))
    fields: dict[str, Any] = {
        "dropout": 0.0,
        "reads_soft": _reads_soft(task_type, produced, arch.causal),
    }
    if kind in (Classify, Tag):
        labels = given.labels or _labels(pretrained, outputs)
        if len(labels) != outputs:
            raise PrefixError(
                f"{files.where}: the head has {outputs} labels, but task.labels has "
                f"{len(labels)}; list all {outputs} labels"
            )
        fields["labels"] = labels
    own = {field.name for field in dataclasses.fields(task)}
    task = dataclasses.replace(task, **{name: x for name, x in fields.items() if name in own})
    head = task.head(arch)
    assert head is not None
    expected = names(head, task_type, arch.model_type, arch.causal)
    present = {name for name in files.arrays if name.startswith(_BASE)}
    if present != set(expected.values()):
        raise PrefixError(
            f"{files.where}: expected a {task_type} head for {arch.model_type} with the arrays "
            f"{', '.join(sorted(expected.values()))}; the adapter has "
            f"{', '.join(sorted(present)) or 'none'}; give the backbone that it was trained for"
        )
    weights = {}
    for ours, shape in head.shapes(arch.d_model).items():
        x = files.array(expected[ours], len(shape)).T
        if x.shape != shape:
            raise PrefixError(
                f"{files.where}: {expected[ours]} has shape {x.T.shape}, but this backbone's head "
                f"has {shape[::-1]}; give the backbone that the adapter was trained for"
            )
        weights[ours] = jnp.asarray(x)
    return weights, task


def _kind(task_type: str, outputs: int) -> type[Task]:
    if task_type == "TOKEN_CLS":
        return Tag
    if task_type == "QUESTION_ANS":
        return ExtractSpan
    return Regress if outputs == 1 else Classify


def _outputs(files: Files) -> int:
    """Returns the number of outputs Y of the last layer of the head."""
    for layer in ("qa_outputs", "score", "classifier", "classifier.out_proj"):
        if f"{_BASE}{layer}.weight" in files.arrays:
            return len(files.array(f"{_BASE}{layer}.weight", 2))
    raise PrefixError(
        f"{files.where}: task_type is {files.config['task_type']}, but the adapter has no weights "
        "of a head; save the adapter again, with its modules_to_save"
    )


def _reads_soft(task_type: str, produced: Produced, causal: bool) -> bool:
    """Returns whether PEFT's head reads the first soft token.

    It classifies by the first column of an encoder, which is a soft token if there are any.
    """
    return isinstance(produced, Embeds) and task_type == "SEQ_CLS" and not causal


def _labels(pretrained: Pretrained, outputs: int) -> tuple[str, ...]:
    named = read_config(pretrained.path).get("id2label") or {}
    if len(named) == outputs and {str(i) for i in range(outputs)} == named.keys():
        labels = tuple(str(named[str(i)]) for i in range(outputs))
        check_storable_labels(labels, f"{pretrained.path}: id2label", PrefixError)
        return labels
    return tuple(f"LABEL_{i}" for i in range(outputs))
