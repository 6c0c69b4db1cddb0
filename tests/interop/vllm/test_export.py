"""Prefixes are exported for vLLM, or refused with the part that vLLM cannot express."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import yaml

from prefix_jax import artifact
from prefix_jax.errors import BackboneError, PrefixError
from prefix_jax.interop.vllm import export_vllm
from prefix_jax.prefix import Adapter, KVPrefix, Memory, Prefix, Produced, Site

Forms = dict[str, Produced]


def site_of(forms: Forms) -> Site:
    prefix = forms["kv"]
    assert isinstance(prefix, Prefix)
    assert prefix.decoder is not None
    return prefix.decoder


def with_site(forms: Forms, **fields) -> Prefix:
    return Prefix(decoder=dataclasses.replace(site_of(forms), **fields), text_position=6)


def test_export_writes_the_prefix_the_plugin_and_the_arguments(served: Path) -> None:
    assert sorted(path.name for path in served.iterdir()) == ["prefix_vllm", "six", "vllm.yaml"]
    plugin = {path.name for path in (served / "prefix_vllm").iterdir()}
    assert plugin == {"__init__.py", "connector.py", "models.py", "scheduling.py", "stored.py"}
    arguments = yaml.safe_load((served / "vllm.yaml").read_text())
    assert arguments["kv-transfer-config"]["kv_connector_module_path"] == "prefix_vllm.connector"


def test_edited_arguments_are_kept(forms: Forms, save, served: Path) -> None:
    (served / "vllm.yaml").write_text("port: 9000\n")
    export_vllm(save(forms["kv"]), served / "other")
    assert (served / "vllm.yaml").read_text() == "port: 9000\n"


@pytest.mark.parametrize("kind", ["embeds", "hidden"])
def test_other_forms_become_keys_and_values(
    kind: str, forms: Forms, save, pretrained, tmp_path: Path
) -> None:
    card = export_vllm(save(forms[kind]), tmp_path / "served" / "baked", model=pretrained)
    assert (card.kind, card.length, card.text_position) == ("kv", 6, 6)
    baked, _ = artifact.load(tmp_path / "served" / "baked")
    assert isinstance(baked, Prefix)
    expected = site_of(forms).inside
    assert expected is not None
    assert baked.decoder is not None
    assert baked.decoder.inside is not None
    np.testing.assert_allclose(baked.decoder.inside.k_LPKH, expected.k_LPKH, atol=1e-5)


def test_zero_biases_are_dropped(forms: Forms, save, tmp_path: Path) -> None:
    inside = site_of(forms).inside
    assert isinstance(inside, KVPrefix)
    biased = dataclasses.replace(inside, bias_LPN=jnp.zeros((*inside.k_LPKH.shape[:2], 4)))
    export_vllm(save(with_site(forms, inside=biased)), tmp_path / "served" / "zero")
    copy, _ = artifact.load(tmp_path / "served" / "zero")
    assert isinstance(copy, Prefix)
    assert copy.decoder is not None
    assert copy.decoder.inside is not None
    assert copy.decoder.inside.bias_LPN is None


def test_parts_that_vllm_cannot_express_are_named(forms: Forms, save, tmp_path: Path) -> None:
    site = site_of(forms)
    assert site.inside is not None
    L, P, _, H = site.inside.k_LPKH.shape
    biased = dataclasses.replace(site.inside, bias_LPN=jnp.ones((L, P, 4)))
    first = dataclasses.replace(
        site.inside, k_LPKH=site.inside.k_LPKH[:1], v_LPKH=site.inside.v_LPKH[:1]
    )
    cases: list[tuple[Produced, str]] = [
        (with_site(forms, inside=biased), "biases on slots"),
        (with_site(forms, outside=Memory(jnp.ones((L, 4, H, H)))), "outside the softmax"),
        (with_site(forms, inside=first, layers=(0,)), "slots in some layers only"),
        (Prefix(decoder=site, text_position=0), "train with method.text_position=null"),
        (Adapter(jnp.ones((L, 4, 32)), jnp.ones((L, 4))), "gates outside the softmax"),
    ]
    for produced, message in cases:
        with pytest.raises(PrefixError, match=message):
            export_vllm(save(produced), tmp_path / "served" / "x")
        assert not (tmp_path / "served").exists()


def test_pinned_prefix_is_refused_only_for_sliding_windows(
    forms: Forms, save, pretrained, tmp_path: Path
) -> None:
    pinned = dataclasses.replace(forms["kv"], pinned=True)  # type: ignore[type-var]
    export_vllm(save(pinned), tmp_path / "served" / "global")
    with pytest.raises(PrefixError, match=r"method\.pinned=false"):
        export_vllm(save(pinned, source="absent"), tmp_path / "served" / "unknown")


@pytest.mark.parametrize(
    "name", ["a b", ".hidden", "-x", "..", "ü", "x" * 129, "prefix_vllm", "model", "vllm.yaml"]
)
def test_names_that_cannot_be_model_ids_are_refused(
    name: str, forms: Forms, save, tmp_path: Path
) -> None:
    with pytest.raises(PrefixError, match="cannot be a model id in vLLM; use 1 to 128 letters"):
        export_vllm(save(forms["kv"]), tmp_path / "served" / name)


def test_existing_prefix_is_replaced_only_on_request(forms: Forms, save, served: Path) -> None:
    source = save(forms["kv"])
    with pytest.raises(PrefixError, match=r"already contains a prefix.*--replace"):
        export_vllm(source, served / "six")
    export_vllm(source, served / "six", replace=True)


def test_model_is_written_once_and_only_if_vllm_cannot_read_it(
    forms: Forms, save, pretrained, tmp_path: Path
) -> None:
    source = save(forms["kv"])
    with pytest.raises(PrefixError, match="in a layout that vLLM reads; omit --write-model"):
        export_vllm(source, tmp_path / "served" / "x", write_model=True)
    (tmp_path / "served" / "model").mkdir(parents=True)
    with pytest.raises(PrefixError, match="share it"):
        export_vllm(source, tmp_path / "served" / "x", write_model=True)
    assert not (tmp_path / "served" / "x").exists()


def test_model_that_does_not_fit_the_prefix_is_refused(forms: Forms, save, tmp_path: Path) -> None:
    source = save(forms["kv"])
    with pytest.raises(BackboneError, match="absent"):
        export_vllm(source, tmp_path / "served" / "x", model=tmp_path / "absent")
    tiny.write_model(tmp_path / "other", num_hidden_layers=3)
    with pytest.raises(PrefixError, match=r"decoder\.layers: 2 in the prefix, 3 in the backbone"):
        export_vllm(source, tmp_path / "served" / "x", model=tmp_path / "other")
    assert not (tmp_path / "served").exists()


def test_plugin_imports_neither_jax_nor_prefix_jax(served: Path) -> None:
    code = (
        "import sys, prefix_vllm.models, prefix_vllm.scheduling\n"
        "assert not {'jax', 'prefix_jax', 'vllm', 'torch'} & set(sys.modules), sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=served, check=True)
