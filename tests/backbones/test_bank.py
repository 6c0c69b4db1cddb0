"""A bank of prefixes: a row mixes several datasets, and each token sees the prefix of its own."""

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

P, R, DATASETS = 5, 2, ("a", "b", "c")
A = len(DATASETS)
BANK_METHOD = MultitaskPromptTuning(P, ranks=R, datasets=DATASETS)
SINGLE_METHOD = MultitaskPromptTuning(P, ranks=R)

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
    params = BANK_METHOD.init(jax.random.key(0), backbone.geometry, None)
    return {name: x if name == "shared_PD" else 20 * x for name, x in params.items()}


def mixed(two_sided: bool = False) -> list[Example]:
    """Examples of all datasets, some with equal texts."""
    mixture = []
    for number, example in enumerate(examples(9)):
        example = dataclasses.replace(example, dataset=number % A)
        if two_sided:
            source = np.asarray(token_ids(6, seed=number % 4))
            example = dataclasses.replace(example, source_ids_S=source)
        mixture.append(example)
    return mixture


def select_dataset(params: Any, dataset: int) -> Any:
    return {
        "shared_PD": params["shared_PD"],
        "cols_PR": params["cols_APR"][dataset],
        "rows_RD": params["rows_ARD"][dataset],
    }


@pytest.mark.parametrize("name", ["gemma3", "t5"])
def test_batch_of_several_datasets_equals_each_dataset_separately(name: str) -> None:
    two_sided = name == "t5"
    backbone = encoder_decoders.encoder_decoder(name) if two_sided else decoder(name)
    weights_ = encoder_decoders.params_of(name) if two_sided else weights(backbone)
    together, alone = PrefixModel(backbone, BANK_METHOD), PrefixModel(backbone, SINGLE_METHOD)
    assert together.packs != two_sided
    assert together.room == alone.room
    mixture, params = mixed(two_sided), prompts(backbone)

    def batch_of(chosen: list[Example]) -> Any:
        return collate(arrange(measure(chosen), Packing(pack=not two_sided)), chosen)

    def losses(model: PrefixModel) -> Any:
        def loss(prefix: Any, batch: Batch) -> jax.Array:
            return model.loss({"backbone": weights_, "prefix": prefix}, batch)

        return jax.jit(jax.value_and_grad(loss))

    loss, grads = losses(together)(params, batch_of(mixture))
    single_loss = losses(alone)
    # Without a dataset, an example may have any prefix.
    texts = [
        [dataclasses.replace(e, dataset=None) for e in mixture if e.dataset == dataset]
        for dataset in range(A)
    ]
    each = [single_loss(select_dataset(params, a), batch_of(texts[a])) for a in range(A)]
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


def test_sharded_columns_see_the_prefix_of_their_dataset() -> None:
    """The prefix is lifted on the mesh too, with rows that the devices do not divide."""
    backbone = decoder("gemma3")
    params, bank, ids = weights(backbone), BANK_METHOD(prompts(backbone)), token_ids(2, 13)
    segment_BT = jnp.broadcast_to(1 + jnp.arange(13) // 5, (2, 13))
    position_BT = jnp.broadcast_to(jnp.arange(13) % 5, (2, 13))
    tokens = TokenLayout(
        segment_BT, None, position_BT, bank_index_BT=(segment_BT + jnp.arange(2)[:, None]) % A
    )
    alone, _ = hidden(backbone, params, ids, tokens, lift(backbone, params, bank))
    with jax.set_mesh(make_mesh(2, sequence=4)):
        shared, _ = hidden(backbone, params, ids, tokens, lift(backbone, params, bank))
    np.testing.assert_allclose(shared, alone, rtol=1e-4, atol=1e-4)


def test_encoder_rows_get_the_soft_tokens_of_their_dataset() -> None:
    backbone, ids = ENCODER, token_ids(3, 6, seed=1)
    params, bank = weights(backbone), BANK_METHOD(prompts(backbone))
    # Padding, here on the left, has no dataset.
    present_BT = jnp.ones((3, 6), bool).at[1, :2].set(False)
    tokens = TokenLayout.plain(present_BT)
    bank_index_BT = jnp.array([2, 1, 0])[:, None] * present_BT
    h_BTD, _ = hidden(
        backbone,
        params,
        ids,
        tokens.replace(bank_index_BT=bank_index_BT),
        lift(backbone, params, bank),
    )
    for row, index in enumerate((2, 1, 0)):
        alone = lift(backbone, params, bank.split_bank()[index])
        expected, _ = hidden(backbone, params, ids, tokens, alone)
        np.testing.assert_allclose(h_BTD[row], expected[row], rtol=1e-4, atol=2e-5)


def test_bank_splits_into_its_prefixes() -> None:
    backbone = decoder("gpt2")
    params, bank = weights(backbone), BANK_METHOD(prompts(backbone))
    lifted = lift(backbone, params, bank)
    assert (lifted.length, lifted.text_position, lifted.bank_size) == (P, P, 3)
    for part, embeds in zip(lifted.split_bank(), bank.split_bank(), strict=True):
        expected = lift(backbone, params, embeds)
        assert (part.bank_size, part.text_position) == (None, P)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), part, expected)
        assert expected.split_bank() == (expected,)
    soft = lift(ENCODER, params, bank)
    np.testing.assert_array_equal(soft.split_bank()[1].embeds_PD, bank.x_PD[P : 2 * P])


def test_equal_texts_of_different_datasets_do_not_share_tokens() -> None:
    (example, *_) = examples(1)
    twice = [dataclasses.replace(example, dataset=index) for index in (0, 1)]
    assert len({item.source for item in measure(twice)}) == 2
    batch = collate(arrange(measure(twice), Packing()), twice)
    assert {0, 1} <= set(np.unique(batch.layout.bank_index_BT[batch.layout.segment_BT > 0]))


def test_bank_requires_an_index_for_every_token() -> None:
    backbone = decoder("gpt2")
    params = weights(backbone)
    lifted = lift(backbone, params, BANK_METHOD(prompts(backbone)))
    with pytest.raises(PrefixError, match="or one prefix of the bank"):
        hidden(backbone, params, token_ids(1, 4), present(1, 4), lifted)


def test_bank_cannot_be_stored_as_one_prefix() -> None:
    with pytest.raises(PrefixError, match="bank of 2 prefixes; store each of them"):
        prefix_spec(Embeds(jnp.ones((6, 4)), bank_size=2))
