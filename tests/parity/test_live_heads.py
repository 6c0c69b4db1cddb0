"""Heads trained with a prefix have the outputs and updates of PEFT's `modules_to_save`.

Runs only under `make parity`, whose environment has torch, transformers and peft.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from prefix_jax.backbones.loading.pretrained import Pretrained, load
from prefix_jax.config import OptimConfig
from prefix_jax.data.batch import Batch, Example
from prefix_jax.data.pack import Packing, arrange, collate, measure
from prefix_jax.mesh import make_mesh, replicated
from prefix_jax.methods.prefix import PrefixTuning
from prefix_jax.methods.prompt import PromptTuning
from prefix_jax.model import PrefixModel
from prefix_jax.nn.head import Head
from prefix_jax.tasks import Classify, ExtractSpan, MultipleChoice, Regress, Tag, Task
from prefix_jax.train.optimizer import make_optimizer, make_schedule
from prefix_jax.train.partition import labels, split
from prefix_jax.train.step import init_state, make_step

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

FIXTURES = Path(__file__).parents[1] / "fixtures" / "backbones"
P, V, LABELS = 4, 60, 3
# A large epsilon, because the sign of an almost zero gradient is random in float32.
OPTIM = OptimConfig(
    learning_rate=0.01, schedule="constant", weight_decay=0.1, eps=1e-3, clip_norm=None
)
_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": V,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
}
_DISTIL = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 48,
    "vocab_size": V,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
}
CONFIGS = {
    "bert": ("bert", _SMALL),
    "roberta": ("roberta", {**_SMALL, "pad_token_id": 1, "type_vocab_size": 1}),
    "electra": ("electra", {**_SMALL, "embedding_size": 32}),
    "distilbert": ("distilbert", _DISTIL),
}
_NAMES = tuple(map(str, range(LABELS)))
TASKS: dict[str, tuple[Task, str]] = {
    "SEQ_CLS": (Classify(labels=_NAMES, dropout=0.0), "AutoModelForSequenceClassification"),
    "REGRESSION": (Regress(dropout=0.0), "AutoModelForSequenceClassification"),
    "TOKEN_CLS": (Tag(labels=_NAMES, dropout=0.0), "AutoModelForTokenClassification"),
    "QUESTION_ANS": (ExtractSpan(), "AutoModelForQuestionAnswering"),
    "CHOICE": (MultipleChoice(dropout=0.0), "AutoModelForMultipleChoice"),
}


def _reference(name: str, task: str) -> Any:
    """A random model of transformers with its head."""
    torch.manual_seed(0)
    auto = getattr(transformers, TASKS[task][1])
    count = {"num_labels": 1 if task == "REGRESSION" else LABELS}
    if task in ("QUESTION_ANS", "CHOICE"):
        count = {}
    if name in CONFIGS:
        model_type, fields = CONFIGS[name]
        config = transformers.AutoConfig.for_model(model_type, **fields, **count)
        return auto.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    model = auto.from_pretrained(
        FIXTURES / name, dtype=torch.float32, attn_implementation="eager", **count
    )
    model.config.pad_token_id = 0
    return model.eval()


def _pretrained(name: str, reference: Any, directory: Path) -> Pretrained:
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    if name not in CONFIGS:
        return load(FIXTURES / name, dtype="float32", mesh=mesh)
    reference.base_model.save_pretrained(directory)
    return load(directory, dtype="float32", mesh=mesh)


def _head(task: str, pretrained: Pretrained) -> Head:
    head = TASKS[task][0].head(pretrained.backbone.arch)
    assert head is not None
    return head


def _ids(lengths: Sequence[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, V, length).astype(np.int32) for length in lengths]


def _given(task: str, causal: bool, even: bool = False) -> tuple[list[Example], dict[str, Any]]:
    """Examples for us and for transformers, of one length if `even`."""
    # transformers' span loss includes padding.
    rows = _ids([7, 7, 7] if even or task == "QUESTION_ANS" else [7, 5, 9])
    width = max(map(len, rows))
    padded = np.array([np.pad(row, (0, width - len(row))) for row in rows])
    given = {
        "input_ids": torch.from_numpy(padded).long(),
        "attention_mask": torch.from_numpy(
            np.array([np.arange(width) < len(row) for row in rows])
        ).long(),
    }
    examples = []
    wanted: dict[str, list[Any]] = {"labels": [], "start_positions": [], "end_positions": []}
    for i, row in enumerate(rows):
        at = np.array([len(row) - 1 if causal else 0], np.int32)
        candidates = False
        if task == "SEQ_CLS":
            label = np.array([i], np.int32)
            wanted["labels"].append(i)
        elif task == "REGRESSION":
            label = np.array([i - 0.7], np.float32)
            wanted["labels"].append(i - 0.7)
        elif task == "TOKEN_CLS":
            at = np.array([1, 3, 4], np.int32)
            label = np.array([i, 0, 2], np.int32)
            tags = np.full(width, -100)
            tags[at] = label
            wanted["labels"].append(tags)
        else:
            at, label, candidates = np.arange(len(row), dtype=np.int32), np.zeros(7, np.int32), True
            label[i + 1] |= 1
            label[i + 2] |= 2
            wanted["start_positions"].append(i + 1)
            wanted["end_positions"].append(i + 2)
        examples.append(Example(row, at, label, str(i), whole=True, candidates=candidates))
    given |= {key: torch.tensor(np.array(value)) for key, value in wanted.items() if value}
    if task == "REGRESSION":
        given["labels"] = given["labels"].float()
    return examples, given


def _batch(examples: Sequence[Example], pack: bool) -> Batch:
    """Packs examples, except after soft tokens, where every example needs its own row."""
    rows = arrange(measure(examples), Packing(pack=pack))
    return jax.tree.map(lambda leaf: leaf[None], collate(rows, examples))


def _prefix(flat: np.ndarray, pretrained: Pretrained) -> dict[str, Any]:
    """Our parameters from PEFT's array, [P, L * 2 * K * H]."""
    site, shape = pretrained.backbone.input_stack, pretrained.backbone.geometry.main
    parts = flat.reshape(P, shape.layers, 2, shape.kv_heads, shape.head_dim)
    k_LPKH, v_LPKH = parts.transpose(2, 1, 0, 3, 4)
    return {site: {"k_LPKH": k_LPKH, "v_LPKH": v_LPKH}}


