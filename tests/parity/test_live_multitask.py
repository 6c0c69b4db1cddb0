"""Compares losses and gradients of multitask batches with PEFT's multitask prompts.

Runs only under `make parity`, whose environment has torch, transformers and peft.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax.backbones.loading.pretrained import load
from prefix_jax.data.batch import Example
from prefix_jax.data.pack import Packing, Shape, arrange, collate, measure
from prefix_jax.methods.multitask import MultitaskPromptTuning
from prefix_jax.model import PrefixModel

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

FIXTURES = Path(__file__).parents[1] / "fixtures"
P, R, V = 5, 2, 90
TASKS = ("a", "b", "c")
# Rows of two lengths, with tasks in random order.
OF_ROW, LENGTHS = (2, 0, 1, 0), (9, 7, 8, 9)
IDS = [np.random.default_rng(n).integers(3, V, size, np.int32) for n, size in enumerate(LENGTHS)]
SOURCES = [np.random.default_rng(9 + n).integers(3, V, 6, np.int32) for n in range(len(LENGTHS))]
OURS = {
    "shared_PD": "embedding.weight",
    "cols_APR": "prefix_task_cols",
    "rows_ARD": "prefix_task_rows",
}


@pytest.mark.parametrize(
    "name",
    [
        "backbones/gpt2",
        "backbones/llama_grouped",
        "backbones/mistral_window",
        "encoder_decoders/t5",
    ],
)
def test_loss_and_gradients_match_peft(name: str, difference: Callable[..., None]) -> None:
    two_sided = name.startswith("encoder_decoders")
    auto = transformers.AutoModelForSeq2SeqLM if two_sided else transformers.AutoModelForCausalLM
    reference = auto.from_pretrained(
        FIXTURES / name, dtype=torch.float32, attn_implementation="eager"
    )
    torch.manual_seed(0)
    config = peft.MultitaskPromptTuningConfig(
        task_type="SEQ_2_SEQ_LM" if two_sided else "CAUSAL_LM",
        num_virtual_tokens=P,
        num_tasks=len(TASKS),
        num_ranks=R,
        num_transformer_submodules=1,
    )
    model = peft.get_peft_model(reference, config).eval()
    parameters = dict(model.prompt_encoder["default"].named_parameters())
    with torch.no_grad():  # products as large as embeddings
        for part in ("prefix_task_cols", "prefix_task_rows"):
            parameters[part].mul_(30)
    loss = theirs(model, two_sided)

    method = MultitaskPromptTuning(P, ranks=R, datasets=TASKS)
    params = {ours: jnp.asarray(parameters[them].detach().numpy()) for ours, them in OURS.items()}
    actual, grads = ours(name, method, params, two_sided)
    difference("multitask: loss of a mixed batch", actual - loss, 1e-5, name)
    for key, them in OURS.items():
        expected = parameters[them].grad.numpy()
        scale = np.abs(expected).max()
        assert scale > 1e-4
        difference(f"multitask: gradient of {key}", (grads[key] - expected) / scale, 1e-4, name)


def theirs(model: Any, two_sided: bool) -> float:
    """PEFT's loss. Leaves the gradient in the parameters."""
    present = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    ids = np.stack([np.pad(row, (0, max(LENGTHS) - len(row))) for row in IDS])
    labels = np.where(present, ids, -100)
    if two_sided:
        given = {"input_ids": np.stack(SOURCES), "labels": labels}
    else:
        # We do not predict the first token of a text.
        labels[:, 0] = -100
        given = {"input_ids": ids, "attention_mask": present, "labels": labels}
    tensors = {key: torch.from_numpy(np.asarray(x, np.int64)) for key, x in given.items()}
    loss = model(**tensors, task_ids=torch.tensor(OF_ROW)).loss
    loss.backward()
    return float(loss.detach())


def ours(
    name: str, method: MultitaskPromptTuning, params: Any, two_sided: bool
) -> tuple[float, Any]:
    """Our mean loss over targets and its gradient, in two rows if examples can be packed."""
    pretrained = load(FIXTURES / name, dtype="float32")
    model = PrefixModel(pretrained.backbone, method)
    examples = []
    for number, (ids_T, task) in enumerate(zip(IDS, OF_ROW, strict=True)):
        source = None
        if two_sided:
            source, ids_T = SOURCES[number], np.concatenate([[0], ids_T]).astype(np.int32)
        target_T = np.arange(len(ids_T)) > 0
        examples.append(Example.of_text(ids_T, target_T, "", source_ids_S=source, dataset=task))
    packing = Packing(pack=model.packs, shapes=(Shape(rows=2, columns=16, targets=16),))
    batch = collate(arrange(measure(examples), packing), examples)
    assert len(batch.ids_BT) == (len(examples) if two_sided else 2)

    def loss(prefix: Any) -> jax.Array:
        whole = {"backbone": pretrained.stacked(), "prefix": prefix}
        return model.loss(whole, batch) / batch.weight_BM.sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    return float(value), jax.device_get(grads)
