"""The plugin finds stored prefixes, and refuses damaged and unsuitable ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from prefix_jax import artifact
from prefix_jax.interop.vllm import export_vllm
from prefix_jax.interop.vllm.plugin.stored import (
    PrefixError,
    Prefixes,
    Shape,
    UnknownPrefixError,
    placeholder_id,
)
from prefix_jax.prefix import Embeds, Prefix


def test_arrays_are_those_of_the_prefix(served: Path, shape: Shape) -> None:
    prefix = Prefixes(served)["six"]
    prefix.check(shape)
    original, card = artifact.load(served / "six")
    assert isinstance(original, Prefix)
    assert original.decoder is not None
    assert original.decoder.inside is not None
    k_LPKH, v_LPKH = prefix.load()
    np.testing.assert_array_equal(k_LPKH, original.decoder.inside.k_LPKH)
    np.testing.assert_array_equal(v_LPKH, original.decoder.inside.v_LPKH)
    assert prefix.length == card.length == 6


def test_replaced_prefix_has_another_salt(forms, save, served: Path, pretrained) -> None:
    prefixes = Prefixes(served)
    before = prefixes["six"]
    assert prefixes["six"] is before
    shifted = Embeds(forms["embeds"].x_PD + 0.1)
    export_vllm(save(shifted), served / "six", replace=True, model=pretrained)
    after = prefixes["six"]
    assert after.salt != before.salt
    assert not np.array_equal(after.load()[0], np.zeros_like(after.load()[0]))
    with pytest.raises(PrefixError, match="does not match the digests"):
        before.load()


@pytest.mark.parametrize("name", ["absent", "", "..", "../six", "six/../six", "/six", "six\n", "."])
def test_unknown_and_unsafe_names_are_unknown(name: str, served: Path) -> None:
    with pytest.raises(UnknownPrefixError):
        Prefixes(served)[name]


def test_removed_prefix_is_unknown(served: Path) -> None:
    prefixes = Prefixes(served)
    prefixes["six"]
    (served / "six").rename(served.parent / "elsewhere")
    with pytest.raises(UnknownPrefixError):
        prefixes["six"]


@pytest.mark.parametrize(
    ("field", "value"), [("text_position", 0), ("length", 5), ("pinned", True), ("kind", "hidden")]
)
def test_edited_card_is_refused(field: str, value: object, served: Path) -> None:
    file = served / "six" / "prefix.json"
    card = json.loads(file.read_text())
    file.write_text(json.dumps(card | {field: value}))
    with pytest.raises(PrefixError, match="does not match its digest"):
        Prefixes(served)["six"]


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"sha256": 1}', "[" * 100_000, "\udcff"])
def test_malformed_card_is_refused(text: str, served: Path) -> None:
    (served / "six" / "prefix.json").write_text(text, errors="surrogateescape")
    with pytest.raises(PrefixError, match=r"is damaged: prefix\.json"):
        Prefixes(served)["six"]


def test_damaged_arrays_are_refused(served: Path) -> None:
    prefix = Prefixes(served)["six"]
    file = served / "six" / "prefix.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(PrefixError, match="does not match the digests"):
        prefix.load()
    file.write_bytes(content[:100])
    with pytest.raises(PrefixError, match="cannot be read"):
        prefix.load()
    file.write_bytes(content + bytes(2**21))
    with pytest.raises(PrefixError, match="larger than its shape allows"):
        prefix.load()
    file.unlink()
    with pytest.raises(PrefixError, match="cannot be read"):
        prefix.load()


def test_other_form_in_the_directory_is_refused(forms, save, served: Path) -> None:
    save(forms["embeds"]).rename(served / "soft")
    with pytest.raises(PrefixError, match="write it with 'prefix-jax export --to vllm'"):
        Prefixes(served)["soft"]


def test_prefix_of_another_model_is_refused_with_both_shapes(served: Path, shape: Shape) -> None:
    other = dataclasses.replace(shape, layers=shape.layers + 1)
    with pytest.raises(
        PrefixError, match=f"it has layers {shape.layers} instead of {other.layers}"
    ):
        Prefixes(served)["six"].check(other)


def test_usable_lists_prefixes_and_the_reasons_of_the_others(served: Path, shape: Shape) -> None:
    (served / "broken").mkdir()
    (served / "broken" / "prefix.json").write_text("{")
    (served / ".six.unfinished").mkdir()
    usable, errors = Prefixes(served).usable(shape)
    assert [prefix.name for prefix in usable] == ["six"]
    assert len(errors) == 1
    assert "'broken' is damaged" in str(errors[0])


@pytest.mark.parametrize(
    ("bos", "eos", "expected"), [(1, 2, 1), (2, 2, 0), (2, [1, 2], 0), (None, 2, 0)]
)
def test_placeholder_is_the_start_token_unless_it_ends_texts(bos, eos, expected: int) -> None:
    assert placeholder_id(SimpleNamespace(bos_token_id=bos, eos_token_id=eos)) == expected
