"""Tests that imported adapters compute the same as in PEFT, and that exports are byte-identical.

`tests/fixtures/make_peft.py` created the adapters and PEFT's results.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import prefix_jax as pj
from prefix_jax import artifact
from prefix_jax.artifact import BackboneCard
from prefix_jax.backbones.loading.pretrained import Pretrained, load
from prefix_jax.errors import BackboneError, PrefixError
from prefix_jax.interop.export import export
from prefix_jax.interop.peft import export_peft, import_peft, tasks_of, to_peft
from prefix_jax.nn.attention.mask import TokenLayout
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
from tests.mutations import dump_json, mutate_bytes, mutate_json, refusal

FIXTURES = Path(__file__).parents[1] / "fixtures"
ADAPTERS = FIXTURES / "peft"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAMES = sorted(path.name for path in ADAPTERS.iterdir())
# Arrays that PEFT stores in two parts, or never reads, have one part in our exports.
REWRITTEN = {"multitask", "prefix_t5", "prefix_bart", "prompt_bart"}
P, T = 3, 8


@functools.cache
def backbone(name: str) -> Pretrained:
    return load(FIXTURES / name, dtype="float32")


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))


def imported(folder: Path, task: int | None = None) -> pj.Tuned:
    return pj.import_peft(folder, backbone(config_of(folder)["base_model_name_or_path"]), task=task)


def answers(tuned: pj.Tuned, h_BTD: jax.Array) -> jax.Array:
    """Computes an adapter's head outputs for a text and any soft tokens before it.

    Returns [2, T, Y], or [2, Y] for the whole text.
    """
    head, model = tuned.card.head, tuned.pretrained
    soft = h_BTD.shape[1] - T
    if isinstance(tuned.task, pj.Classify):
        first = 0 if head.soft else soft
        h_BTD = h_BTD[:, -1 if model.backbone.arch.causal else first]
    else:
        h_BTD = h_BTD[:, soft:]
    if head.pooled:
        h_BTD = model.backbone.pool(model.params, h_BTD)
    return head(tuned.head, h_BTD)


@functools.partial(jax.jit, static_argnums=(0, 4))
def outputs(
    model: Any, params: Any, produced: Produced | None, given: Any, states: bool
) -> jax.Array:
    """Returns logits or states of the text and any soft tokens before an encoder: [2, T, …]."""
    prefix = model.lift(params, produced)
    tokens = TokenLayout.plain(jnp.ones(given["ids"].shape, bool))
    encoded, ids = None, given["ids"]
    if "decoder_ids" in given:
        encoded, ids = model.encode(params, ids, tokens, prefix), given["decoder_ids"]
    h_BTD, _ = model.hidden(params, ids, tokens, prefix, encoded=encoded)
    return h_BTD if states else model.unembed(params, h_BTD)


@pytest.mark.parametrize("name", NAMES)
def test_imported_adapter_computes_the_same_as_in_peft(name: str) -> None:
    tuned = imported(ADAPTERS / name, task=1 if name == "multitask" else None)
    stored = np.load(ADAPTERS / name / "expected.npz")
    given = {key: x for key, x in stored.items() if key != "expected"}
    model = tuned.pretrained
    states = tuned.head is not None or not model.backbone.arch.causal
    ours = outputs(model.backbone, model.params, tuned.produced, given, states)
    ours = ours[:, -T:] if tuned.head is None else answers(tuned, ours)
    np.testing.assert_allclose(ours, stored["expected"], rtol=0, atol=1e-5)
    bare = outputs(model.backbone, model.params, None, given, states)
    bare = bare if tuned.head is None else answers(tuned, bare)
    assert np.max(np.abs(bare - stored["expected"])) > 0.05


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


def test_multitask_prompt_has_one_prefix_per_task(tmp_path: Path) -> None:
    folder = ADAPTERS / "multitask"
    assert tasks_of(folder) == 3
    assert tasks_of(ADAPTERS / "prompt") is None
    arrays = load_file(folder / WEIGHTS)
    for task in range(3):
        product = arrays["prefix_task_cols"][task] @ arrays["prefix_task_rows"][task]
        produced = imported(folder, task).produced
        np.testing.assert_array_equal(produced.x_PD, arrays["prompt_embeddings"] * product)
    with pytest.raises(PrefixError, match=r"tasks 0 to 2; choose one"):
        imported(folder)
    with pytest.raises(PrefixError, match=r"tasks 0 to 2, not task 3; choose one"):
        imported(folder, 3)
    with pytest.raises(PrefixError, match="PROMPT_TUNING, which has no tasks"):
        imported(ADAPTERS / "prompt", 0)


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


# A decoder reads stored layer 2l mod S.


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


# Prefixes that PEFT cannot express.


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


# Unknown and damaged adapters.


@pytest.fixture
def copy(tmp_path: Path) -> Callable[..., Path]:
    """Copies a stored adapter and changes its configuration."""

    def copy(name: str = "prefix", **changes: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(ADAPTERS / name, folder)
        content = config_of(folder) | changes
        (folder / CONFIG).write_text(json.dumps(content), encoding="utf-8")
        return folder

    return copy


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    arrays = load_file(folder / WEIGHTS)
    change(arrays)
    save_file(arrays, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LORA"}, "peft_type 'LORA'.*PREFIX_TUNING"),
        ({"peft_type": None}, "peft_type None"),
        ({"num_virtual_tokens": 4}, "num_virtual_tokens 4.*has 3 rows"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens must be .*got null"),
        ({"num_virtual_tokens": "3"}, "num_virtual_tokens must be .*got '3'"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type is SEQ_2_SEQ_LM.*supports CAUSAL_LM,"),
    ],
)
def test_config_that_does_not_fit_is_an_error(
    changes: dict[str, Any], message: str, copy: Callable[..., Path]
) -> None:
    with pytest.raises(PrefixError, match=message):
        imported(copy(**changes))


def test_arrays_that_do_not_fit_are_an_error(copy: Callable[..., Path]) -> None:
    folder = copy()
    rewrite(folder, lambda arrays: arrays.update(prompt_embeddings=np.ones((3, 40), np.float32)))
    with pytest.raises(PrefixError, match="40 numbers per slot, but this backbone needs 64"):
        imported(folder)
    rewrite(folder, lambda arrays: arrays.update(prompt_embeddings=np.full((3, 64), np.nan, "f4")))
    with pytest.raises(PrefixError, match="NaN"):
        imported(folder)
    rewrite(folder, lambda arrays: arrays.update(prompt_embeddings=np.ones(192, np.float32)))
    with pytest.raises(PrefixError, match="must have 2 axes"):
        imported(folder)
    rewrite(folder, lambda arrays: arrays.update(other=arrays.pop("prompt_embeddings")))
    with pytest.raises(PrefixError, match="has no prompt_embeddings, only other"):
        imported(folder)


def test_soft_tokens_of_another_width_are_an_error(copy: Callable[..., Path]) -> None:
    folder = rewrite(
        copy("prompt"), lambda arrays: arrays.update(prompt_embeddings=np.ones((3, 16), np.float32))
    )
    with pytest.raises(PrefixError, match="has width 16, but this backbone has 32"):
        imported(folder)


# Heads.


@pytest.mark.parametrize(
    ("name", "task"),
    [("classify_bert", "classify"), ("tag_bert", "tag"), ("span_bert", "span")],
)
def test_imports_a_head_with_its_task(name: str, task: str, tmp_path: Path) -> None:
    tuned = imported(ADAPTERS / name)
    tuned.save(tmp_path / "ours")
    again = pj.load_prefix(tmp_path / "ours", tuned.pretrained)
    stored = again.card.task
    assert stored["name"] == task
    assert stored.get("labels") == (None if task == "span" else ["LABEL_0", "LABEL_1", "LABEL_2"])
    assert sorted(again.head) == ["out_DY", "out_bias_Y"]


def test_one_output_is_a_regression(copy: Callable[..., Path]) -> None:
    def first(arrays: dict[str, np.ndarray]) -> None:
        for name in list(arrays):
            if "classifier" in name:
                arrays[name] = np.ascontiguousarray(arrays[name][:1])

    folder = rewrite(copy("classify_bert"), first)
    assert isinstance(imported(folder).task, pj.Regress)


def test_rejects_unexpected_head(copy: Callable[..., Path]) -> None:
    head = {"base_model.lm_head.weight": np.ones((2, 32), np.float32)}
    folder = rewrite(copy(), lambda arrays: arrays.update(head))
    with pytest.raises(PrefixError, match=r"more than a prefix, base_model\.lm_head\.weight"):
        imported(folder)


def test_rejects_missing_or_wrong_head(copy: Callable[..., Path]) -> None:
    folder = copy("classify_bert")
    whole = load_file(folder / WEIGHTS)
    bare = {"prompt_embeddings": whole["prompt_embeddings"]}
    save_file(bare, folder / WEIGHTS)
    with pytest.raises(PrefixError, match=r"no weights .*of a head"):
        imported(folder)
    save_file(bare | {"base_model.score.weight": np.ones((3, 32), np.float32)}, folder / WEIGHTS)
    with pytest.raises(PrefixError, match=r"base_model\.classifier\.bias.*has base_model\.score"):
        imported(folder)
    other = {"base_model.classifier.weight": np.ones((3, 16), np.float32)}
    save_file(whole | other, folder / WEIGHTS)
    with pytest.raises(PrefixError, match=r"shape \(3, 16\), but .* head has \(3, 32\)"):
        imported(folder)


def test_rejects_export_of_classifier_that_reads_text_after_soft_tokens(tmp_path: Path) -> None:
    tuned = imported(ADAPTERS / "classify_soft")
    assert tuned.task.reads_soft
    card = dataclasses.replace(
        tuned.card,
        task={**tuned.card.task, "reads_soft": False},
        head=dataclasses.replace(tuned.card.head, soft=False),
    )
    artifact.save(tmp_path / "ours", tuned.produced, card, head=tuned.head)
    with pytest.raises(PrefixError, match=r"the text's first token; train with task\.reads_soft"):
        export_peft(tmp_path / "ours", tmp_path / "theirs")


def test_copy_in_another_container_keeps_its_head(tmp_path: Path) -> None:
    imported(ADAPTERS / "classify_roberta").save(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "copy")
    before, after = (artifact.load_head(tmp_path / name) for name in ("ours", "copy"))
    assert sorted(after) == ["dense_DE", "dense_bias_E", "out_DY", "out_bias_Y"]
    for name, x in before.items():
        np.testing.assert_array_equal(after[name], x)


def test_rejects_encoder_decoder_prefix_with_one_submodule(copy: Callable[..., Path]) -> None:
    with pytest.raises(PrefixError, match="num_transformer_submodules is 1"):
        imported(copy("prefix_t5", num_transformer_submodules=1))


def test_adaption_prompt_must_cover_the_top_layers(copy: Callable[..., Path]) -> None:
    with pytest.raises(PrefixError, match=r"layers \[1\].*adapter_layers 2"):
        imported(copy("adaption", adapter_layers=2))


def test_rejects_adaption_prompt_for_gpt2(copy: Callable[..., Path]) -> None:
    with pytest.raises(PrefixError, match="with a gpt2, PEFT adds"):
        imported(copy("adaption", base_model_name_or_path="backbones/gpt2"))


def test_pickles_are_not_read(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(PrefixError, match=r"a pickle, which is never read.*Convert it"):
        imported(folder)


def test_damaged_files_are_an_error(copy: Callable[..., Path]) -> None:
    folder = copy()
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-8])
    with pytest.raises(PrefixError, match="is truncated or corrupt"):
        imported(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(PrefixError, match=f"has no {WEIGHTS}"):
        imported(folder)
    (folder / CONFIG).write_text("[]")
    with pytest.raises(PrefixError, match="expected a JSON object"):
        import_peft(folder, backbone("backbones/llama_grouped"))
    (folder / CONFIG).write_text("{")
    with pytest.raises(PrefixError, match="malformed JSON"):
        import_peft(folder, backbone("backbones/llama_grouped"))


def test_deeply_nested_adapter_config_is_refused(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / CONFIG).write_text("[" * 100_000)
    with pytest.raises(PrefixError, match="nested more than"):
        import_peft(folder, "unused")


@pytest.mark.parametrize("path", ["x" * 300, "~nosuchuser/adapter", "a\0b"])
def test_path_that_cannot_exist_is_a_prefix_error(path: str) -> None:
    with pytest.raises(PrefixError, match="cannot"):
        import_peft(path, "unused")


@pytest.mark.parametrize("count", [10**9, 0, -1, True, "1"])
def test_number_of_adapter_layers_is_checked(copy: Callable[..., Path], count: object) -> None:
    with pytest.raises(PrefixError, match="adapter_layers"):
        imported(copy("adaption", adapter_layers=count))


@pytest.mark.parametrize("kind", ["prefix", "adaption", "multitask", "classify_roberta"])
def test_mutated_adapters_import_or_raise_one_error(kind: str, tmp_path: Path) -> None:
    rng, folder = Random(0), Path(shutil.copytree(ADAPTERS / kind, tmp_path / kind))
    config = json.loads((folder / CONFIG).read_text())
    weights = (folder / WEIGHTS).read_bytes()
    pretrained = backbone(config["base_model_name_or_path"])
    task = 1 if kind == "multitask" else None
    refused = 0
    for _ in range(100):
        (folder / CONFIG).write_bytes(dump_json(mutate_json(config, rng)))
        (folder / WEIGHTS).write_bytes(
            mutate_bytes(weights, rng) if rng.random() < 0.3 else weights
        )
        message = refusal(lambda: import_peft(folder, pretrained, task=task), PrefixError)
        refused += message is not None
    assert 20 < refused < 100


def test_folder_of_named_adapters_error_lists_them(tmp_path: Path) -> None:
    shutil.copytree(ADAPTERS / "prefix", tmp_path / "mine")
    with pytest.raises(PrefixError, match="adapters by name: mine"):
        import_peft(tmp_path, backbone("backbones/llama_grouped"))


def test_missing_backbone_name_error_asks_for_it(copy: Callable[..., Path]) -> None:
    with pytest.raises(BackboneError, match="does not name its backbone"):
        import_peft(copy(base_model_name_or_path=None))


def test_bfloat16_is_widened(copy: Callable[..., Path]) -> None:
    folder = copy("prompt")
    x = load_file(folder / WEIGHTS)["prompt_embeddings"]
    header = json.dumps(
        {"prompt_embeddings": {"dtype": "BF16", "shape": x.shape, "data_offsets": [0, 2 * x.size]}}
    ).encode()
    content = len(header).to_bytes(8, "little") + header + x.astype(ml_dtypes.bfloat16).tobytes()
    (folder / WEIGHTS).write_bytes(content)
    produced = imported(folder).produced
    assert produced.x_PD.dtype == np.float32
    np.testing.assert_array_equal(produced.x_PD, x.astype(ml_dtypes.bfloat16).astype("f4"))
