"""Tests that an exported prefix is unchanged, and readable without this package."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from prefix_jax import artifact
from prefix_jax.artifact import Container
from prefix_jax.backbones.loading.pretrained import Pretrained, load
from prefix_jax.errors import BackboneError, PrefixError
from prefix_jax.interop.export import export
from prefix_jax.nn.attention.attend import attend
from prefix_jax.nn.attention.mask import MaskAndBias
from prefix_jax.prefix import Embeds, Prefix, Produced, Site

Forms = dict[str, Produced]
CONTAINERS = ["orbax", "safetensors"]
DOCUMENT = Path(__file__).parents[2] / "docs" / "export.md"
SNIPPETS = dict(re.findall(r"```python\n# (.*?)\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL))


def leaves(produced: Produced) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(produced)]


@pytest.mark.parametrize("to", CONTAINERS)
@pytest.mark.parametrize("kind", ["embeds", "hidden", "kv"])
def test_copy_has_the_same_arrays_and_card(
    kind: str, to: Container, forms: Forms, save, tmp_path: Path
) -> None:
    source = save(forms[kind])
    card = export(source, tmp_path / "copy", to)
    copy, copied_card = artifact.load(tmp_path / "copy")
    assert copied_card == card == artifact.load(source)[1]
    for ours, theirs in zip(leaves(forms[kind]), leaves(copy), strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("kind", ["embeds", "hidden"])
def test_baking_returns_the_keys_and_values_of_a_prefix(
    kind: str, forms: Forms, save, pretrained: Pretrained, tmp_path: Path
) -> None:
    card = export(save(forms[kind]), tmp_path / "baked", bake=True, model=pretrained)
    baked, loaded_card = artifact.load(tmp_path / "baked")
    assert isinstance(baked, Prefix)
    assert card == loaded_card
    assert (card.kind, card.length, card.text_position) == ("kv", 6, 6)
    for ours, expected in zip(leaves(baked), leaves(forms["kv"]), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_baking_loads_the_training_backbone_by_default(forms: Forms, save, tmp_path: Path) -> None:
    assert export(save(forms["embeds"]), tmp_path / "baked", bake=True).kind == "kv"


def test_soft_tokens_before_an_encoder_cannot_be_baked(tmp_path: Path) -> None:
    encoder = load(tiny.write_encoder(tmp_path / "bert"), dtype="float32")
    produced = Embeds(jnp.ones((2, 32)))
    backbone = artifact.BackboneCard(
        source=encoder.source, model_type="bert", fingerprint=encoder.fingerprint, dtype="float32"
    )
    card = artifact.make_card(produced, encoder.backbone.geometry, backbone)
    artifact.save(tmp_path / "soft", produced, card)
    with pytest.raises(PrefixError, match="depend on the text after them; omit --bake"):
        export(tmp_path / "soft", tmp_path / "baked", bake=True)
    assert not (tmp_path / "baked").exists()


def test_keys_and_values_are_baked_already_and_need_no_backbone(
    forms: Forms, save, tmp_path: Path
) -> None:
    source = save(forms["kv"], source="/gone")
    assert export(source, tmp_path / "baked", bake=True).kind == "kv"


def test_moved_backbone_error_asks_for_its_path(forms: Forms, save, tmp_path: Path) -> None:
    source = save(forms["embeds"], source="/gone/model")
    with pytest.raises(BackboneError, match=r"backbone /gone/model.*--model"):
        export(source, tmp_path / "baked", bake=True)


def test_baking_with_another_backbone_is_refused(forms: Forms, save, tmp_path: Path) -> None:
    fixtures = Path(__file__).parents[1] / "fixtures" / "backbones"
    source, out = save(forms["embeds"]), tmp_path / "baked"
    with pytest.raises(PrefixError, match="has another shape"):
        export(source, out, bake=True, model=fixtures / "llama", allow_other_weights=True)
    other = load(fixtures / "llama_grouped")
    other = dataclasses.replace(other, fingerprint="other")
    with pytest.raises(PrefixError, match="weights other"):
        export(source, out, bake=True, model=other)
    assert not out.exists()
    export(source, out, bake=True, model=other, allow_other_weights=True)
    assert out.exists()


def run_without_the_package(code: str, folder: Path) -> None:
    """Runs code in a Python in which importing prefix_jax fails."""
    blocked = "import sys; sys.modules['prefix_jax'] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", blocked + code],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("to", CONTAINERS)
def test_documented_lines_read_an_export_without_this_package(
    to: Container, forms: Forms, save, tmp_path: Path
) -> None:
    export(save(forms["kv"]), tmp_path / "my-prefix", to)
    assert len([line for line in SNIPPETS[f"read: {to}"].splitlines() if line]) == 5
    store = (
        "import numpy as np; np.savez('read.npz', text_position=card['text_position'], **arrays)"
    )
    run_without_the_package(SNIPPETS[f"read: {to}"] + store, tmp_path)
    read = np.load(tmp_path / "read.npz")
    assert read["text_position"] == 6
    for name, array in zip(("decoder.k_LPKH", "decoder.v_LPKH"), leaves(forms["kv"]), strict=True):
        assert read[name].dtype == np.float32
        assert np.array_equal(read[name], array)


@pytest.mark.parametrize("with_bias", [False, True])
def test_documented_attention_matches_ours(
    with_bias: bool, forms: Forms, save, pretrained: Pretrained, tmp_path: Path
) -> None:
    g, rng = pretrained.backbone.geometry.main, np.random.default_rng(0)
    T, N, K, H = 5, g.query_heads, g.kv_heads, g.head_dim
    stored = forms["kv"]
    assert isinstance(stored, Prefix)
    inside = stored.decoder.inside
    if with_bias:
        bias_LPN = rng.normal(size=(g.layers, 6, N)).astype(np.float32)
        bias_LPN[1, 2, 0] = -np.inf
        inside = dataclasses.replace(inside, bias_LPN=jnp.asarray(bias_LPN))
    export(save(Prefix(Site(inside), text_position=6)), tmp_path / "my-prefix")

    q_TNH, k_TKH, v_TKH = (rng.normal(size=(T, n, H)).astype(np.float32) for n in (N, K, K))
    np.savez(tmp_path / "text.npz", q=q_TNH, k=k_TKH, v=v_TKH)
    use = "t = np.load('text.npz'); np.save('out', attend(t['q'], t['k'], t['v'], 1, 0.3))"
    run_without_the_package(SNIPPETS["read: safetensors"] + SNIPPETS["attend"] + use, tmp_path)

    expected = attend(
        q_TNH[None],
        k_TKH[None],
        v_TKH[None],
        MaskAndBias(np.tri(T, dtype=bool)[None]),
        Site(jax.tree.map(lambda leaf: leaf[1], inside)),
        0.3,
    )
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected[0], atol=1e-5)