def _head_params(named: dict[str, Any]) -> dict[str, Any]:
    """Our parameters of a head from torch's; "dense" is the optional first layer."""
    params = {}
    for name, x in named.items():
        first = any(part in name for part in ("dense", "pre_classifier", "summary"))
        value = x.detach().numpy().copy()
        if name.endswith("weight"):
            params["dense_DE" if first else "out_DY"] = value.T
        else:
            params["dense_bias_E" if first else "out_bias_Y"] = value
    return params


def _trained(model: Any) -> dict[str, Any]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _as_ours(values: dict[str, Any], pretrained: Pretrained) -> dict[str, Any]:
    (prompt,) = (name for name in values if "prompt_encoder" in name)
    rest = {name: x for name, x in values.items() if name != prompt}
    flat = values[prompt].detach().numpy().copy()
    soft = flat.shape[1] == pretrained.backbone.geometry.input_dim
    prefix = {"x_PD": flat} if soft else _prefix(flat, pretrained)
    return {"prefix": prefix, "head": _head_params(rest)}


_STEPS = [(name, task) for name in ("bert", "roberta", "electra") for task in list(TASKS)[:4]]
_STEPS += [("llama_grouped", "SEQ_CLS"), ("gpt2", "SEQ_CLS"), ("llama_grouped", "REGRESSION")]
# After soft tokens, PEFT has no tagging loss, and its span loss includes them.
_SOFT_STEPS = [
    (name, task)
    for name in ("bert", "roberta", "llama_grouped")
    for task in ("SEQ_CLS", "REGRESSION")
]


