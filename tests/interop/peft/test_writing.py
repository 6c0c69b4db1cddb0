"""Exported adapters are those of PEFT, byte for byte, and what PEFT cannot express is an error."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import ADAPTERS, NAMES, WEIGHTS, P, config_of, imported
from safetensors.numpy import load_file

import prefix_jax as pj
from prefix_jax import artifact
from prefix_jax.artifact import BackboneCard
from prefix_jax.backbones.loading.pretrained import Pretrained
from prefix_jax.errors import PrefixError
from prefix_jax.interop.peft import export_peft, import_peft, to_peft
from prefix_jax.prefix import (
    Adapter,
    Gated,
    Geometry,
    Hidden,
    KVPrefix,
    Prefix,
    Produced,
    Site,
    SiteShape,
)

# Arrays that PEFT stores in two parts, or never reads, have one part in our exports.
REWRITTEN = {"multitask", "prefix_t5", "prefix_bart", "prompt_bart"}


@pytest.mark.parametrize("name", sorted({*NAMES} - REWRITTEN - {"adaption"}))
def test_exporting_an_import_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    tuned = imported(ADAPTERS / name)
    tuned.save(tmp_path / "ours")
    export_peft(tmp_path / "ours", tmp_path / "theirs")
    before, after = (x / WEIGHTS for x in (ADAPTERS / name, tmp_path / "theirs"))
    assert after.read_bytes() == before.read_bytes()
    ours, theirs = config_of(tmp_path / "theirs"), config_of(ADAPTERS / name)
    assert list(ours) == list(theirs)
    # Keys about PEFT's training and the backbone's path; PEFT names a head's modules twice.
    free = {"base_model_name_or_path", "prefix_projection", "encoder_hidden_size"}
    free |= {"encoder_reparameterization_type", "modules_to_save"}
    assert set(ours.get("modules_to_save") or ()) == set(theirs.get("modules_to_save") or ())
    assert {k: v for k, v in ours.items() if k not in free} == {
        k: v for k, v in theirs.items() if k not in free
    }


@pytest.mark.parametrize("name", sorted(REWRITTEN - {"multitask"}))
def test_encoder_decoder_export_round_trips(name: str, tmp_path: Path) -> None:
    tuned = imported(ADAPTERS / name)
    tuned.save(tmp_path / "theirs", "peft")
    again = pj.import_peft(tmp_path / "theirs", tuned.pretrained)
    for ours, theirs in zip(
        jax.tree.leaves(tuned.produced), jax.tree.leaves(again.produced), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_multitask_run_exports_as_one_multitask_prompt(tmp_path: Path) -> None:
    folder, run = ADAPTERS / "multitask", tmp_path / "run"
    for task, name in enumerate(("a", "b", "c")):
        imported(folder, task).save(run / "prefixes" / name)
    shutil.copy(folder / WEIGHTS, run / "multitask.safetensors")
    config = export_peft(run, tmp_path / "theirs")
    free = {"base_model_name_or_path"}
    assert {k: v for k, v in config.items() if k not in free} == {
        k: v for k, v in config_of(folder).items() if k not in free
    }
    expected, arrays = load_file(folder / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS)
    assert arrays.keys() == expected.keys()
    for name, x in arrays.items():
        np.testing.assert_array_equal(x, expected[name])
    # The prefix of one dataset is an ordinary prefix.
    alone = export_peft(run / "prefixes" / "b", tmp_path / "alone")
    assert alone["peft_type"] == "PROMPT_TUNING"
    with pytest.raises(PrefixError, match="bake the prefix of one"):
        export_peft(run, tmp_path / "baked", bake=True)


# In PEFT, layer l of a decoder with an encoder reads stored layer 2l mod S.
@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5])
def test_every_layer_of_a_decoder_with_encoder_gets_its_own_keys(layers: int) -> None:
    rng = np.random.default_rng(0)
    k_LPKH, v_LPKH = rng.normal(size=(2, layers, P, 2, 4)).astype(np.float32)
    config, arrays = to_peft(*prefix_of(Site(KVPrefix(k_LPKH, v_LPKH)), layers=layers))
    stored = config["num_layers"]
    assert stored in (layers, layers + 1)
    assert stored % 2 == 1
    assert config["num_transformer_submodules"] == 2
    # Like PEFT's `get_prompt`: doubled, then split into groups of four, of which two are discarded.
    slots = arrays["prompt_embeddings"].reshape(P, stored * 2, 2, 4)
    slots = np.concatenate([slots, slots], axis=1).reshape(P, stored, 4, 2, 4)
    np.testing.assert_array_equal(slots[:, :layers, 0].swapaxes(0, 1), k_LPKH)
    np.testing.assert_array_equal(slots[:, :layers, 1].swapaxes(0, 1), v_LPKH)


def prefix_of(
    site: Site | None = None, *, layers: int = 2, single: bool = False, **more: Any
) -> tuple[Prefix, artifact.Card]:
    """Makes a prefix for a decoder's site, and its card."""
    shape = SiteShape(layers, 4, 2, 4)
    sites = {} if single else {"encoder": shape, "cross": shape}
    geometry = Geometry(16, 32, decoder=shape, **sites)
    prefix = Prefix(**{"decoder": site, "text_position": P, **more})
    return prefix, card_of(prefix, geometry)


