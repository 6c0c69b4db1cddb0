"""Heads beside a prefix, under the names that transformers and PEFT have for them.

PEFT stores the modules of `modules_to_save` beside `prompt_embeddings`, as `base_model.NAME.weight`
and `….bias`, with the output axis first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from prefix_jax.artifact import TaskCard
from prefix_jax.backbones.load import Pretrained, read_config
from prefix_jax.config import TaskConfig
from prefix_jax.errors import PrefixError
from prefix_jax.heads import Head, make_head
from prefix_jax.heads.head import Kind
from prefix_jax.interop.peft.files import Files
from prefix_jax.prefix import Embeds, Geometry, Produced
from prefix_jax.untrusted.names import check_storable_labels

# PEFT's task types by our tasks; a regression is there a classification with one label.
TASK_TYPES = {
    "classify": "SEQ_CLS",
    "regress": "SEQ_CLS",
    "tag": "TOKEN_CLS",
    "span": "QUESTION_ANS",
}
_MODULES = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}
_BASE = "base_model."
# Decoders whose tagging head is called as encoders' are.
_CLASSIFIER = {"gpt2", "gpt_neox"}


def names(head: Head, model_type: str, causal: bool) -> dict[str, str]:
    """The name in an adapter of each array of a head."""
    dense, out = _layers(head, model_type, causal)
    found = {"out_DY": f"{_BASE}{out}.weight"}
    if head.bias:
        found["out_bias_Y"] = f"{_BASE}{out}.bias"
    if head.activation is not None:
        found |= {"dense_DE": f"{_BASE}{dense}.weight", "dense_bias_E": f"{_BASE}{dense}.bias"}
    return found


def _layers(head: Head, model_type: str, causal: bool) -> tuple[str, str]:
    """Of the first layer, where there is one, and of the last."""
    if head.kind == "span":
        return "", "qa_outputs"
    if head.kind == "tag":
        return "", "score" if causal and model_type not in _CLASSIFIER else "classifier"
    if causal:
        return "", "score"
    if head.activation is None:
        return "", "classifier"
    if model_type == "distilbert":
        return "pre_classifier", "classifier"
    return "classifier.dense", "classifier.out_proj"


def to_arrays(
    head: Mapping[str, Any], task: TaskCard, produced: Produced, model_type: str, geometry: Geometry
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a head adds to an adapter's configuration and to its arrays.

    Raises:
        PrefixError: PEFT has no such task, or its head reads another token.
    """
    of = Head(**task.head)
    if of.kind not in TASK_TYPES:
        raise PrefixError(
            f"PEFT has no adapters for task.name={of.kind}: keep it in our own format "
            "(--to safetensors), which docs/export.md tells how to use"
        )
    causal = geometry.decoder is not None
    if _reads_soft(of.kind, produced, causal) and not of.soft:
        raise PrefixError(
            "with soft tokens, PEFT's classification reads an encoder's first soft token, and this "
            "head the text's first token: train with task.reads_soft=true, or keys and values "
            "(method.name=prefix)"
        )
    task_type = TASK_TYPES[of.kind]
    arrays = {
        theirs: np.asarray(head[ours]).T for ours, theirs in names(of, model_type, causal).items()
    }
    return {"task_type": task_type, "modules_to_save": _MODULES[task_type]}, arrays


def from_arrays(
    files: Files, pretrained: Pretrained, produced: Produced, given: TaskConfig
) -> tuple[dict[str, Any], TaskCard]:
    """The head of an adapter, and the task that it is for.

    The names of labels are those that are given; or the backbone's, where its configuration has as
    many; or "LABEL_0" and so on, as in transformers.

    Raises:
        PrefixError: it lacks arrays, or has some that the backbone's head does not have, or more or
            fewer labels than are given.
    """
    arch, task_type = pretrained.backbone.arch, files.config["task_type"]
    outputs = _outputs(files)
    kind = _kind(task_type, outputs)
    soft = _reads_soft(kind, produced, arch.causal)
    of = make_head(
        kind,
        outputs,
        model_type=arch.model_type,
        causal=arch.causal,
        pooler=arch.pooler,
        dropout=0.0,
    )
    of = dataclasses.replace(of, soft=soft)
    expected = names(of, arch.model_type, arch.causal)
    held = {name for name in files.arrays if name.startswith(_BASE)}
    if held != set(expected.values()):
        raise PrefixError(
            f"{files.where}: the head of {task_type} for a {arch.model_type} is "
            f"{', '.join(sorted(expected.values()))}; the adapter has "
            f"{', '.join(sorted(held)) or 'none'}: give the backbone that it was trained for"
        )
    shapes = {
        "out_DY": (arch.d_model, outputs),
        "out_bias_Y": (outputs,),
        "dense_DE": (arch.d_model, arch.d_model),
        "dense_bias_E": (arch.d_model,),
    }
    head = {}
    for ours, theirs in expected.items():
        x = files.array(theirs, len(shapes[ours])).T
        if x.shape != shapes[ours]:
            raise PrefixError(
                f"{files.where}: {theirs} has shape {x.T.shape}, and this backbone's head "
                f"{shapes[ours][::-1]}: give the backbone that the adapter was trained for"
            )
        head[ours] = jnp.asarray(x)
    labels = None
    if kind in ("classify", "tag"):
        labels = given.labels or _labels(pretrained, outputs)
        if len(labels) != outputs:
            raise PrefixError(
                f"{files.where}: the head tells {outputs} labels apart, and task.labels names "
                f"{len(labels)}"
            )
    task = dataclasses.replace(given, name=kind, labels=labels, reads_soft=soft)
    return head, TaskCard(
        config=dataclasses.asdict(task),
        head=dataclasses.asdict(of),
        shapes={name: shapes[name] for name in head},
    )


def _kind(task_type: str, outputs: int) -> Kind:
    if task_type == "TOKEN_CLS":
        return "tag"
    if task_type == "QUESTION_ANS":
        return "span"
    return "regress" if outputs == 1 else "classify"


def _outputs(files: Files) -> int:
    """Y, of the last layer of whatever head there is."""
    for layer in ("qa_outputs", "score", "classifier", "classifier.out_proj"):
        if f"{_BASE}{layer}.weight" in files.arrays:
            return len(files.array(f"{_BASE}{layer}.weight", 2))
    raise PrefixError(
        f"{files.where}: task_type is {files.config['task_type']}, and there are no weights of a "
        "head; save the adapter again, with its modules_to_save"
    )


def _reads_soft(kind: str, produced: Produced, causal: bool) -> bool:
    """Whether PEFT's head reads the first soft token: what it classifies by is the first column of
    an encoder, where its soft tokens stand."""
    return isinstance(produced, Embeds) and kind in ("classify", "regress") and not causal


def _labels(pretrained: Pretrained, outputs: int) -> tuple[str, ...]:
    named = read_config(pretrained.path).get("id2label") or {}
    if len(named) == outputs and {str(i) for i in range(outputs)} == named.keys():
        labels = tuple(str(named[str(i)]) for i in range(outputs))
        check_storable_labels(labels, f"{pretrained.path}: id2label", PrefixError)
        return labels
    return tuple(f"LABEL_{i}" for i in range(outputs))
