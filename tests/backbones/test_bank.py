"""A bank of prefixes: rows contain several tasks, and each token sees its task's prefix."""

from __future__ import annotations

import dataclasses
from typing import Any

import encoder_decoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import V, decoder, examples, hidden, lift, present, token_ids, weights

from prefix_jax.artifact import prefix_spec
from prefix_jax.backbones.backbone import Backbone
from prefix_jax.backbones.families import bert
from prefix_jax.data.batch import Batch, Example
from prefix_jax.data.pack import Packing, arrange, collate, measure
from prefix_jax.errors import PrefixError
from prefix_jax.mesh import make_mesh
from prefix_jax.methods.multitask import MultitaskPromptTuning
from prefix_jax.model import PrefixModel
from prefix_jax.nn.attention.mask import TokenLayout
from prefix_jax.prefix import Embeds

P, R, TASKS = 5, 2, ("a", "b", "c")
A = len(TASKS)
TOGETHER, ALONE = MultitaskPromptTuning(P, ranks=R, tasks=TASKS), MultitaskPromptTuning(P, ranks=R)

_BERT: dict[str, Any] = {
    "model_type": "bert",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": V,
    "max_position_embeddings": 40,
}
ENCODER = Backbone(bert.architecture(_BERT))


def prompts(backbone: Backbone) -> dict[str, jax.Array]:
    """Parameters whose products are as large as embeddings."""
    params = TOGETHER.init(jax.random.key(0), backbone.geometry, None)
    return {name: x if name == "shared_PD" else 20 * x for name, x in params.items()}


def mixed(two_sided: bool = False) -> list[Example]:
    """Examples of all tasks, some with equal texts."""
    found = []
    for number, example in enumerate(examples(9)):
        made = dataclasses.replace(example, dataset=number % A)
        if two_sided:
            made = dataclasses.replace(made, source_ids_S=np.asarray(token_ids(6, seed=number % 4)))
        found.append(made)
    return found


def select_dataset(params: Any, task: int) -> Any:
    return {
        "shared_PD": params["shared_PD"],
        "cols_PR": params["cols_APR"][task],
        "rows_RD": params["rows_ARD"][task],
    }


@pytest.mark.parametrize("name", ["gemma3", "t5"])
def test_batch_of_several_tasks_equals_each_task_separately(name: str) -> None:
    two_sided = name == "t5"
    backbone = encoder_decoders.encoder_decoder(name) if two_sided else decoder(name)
    weights_ = encoder_decoders.params_of(name) if two_sided else weights(backbone)
    together, alone = PrefixModel(backbone, TOGETHER), PrefixModel(backbone, ALONE)
    assert together.packs != two_sided
    assert together.room == alone.room
    found, params = mixed(two_sided), prompts(backbone)

    def batch_of(some: list[Example]) -> Any:
        return collate(arrange(measure(some), Packing(pack=not two_sided)), some)

    def losses(model: PrefixModel) -> Any:
        def loss(prefix: Any, batch: Batch) -> jax.Array:
            return model.loss({"backbone": weights_, "prefix": prefix}, batch)

        return jax.jit(jax.value_and_grad(loss))

    loss, grads = losses(together)(params, batch_of(found))
    one = losses(alone)
    # Without a dataset, an example may have any prefix.
    texts = [
        [dataclasses.replace(e, dataset=None) for e in found if e.dataset == task]
        for task in range(A)
    ]
    each = [one(select_dataset(params, task), batch_of(texts[task])) for task in range(A)]
    np.testing.assert_allclose(loss, sum(value for value, _ in each), rtol=1e-5)
    expected = {
        "shared_PD": sum(grad["shared_PD"] for _, grad in each),
        "cols_APR": jnp.stack([grad["cols_PR"] for _, grad in each]),
        "rows_ARD": jnp.stack([grad["rows_RD"] for _, grad in each]),
    }
    for key, grad in grads.items():
        scale = float(jnp.abs(expected[key]).max())
        assert scale > 0.01
        np.testing.assert_allclose(grad, expected[key], rtol=0, atol=1e-4 * scale)