def card_of(produced: Produced, geometry: Geometry, model_type: str = "t5") -> artifact.Card:
    backbone = BackboneCard(
        source="/somewhere", model_type=model_type, fingerprint="0", dtype="float32"
    )
    return artifact.make_card(produced, geometry, backbone)


def some(layers: int = 2, bias: float | None = None) -> KVPrefix:
    bias_LPN = None if bias is None else jnp.full((layers, P, 4), bias)
    return KVPrefix(jnp.ones((layers, P, 2, 4)), jnp.ones((layers, P, 2, 4)), bias_LPN)


GATED = Gated(jnp.ones((2, P, 2, 4)), jnp.ones((2, P, 2, 4)), jnp.ones((2, 4)))

INEXPRESSIBLE: dict[str, tuple[Callable[[], tuple[Prefix, artifact.Card]], str]] = {
    "encoder": (lambda: prefix_of(Site(some()), encoder=Site(some())), r"encoder.*sites=\[deco"),
    "cross": (lambda: prefix_of(None, cross=Site(some())), r"cross.*sites=\[decoder\]"),
    "gates": (lambda: prefix_of(Site(some(), GATED)), "gates or matrices.*method.name=prefix"),
    "layers": (lambda: prefix_of(Site(some(1), layers=(1,))), "some layers only"),
    "bias": (lambda: prefix_of(Site(some(bias=1.0))), "biases on slots"),
    "pinned": (lambda: prefix_of(Site(some()), pinned=True), "method.pinned=false"),
    "text_position": (
        lambda: prefix_of(Site(some()), text_position=0),
        "method.text_position=null",
    ),
    "embeds": (
        lambda: prefix_of(Site(some()), embeds_PD=jnp.ones((P, 16))),
        "soft tokens in addition to keys and values",
    ),
}


@pytest.mark.parametrize("part", INEXPRESSIBLE)
def test_export_error_names_part_and_alternative(part: str) -> None:
    make, message = INEXPRESSIBLE[part]
    with pytest.raises(PrefixError, match=message) as error:
        to_peft(*make())
    assert "--to safetensors" in str(error.value)


def test_zero_bias_can_be_exported() -> None:
    assert to_peft(*prefix_of(Site(some(bias=0.0))))[0]["peft_type"] == "PREFIX_TUNING"


def test_rejects_kinds_that_peft_does_not_support() -> None:
    geometry = Geometry(16, 32, decoder=SiteShape(2, 4, 2, 4))
    hidden = Hidden(jnp.ones((2, P, 16)))
    with pytest.raises(PrefixError, match="--bake"):
        to_peft(hidden, card_of(hidden, geometry))
    adapter = Adapter(jnp.ones((2, P, 16)), jnp.ones((2, 4)))
    with pytest.raises(PrefixError, match="ADAPTION_PROMPT"):
        to_peft(adapter, card_of(adapter, geometry))


def test_rejects_model_without_cache() -> None:
    geometry = Geometry(16, 32, encoder=SiteShape(2, 4, 2, 4))
    prefix = Prefix(encoder=Site(some()), text_position=P)
    with pytest.raises(PrefixError, match=r"distilbert.*method.name=prompt"):
        to_peft(prefix, card_of(prefix, geometry, "distilbert"))


def test_hidden_states_are_baked_on_request(
    forms: dict[str, Produced], save: Callable[..., Path], tmp_path: Path, pretrained: Pretrained
) -> None:
    source = save(forms["hidden"])
    config = export_peft(source, tmp_path / "adapter", bake=True, model=pretrained)
    assert (config["peft_type"], config["num_virtual_tokens"]) == ("PREFIX_TUNING", 6)
    again = import_peft(tmp_path / "adapter", pretrained).produced
    for ours, expected in zip(jax.tree.leaves(again), jax.tree.leaves(forms["kv"]), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_export_does_not_overwrite(
    forms: dict[str, Produced], save: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(PrefixError, match="exists already"):
        export_peft(save(forms["kv"]), tmp_path / "there")
    assert [file.name for file in (tmp_path / "there").iterdir()] == ["file"]
