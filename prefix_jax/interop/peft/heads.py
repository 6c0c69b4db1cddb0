"""Converts the heads of adapters, using the names in transformers and PEFT.

PEFT stores the modules of `modules_to_save` next to `prompt_embeddings`, as
`base_model.NAME.weight` and `….bias`, with the output axis first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from prefix_jax.artifact import TaskCard
from prefix_jax.backbones.loading.config import read_config
from prefix_jax.backbones.loading.pretrained import Pretrained
from prefix_jax.config import TaskConfig
from prefix_jax.errors import PrefixError
from prefix_jax.heads import Head, make_head
from prefix_jax.heads.head import Kind
from prefix_jax.interop.peft.files import Files
from prefix_jax.prefix import Embeds, Geometry, Produced
from prefix_jax.untrusted.names import check_storable_labels

# Our tasks → PEFT's task types. In PEFT, regression is classification with one label.
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
# Decoders whose tagging head has the same name as in encoders.
_CLASSIFIER = {"gpt2", "gpt_neox"}


def names(head: Head, model_type: str, causal: bool) -> dict[str, str]:
    """Maps each array of a head to its name in an adapter."""
    dense, out = _layers(head, model_type, causal)
    table = {"out_DY": f"{_BASE}{out}.weight"}
    if head.bias:
        table["out_bias_Y"] = f"{_BASE}{out}.bias"
    if head.activation is not None:
        table |= {"dense_DE": f"{_BASE}{dense}.weight", "dense_bias_E": f"{_BASE}{dense}.bias"}
    return table


def _layers(head: Head, model_type: str, causal: bool) -> tuple[str, str]:
    """Returns the names of the dense layer ("" without one) and of the last layer."""
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
    """Returns the head's entries in an adapter's configuration, and its arrays.

    Raises:
        PrefixError: PEFT does not have the task, or its head reads another token.
    """
    of = Head(**task.head)
    if of.kind not in TASK_TYPES:
        raise PrefixError(
            f"PEFT has no adapters for task.name={of.kind}; keep the prefix in our own format "
            "(--to safetensors, see docs/export.md)"
        )
    causal = geometry.decoder is not None
    if _reads_soft(of.kind, produced, causal) and not of.soft:
        raise PrefixError(
            "with soft tokens, PEFT classifies by an encoder's first soft token, but this head "
            "reads the text's first token; train with task.reads_soft=true, or keys and values "
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
    """Reads the head of an adapter and its task.

    The label names come from `given`; or else from the backbone's configuration if it has the right
    number; or else they are "LABEL_0" and so on, as in transformers.

    Raises:
        PrefixError: arrays are missing or unknown for the backbone's head, or the number of labels
            differs from `given`.
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
            f"{files.where}: expected a {task_type} head for {arch.model_type} with the arrays "
            f"{', '.join(sorted(expected.values()))}; the adapter has "
            f"{', '.join(sorted(held)) or 'none'}; give the backbone that it was trained for"
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
                f"{files.where}: {theirs} has shape {x.T.shape}, but this backbone's head has "
                f"{shapes[ours][::-1]}; give the backbone that the adapter was trained for"
            )
        head[ours] = jnp.asarray(x)
    labels = None
    if kind in ("classify", "tag"):
        labels = given.labels or _labels(pretrained, outputs)
        if len(labels) != outputs:
            raise PrefixError(
                f"{files.where}: the head has {outputs} labels, but task.labels has "
                f"{len(labels)}; list all {outputs} labels"
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
    """Returns the number of outputs Y of the last layer of the head."""
    for layer in ("qa_outputs", "score", "classifier", "classifier.out_proj"):
        if f"{_BASE}{layer}.weight" in files.arrays:
            return len(files.array(f"{_BASE}{layer}.weight", 2))
    raise PrefixError(
        f"{files.where}: task_type is {files.config['task_type']}, but the adapter has no weights "
        "of a head; save the adapter again, with its modules_to_save"
    )


def _reads_soft(kind: str, produced: Produced, causal: bool) -> bool:
    """Returns whether PEFT's head reads the first soft token.

    It classifies by the first column of an encoder, which is a soft token if there are any.
    """
    return isinstance(produced, Embeds) and kind in ("classify", "regress") and not causal


def _labels(pretrained: Pretrained, outputs: int) -> tuple[str, ...]:
    named = read_config(pretrained.path).get("id2label") or {}
    if len(named) == outputs and {str(i) for i in range(outputs)} == named.keys():
        labels = tuple(str(named[str(i)]) for i in range(outputs))
        check_storable_labels(labels, f"{pretrained.path}: id2label", PrefixError)
        return labels
    return tuple(f"LABEL_{i}" for i in range(outputs))