def test_sharded_columns_see_the_prefix_of_their_task() -> None:
    """The prefix is lifted on the mesh too, with rows that the devices do not divide."""
    backbone = decoder("gemma3")
    params, bank, ids = weights(backbone), TOGETHER(prompts(backbone)), token_ids(2, 13)
    segment_BT = jnp.broadcast_to(1 + jnp.arange(13) // 5, (2, 13))
    position_BT = jnp.broadcast_to(jnp.arange(13) % 5, (2, 13))
    tokens = TokenLayout(
        segment_BT, None, position_BT, task_BT=(segment_BT + jnp.arange(2)[:, None]) % A
    )
    alone, _ = hidden(backbone, params, ids, tokens, lift(backbone, params, bank))
    with jax.set_mesh(make_mesh(2, sequence=4)):
        shared, _ = hidden(backbone, params, ids, tokens, lift(backbone, params, bank))
    np.testing.assert_allclose(shared, alone, rtol=1e-4, atol=1e-4)


def test_encoder_rows_get_the_soft_tokens_of_their_task() -> None:
    backbone, ids = ENCODER, token_ids(3, 6, seed=1)
    params, bank = weights(backbone), TOGETHER(prompts(backbone))
    # Padding, here on the left, has no task.
    present_BT = jnp.ones((3, 6), bool).at[1, :2].set(False)
    tokens = TokenLayout.plain(present_BT)
    task_BT = jnp.array([2, 1, 0])[:, None] * present_BT
    h_BTD, _ = hidden(
        backbone, params, ids, tokens.replace(task_BT=task_BT), lift(backbone, params, bank)
    )
    for row, task in enumerate((2, 1, 0)):
        alone = lift(backbone, params, bank.split_tasks()[task])
        expected, _ = hidden(backbone, params, ids, tokens, alone)
        np.testing.assert_allclose(h_BTD[row], expected[row], rtol=1e-4, atol=2e-5)


def test_bank_splits_into_one_prefix_per_task() -> None:
    backbone = decoder("gpt2")
    params, bank = weights(backbone), TOGETHER(prompts(backbone))
    lifted = lift(backbone, params, bank)
    assert (lifted.length, lifted.text_position, lifted.tasks) == (P, P, 3)
    for part, embeds in zip(lifted.split_tasks(), bank.split_tasks(), strict=True):
        expected = lift(backbone, params, embeds)
        assert (part.tasks, part.text_position) == (None, P)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), part, expected)
        assert expected.split_tasks() == (expected,)
    soft = lift(ENCODER, params, bank)
    np.testing.assert_array_equal(soft.split_tasks()[1].embeds_PD, bank.x_PD[P : 2 * P])


def test_equal_texts_of_different_tasks_do_not_share_tokens() -> None:
    (one, *_) = examples(1)
    twice = [dataclasses.replace(one, dataset=task) for task in (0, 1)]
    assert len({item.source for item in measure(twice)}) == 2
    batch = collate(arrange(measure(twice), Packing()), twice)
    assert {0, 1} <= set(np.unique(batch.layout.task_BT[batch.layout.segment_BT > 0]))


def test_bank_requires_the_task_of_every_token() -> None:
    backbone = decoder("gpt2")
    params = weights(backbone)
    lifted = lift(backbone, params, TOGETHER(prompts(backbone)))
    with pytest.raises(PrefixError, match="use the prefix of one task"):
        hidden(backbone, params, token_ids(1, 4), present(1, 4), lifted)


def test_bank_cannot_be_stored_as_one_prefix() -> None:
    with pytest.raises(PrefixError, match="bank of prefixes for 2 tasks; store the prefix of each"):
        prefix_spec(Embeds(jnp.ones((6, 4)), tasks=2))
