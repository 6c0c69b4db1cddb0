"""Cards, and whether a prefix fits a backbone."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import pytest

from prefix_jax.artifact import BackboneCard, TokenizerCard, check, make_card
from prefix_jax.errors import PrefixError
from prefix_jax.prefix import Embeds, Geometry, SiteShape

GEOMETRY = Geometry(d_model=576, vocab=49152, decoder=SiteShape(30, 9, 3, 64))
CARD = make_card(
    Embeds(jnp.zeros((4, 576))),
    GEOMETRY,
    BackboneCard(source="smol", model_type="llama", fingerprint="aaa", dtype="float32"),
)


def test_accepts_its_own_backbone() -> None:
    check(CARD, GEOMETRY, "aaa")


@pytest.mark.parametrize("allow", [False, True])
def test_rejects_another_geometry_and_names_both(allow: bool) -> None:
    other = dataclasses.replace(GEOMETRY, d_model=960, decoder=SiteShape(32, 9, 3, 64))
    with pytest.raises(PrefixError) as error:
        check(CARD, other, "aaa", allow_other_weights=allow)
    lines = str(error.value).splitlines()
    assert "smol (llama)" in lines[0]
    assert lines[1:-1] == [
        "    d_model: 576 in the prefix, 960 in the backbone (differs)",
        "    vocab: 49152 in the prefix, 49152 in the backbone",
        "    decoder.layers: 30 in the prefix, 32 in the backbone (differs)",
        "    decoder.query_heads: 9 in the prefix, 9 in the backbone",
        "    decoder.kv_heads: 3 in the prefix, 3 in the backbone",
        "    decoder.head_dim: 64 in the prefix, 64 in the backbone",
    ]


def test_rejects_other_weights_unless_allowed() -> None:
    with pytest.raises(PrefixError, match=r"weights aaa, and this .* bbb.*--allow-other-weights"):
        check(CARD, GEOMETRY, "bbb")
    check(CARD, GEOMETRY, "bbb", allow_other_weights=True)


def test_card_describes_the_prefix() -> None:
    assert (CARD.kind, CARD.length, CARD.text_position, CARD.pinned) == ("embeds", 4, 4, False)
    assert CARD.positions == (0, 1, 2, 3)


def test_tokenizer_digest_ignores_the_order_of_the_vocabulary() -> None:
    a = TokenizerCard.of("BPE", {"a": 0, "b": 1})
    assert a == TokenizerCard.of("BPE", {"b": 1, "a": 0})
    assert a.sha256 != TokenizerCard.of("BPE", {"a": 1, "b": 0}).sha256
    assert a.size == 2
