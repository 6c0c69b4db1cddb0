"""Starting points of a prefix, computed from a text by the frozen model."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from prefix_jax.backbones.backbone import Backbone, as_slots, dtype_of
from prefix_jax.backbones.layer import Layer
from prefix_jax.backbones.stacking import Params, as_stacked
from prefix_jax.nn.attention.mask import TokenLayout
from prefix_jax.nn.layers import KeysValues
from prefix_jax.prefix import Adapter, Embeds, Hidden, KVPrefix, Prefix, Site, SiteName


def starts_from_text(
    backbone: Backbone, params: Params, ids_P: jax.Array
) -> tuple[Embeds, Hidden, Prefix]:
    """The input embeddings of a text, its hidden states at the input of every layer, and its keys
    and values, all float32. Each of them, once lifted, equals prepending the text.

    An encoder-decoder reads the text in both stacks; its decoder attends to the encoder's output.

    Args:
        backbone, params: the frozen model and its weights.
        ids_P: token ids.

    Raises:
        ContextError: the text is longer than the learned positions.
    """
    stack, two_stacks = backbone.stack, backbone.arch.encoder is not None
    for reading in (stack, backbone.encoder) if two_stacks else (stack,):
        reading.check_length(len(ids_P))
    layout = TokenLayout.plain(jnp.ones((1, len(ids_P)), bool))
    embeds_1PD = backbone.embed(params, ids_P[None])
    # Soft tokens precede the input text, which the encoder reads if there is one.
    input_1PD = embeds_1PD
    sites: dict[SiteName, Site] = {}
    encoded = None
    if two_stacks:
        encoder, weights = backbone.encoder, params["encoder"]
        input_1PD = backbone.embed(params, ids_P[None], backbone.input_table(params))
        x_BTD = encoder.embed_positions(weights, input_1PD, layout, 0)
        h_BTD, _, h_LBTD = encoder.run(weights, x_BTD, layout, layer_inputs=True)
        sites["encoder"] = _site(encoder.keys_values(weights, h_LBTD, layout))
        encoded = backbone.cross_keys_values(params, encoder.final_norm(weights, h_BTD), layout)
        sites["cross"] = _site(as_stacked(encoded.layers))
    x_BTD = stack.embed_positions(params, embeds_1PD, layout, 0)
    keys_values, h_LBTD = backbone.keys_values_and_inputs(params, x_BTD, layout, encoded)
    sites[stack.site] = _site(keys_values)
    starts = (
        Embeds(input_1PD[0]),
        Hidden(h_LBTD[:, 0]),
        Prefix.of(sites, text_position=len(ids_P)),
    )
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), starts)


def adapter_from_states(backbone: Backbone, params: Params, hidden: Hidden) -> Adapter:
    """An adapter with closed gates whose states are the normalised inputs of attention, float32."""
    h_L1PD = hidden.h_LPD[:, None].astype(dtype_of(params))
    h_LPD = backbone.stack.map_layers(params, Layer.attention_input, h_L1PD)[:, 0]
    gate_LN = jnp.zeros((len(h_LPD), backbone.arch.heads))
    return Adapter(h_LPD.astype(jnp.float32), gate_LN)


def _site(layers: KeysValues) -> Site:
    return Site(KVPrefix(*as_slots(layers)))