@pytest.mark.parametrize(
    ("name", "task", "kind"),
    [(*case, "prefix") for case in _STEPS] + [(*case, "prompt") for case in _SOFT_STEPS],
)
def test_training_step_of_prefix_and_head_matches_peft(
    name: str, task: str, kind: str, tmp_path: Path, difference: Any
) -> None:
    reference = _reference(name, task)
    pretrained = _pretrained(name, reference, tmp_path)
    made_by = peft.PrefixTuningConfig if kind == "prefix" else peft.PromptTuningConfig
    config = made_by(task_type="SEQ_CLS" if task == "REGRESSION" else task, num_virtual_tokens=P)
    theirs = peft.get_peft_model(reference, config).eval()
    causal = pretrained.backbone.arch.causal
    examples, given = _given(task, causal, even=kind == "prompt")
    soft = kind == "prompt" and not causal
    batch = _batch(examples, pack=not soft)

    method = PrefixTuning(P) if kind == "prefix" else PromptTuning(P)
    head = dataclasses.replace(_head(task, pretrained), soft=soft)
    task_of_model: Any = TASKS[task][0]
    if soft:
        task_of_model = dataclasses.replace(task_of_model, reads_soft=True)
    model = PrefixModel(pretrained.backbone, method, task_of_model)
    trained = jax.device_put(_as_ours(_trained(theirs), pretrained), replicated(pretrained.mesh))
    params = {"backbone": pretrained.stacked(), **trained}
    abstract = jax.eval_shape(lambda: head.init(jax.random.key(0), 32))
    assert jax.tree.map(np.shape, params["head"]) == jax.tree.map(np.shape, abstract)

    output = theirs(**given)
    micro = jax.tree.map(lambda leaf: leaf[0], batch)
    prefix = jax.jit(model.prefix)(params)
    out_BMY, _ = jax.jit(model.head_outputs)(params["backbone"], params["head"], prefix, micro)
    if task == "QUESTION_ANS":
        logits = torch.stack([output.start_logits, output.end_logits], -1).detach().numpy()
    else:
        logits = output.logits.detach().numpy()
    for i, example in enumerate(examples):
        expected = logits[i, example.index_M] if logits.ndim == 3 else logits[i : i + 1]
        row, slots = _place(example, micro)
        off = out_BMY[row, slots] - expected
        difference(f"{task} logits, {kind} and head", off, limit=1e-5, model=name)

    optimizer_of_theirs = torch.optim.AdamW(
        _trained(theirs).values(), lr=0.01, weight_decay=0.1, eps=1e-3
    )
    output.loss.backward()
    optimizer_of_theirs.step()
    partition = labels(params)
    train, frozen = split(params, partition)
    optimizer = make_optimizer(OPTIM, make_schedule(OPTIM, 10), partition)
    state = init_state(train, frozen, optimizer, pretrained.mesh)
    state, metrics = jax.jit(make_step(model, optimizer))(state, frozen, batch)
    difference(f"{task} loss, {kind}", metrics.loss - output.loss.item(), limit=1e-5, model=name)
    expected_after = flatten_dict(_as_ours(_trained(theirs), pretrained), sep="/")
    actual = flatten_dict({key: state.train[key] for key in ("prefix", "head")}, sep="/")
    for key, value in expected_after.items():
        part = key.partition("/")[0]
        part = kind if part == "prefix" else f"head with a {kind}"
        difference(f"{task} {part} after a step", actual[key] - value, limit=1e-5, model=name)


def _place(example: Example, batch: Batch) -> tuple[int, slice]:
    """The row and the slots of an example's targets."""
    ids_BT, index_BM = np.asarray(batch.ids_BT), np.asarray(batch.index_BM)
    for row, ids_T in enumerate(ids_BT):
        for slot in range(index_BM.shape[1] - len(example.index_M) + 1):
            begin = index_BM[row, slot] - example.index_M[0]
            if np.array_equal(ids_T[begin : begin + len(example.ids_T)], example.ids_T):
                return row, slice(slot, slot + len(example.index_M))
    raise LookupError(example.origin)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_multiple_choice_matches_transformers(name: str, tmp_path: Path, difference: Any) -> None:
    """Without a prefix, because PEFT has no task type for it."""
    reference = _reference(name, "CHOICE")
    pretrained = _pretrained(name, reference, tmp_path)
    rows = _ids([6, 6, 6, 6])
    model = PrefixModel(pretrained.backbone, None, TASKS["CHOICE"][0])
    # The pooler, or the first head layer of ELECTRA and DistilBERT.
    weights = {
        key: x
        for key, x in reference.named_parameters()
        if not key.startswith(f"{reference.base_model_prefix}.")
    }
    params = _head_params(weights)
    examples = [
        Example(
            np.concatenate(rows[i : i + 2]),
            np.array([0, 6], np.int32),
            np.array([0, 1] if right else [1, 0], np.int32),
            str(i),
            whole=True,
            part_T=np.repeat(np.arange(2, dtype=np.int32), 6),
            candidates=True,
        )
        for i, right in ((0, 1), (2, 0))
    ]
    batch = collate(arrange(measure(examples), Packing(pack=False)), examples)
    out_BMY, loss_B = jax.jit(model.head_outputs)(pretrained.stacked(), params, None, batch)
    with torch.no_grad():
        ids = torch.from_numpy(np.array(rows).reshape(2, 2, 6)).long()
        expected = reference(input_ids=ids, labels=torch.tensor([1, 0]))
    logits_BM = np.asarray(out_BMY)[:2, :2, 0]
    difference("choice logits", logits_BM - expected.logits.numpy(), limit=1e-5, model=name)
    difference("choice loss", loss_B.sum() / 2 - expected.loss.item(), limit=1e-5, model=name)
