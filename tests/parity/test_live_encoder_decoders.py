"""Compares encoder-decoders with transformers and PEFT on random models.

Runs only under `make parity`, whose environment has torch, transformers and peft.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax.backbones.loading.pretrained import Pretrained, architecture_of, load
from prefix_jax.nn.attention.mask import TokenLayout
from prefix_jax.nn.relative import Relative
from prefix_jax.prefix import SITES, Embeds, KVPrefix, Prefix, Site, SiteName

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def _maker() -> ModuleType:
    script = Path(__file__).parents[1] / "fixtures" / "make_encoder_decoders.py"
    spec = importlib.util.spec_from_file_location("make_encoder_decoders", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = _maker()


def _pair(
    name: str, seed: int, tmp_path: Path, shard: str = "10GB", **config: Any
) -> tuple[Any, Pretrained]:
    """A random model in transformers, and the same model here."""
    settings = MAKER.CONFIGS[name].to_dict() | config
    if name == "t5_gated":
        settings["tie_word_embeddings"] = False
    reference = MAKER.random_model(type(MAKER.CONFIGS[name])(**settings), seed)
    reference.save_pretrained(tmp_path, max_shard_size=shard)
    return reference, load(tmp_path, dtype="float32")


def _logits(model: Pretrained, given: Mapping[str, Any], prefix: Prefix | None) -> np.ndarray:
    backbone, params = model.backbone, model.params
    source = jnp.asarray(given["source"])
    encoded = backbone.encode(
        params, source, TokenLayout.plain(jnp.asarray(given["present"])), prefix
    )
    ids = jnp.asarray(given["ids"])
    tokens = TokenLayout.plain(jnp.ones(ids.shape, bool))
    h_BTD, _ = backbone.hidden(params, ids, tokens, prefix, encoded=encoded)
    return np.asarray(backbone.unembed(params, h_BTD))


def _prefix(sites: Mapping[SiteName, Any], text_position: int) -> Prefix:
    stored = {
        name: Site(KVPrefix(jnp.asarray(k_LPKH), jnp.asarray(v_LPKH)))
        for name, (k_LPKH, v_LPKH) in sites.items()
    }
    return Prefix.of(stored, text_position=text_position)


@pytest.mark.parametrize("shard", ["10GB", "20KB"])
@pytest.mark.parametrize("name", MAKER.CONFIGS)
def test_logits_match_transformers(name, shard, tmp_path, difference):
    reference, model = _pair(name, 100, tmp_path, shard)
    given = MAKER.inputs(7)
    difference("logits", _logits(model, given, None) - MAKER.logits(reference, given), 1e-4, name)


@pytest.mark.parametrize("names", [*[(site,) for site in SITES], SITES], ids="+".join)
@pytest.mark.parametrize("name", ["t5", "t5_gated", "bart"])
def test_each_site_adds_keys_and_values_before_the_tokens(name, names, tmp_path, difference):
    reference, model = _pair(name, 200, tmp_path)
    given, sites = MAKER.inputs(8), MAKER.random_sites(reference, 8)
    sites = {site: sites[site] for site in names}
    logits = _logits(model, given, _prefix(sites, MAKER.P))
    expected = MAKER.logits(reference, given, sites)
    assert np.abs(expected - MAKER.logits(reference, given)).max() > 0.01
    difference(f"logits, prefix at {', '.join(names)}", logits - expected, 1e-4, name)


@pytest.mark.parametrize("name", ["t5", "t5_gated", "mt5", "bart"])
def test_decoder_prefix_equals_a_warm_cache(name, tmp_path, difference):
    reference, model = _pair(name, 300, tmp_path)
    given, sites = MAKER.inputs(9), MAKER.random_sites(reference, 9)
    cache = transformers.EncoderDecoderCache(
        transformers.DynamicCache(), transformers.DynamicCache()
    )
    for layer, pair in enumerate(zip(*sites["decoder"], strict=True)):
        k_BNPH, v_BNPH = (
            torch.from_numpy(x).transpose(0, 1).expand(2, -1, -1, -1).contiguous() for x in pair
        )
        cache.self_attention_cache.update(k_BNPH, v_BNPH, layer)
    expected = MAKER.logits(reference, given, past_key_values=cache)
    logits = _logits(model, given, _prefix({"decoder": sites["decoder"]}, MAKER.P))
    difference("logits, cache as decoder prefix", logits - expected, 1e-4, name)


@pytest.mark.parametrize("layers", [2, 3, 4])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_decoder_prefix_matches_peft_in_every_second_layer(name, layers, tmp_path, difference):
    kinds = ("num_layers", "num_decoder_layers") if name == "t5" else (
        "encoder_layers", "decoder_layers"
    )  # fmt: skip
    heads = {} if name == "t5" else {"encoder_attention_heads": 4}
    reference, model = _pair(name, 400, tmp_path, **dict.fromkeys(kinds, layers), **heads)
    shape = model.backbone.geometry.decoder
    config = peft.PrefixTuningConfig(
        task_type="SEQ_2_SEQ_LM",
        num_virtual_tokens=5,
        token_dim=shape.kv_heads * shape.head_dim,  # PEFT uses d_model, which may differ
    )
    theirs = peft.get_peft_model(reference, config).eval()
    flat = theirs.prompt_encoder["default"].embedding.weight.detach().numpy()
    stored = flat.reshape(5, layers, 2, shape.kv_heads, shape.head_dim)
    read = stored[:, [2 * layer % layers for layer in range(layers)]].transpose(2, 1, 0, 3, 4)
    given = MAKER.inputs(10)
    arguments = {
        "input_ids": given["source"],
        "attention_mask": given["present"],
        "decoder_input_ids": given["ids"],
        "decoder_attention_mask": np.ones(given["ids"].shape),
    }
    with torch.no_grad():
        expected = theirs(**{k: torch.from_numpy(x).long() for k, x in arguments.items()})
    logits = _logits(model, given, _prefix({"decoder": tuple(read)}, 5))
    difference("logits, PEFT's prefix", logits - expected.logits.numpy(), 1e-4, name)


@pytest.mark.parametrize("name", ["t5", "t5_gated", "bart", "bart_scaled"])
def test_soft_tokens_precede_the_source_embeddings(name, tmp_path, difference):
    reference, model = _pair(name, 500, tmp_path)
    given = MAKER.inputs(11)
    soft_PD = np.random.default_rng(11).normal(size=(4, 32)).astype(np.float32)
    with torch.no_grad():
        # BART's module scales embeddings; T5 has no scale.
        tokens_BSD = reference.get_encoder().embed_tokens(torch.from_numpy(given["source"]).long())
    soft_BPD = torch.from_numpy(soft_PD).expand(2, -1, -1)
    expected = MAKER.logits(
        reference,
        given,
        input_ids=None,
        inputs_embeds=torch.cat([soft_BPD, tokens_BSD], dim=1),
        attention_mask=torch.nn.functional.pad(
            torch.from_numpy(given["present"]).long(), (4, 0), value=1
        ),
    )
    prefix = model.backbone.lift(model.params, Embeds(jnp.asarray(soft_PD)))
    difference("logits, soft tokens", _logits(model, given, prefix) - expected, 1e-4, name)


@pytest.mark.parametrize("of_its_own", [None, {}, {"forced_eos_token_id": 7}], ids=str)
@pytest.mark.parametrize("in_config", [{}, {"forced_eos_token_id": 2}, {"forced_eos_token_id": 9}])
def test_forced_tokens_match_transformers(in_config, of_its_own, tmp_path):
    """transformers' BART configuration defaults to 2, but generation does not use it."""
    _pair("bart", 700, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config = {key: x for key, x in config.items() if key != "forced_eos_token_id"} | in_config
    (tmp_path / "config.json").write_text(json.dumps(config))
    generation = tmp_path / "generation_config.json"
    generation.unlink(missing_ok=True)
    if of_its_own is not None:
        generation.write_text(json.dumps({"decoder_start_token_id": 2} | of_its_own))
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    ids = theirs.generate(
        input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=4, min_new_tokens=4, do_sample=False
    )
    last = architecture_of(tmp_path).last_id
    assert theirs.generation_config.forced_eos_token_id == last
    assert last is None or ids[0, -1] == last


@pytest.mark.parametrize("both_ways", [False, True], ids=["decoder", "encoder"])
@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 20), (64, 300), (12, 100)])
def test_relative_buckets_match_transformers(buckets, farthest, both_ways):
    distance = np.arange(-2000, 2001)
    attention = transformers.models.t5.modeling_t5.T5Attention
    expected = attention._relative_position_bucket(
        torch.from_numpy(-distance), both_ways, buckets, farthest
    )
    ours = Relative(buckets, farthest, both_ways).bucket(distance)
    np.testing.assert_array_equal(ours, expected.numpy())
