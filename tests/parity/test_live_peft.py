"""Compares exports and imports of PEFT adapters with PEFT.

Logits, greedy and beam search, files, the gradient and a step of AdamW, method by family. Runs
only under `make parity`, whose environment has torch, transformers and peft.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax import artifact
from prefix_jax.api import Tuned, import_peft
from prefix_jax.backbones.loading.pretrained import Pretrained, load
from prefix_jax.config import DecodeConfig, OptimConfig
from prefix_jax.decode.generate import Generator
from prefix_jax.nn.attention.mask import TokenLayout
from prefix_jax.nn.head import Head
from prefix_jax.prefix import Embeds, KVPrefix, Prefix, Produced, Site
from prefix_jax.tasks import Classify, ExtractSpan, Tag, to_card
from prefix_jax.train.optimizer import make_optimizer, make_schedule

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

FIXTURES = Path(__file__).parents[1] / "fixtures"
FILES = ("adapter_config.json", "adapter_model.safetensors")
P, T, NEW = 5, 9, 8


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = _import(FIXTURES / "make_peft.py")
LETTERS = _import(FIXTURES.parent / "decode" / "test_transformers.py")

CAUSAL = [f"backbones/{name}" for name in ("gpt2", "llama_grouped", "qwen3", "mistral_window")]
CAUSAL += [f"backbones/{name}" for name in ("gemma", "gemma2", "gemma3_text", "opt", "neox")]
SEQ2SEQ = [f"encoder_decoders/{name}" for name in ("t5", "t5_gated", "mt5", "bart", "bart_scaled")]
# Only the part below their heads.
ENCODERS = [f"encoders/{name}" for name in ("bert", "roberta", "xlm_roberta", "electra")]
MODELS = CAUSAL + SEQ2SEQ + ENCODERS


@functools.cache
def pretrained(name: str) -> Pretrained:
    return load(FIXTURES / name, dtype="float32")


def task_of(name: str) -> str:
    if name in SEQ2SEQ:
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if name in CAUSAL else "FEATURE_EXTRACTION"


def reference(name: str) -> Any:
    return MAKER.reference(FIXTURES / name, task_of(name))


def given(name: str) -> dict[str, np.ndarray]:
    return MAKER.inputs(0, 90, name in SEQ2SEQ)


def tuned(name: str, method: str) -> Tuned:
    """A random prefix of a model."""
    model, rng = pretrained(name), np.random.default_rng(3)
    geometry = model.backbone.geometry
    if method in ("prefix", "cartridge"):
        shape = geometry.main
        size = (2, shape.layers, P, shape.kv_heads, shape.head_dim)
        k_LPKH, v_LPKH = jnp.asarray(rng.normal(size=size), jnp.float32)
        site = Site(KVPrefix(k_LPKH, v_LPKH))
        produced: Produced = Prefix.of({geometry.main_site: site}, text_position=P)
    else:
        produced = Embeds(jnp.asarray(rng.normal(size=(P, geometry.input_dim)), jnp.float32))
    card = artifact.make_card(
        produced,
        geometry,
        artifact.BackboneCard(
            source=str(FIXTURES / name),
            model_type=model.backbone.arch.model_type,
            fingerprint=model.fingerprint,
            dtype="float32",
        ),
        method={"name": method, "frozen": 2},
    )
    return Tuned(model, produced, card)


@functools.partial(jax.jit, static_argnums=0)
def outputs(model: Any, params: Any, produced: Produced | None, text: Any) -> jax.Array:
    """Logits, or hidden states of an encoder, for the text only: [2, T, …]."""
    prefix = model.lift(params, produced)
    tokens, ids, encoded = TokenLayout.plain(jnp.ones(text["ids"].shape, bool)), text["ids"], None
    if "decoder_ids" in text:
        encoded, ids = model.encode(params, ids, tokens, prefix), text["decoder_ids"]
    h_BTD, _ = model.hidden(params, ids, tokens, prefix, encoded=encoded)
    h_BTD = h_BTD[:, -ids.shape[1] :]
    return model.unembed(params, h_BTD) if model.arch.causal else h_BTD


def ours(tuned: Tuned, text: dict[str, np.ndarray]) -> np.ndarray:
    model = tuned.pretrained
    return np.asarray(outputs(model.backbone, model.stacked(), tuned.produced, text))


@pytest.mark.parametrize("method", ["prefix", "prompt"])
@pytest.mark.parametrize("name", MODELS)
def test_export_computes_the_same_in_peft(
    name: str, method: str, tmp_path: Path, difference: Any
) -> None:
    mine, text = tuned(name, method), given(name)
    mine.save(tmp_path / "ours", "peft")
    theirs = peft.PeftModel.from_pretrained(reference(name), tmp_path / "ours").eval()
    expected = MAKER.outputs(theirs, text)
    bare = MAKER.outputs(reference(name), text)
    assert np.max(np.abs(bare - expected)) > 1e-2, "the prefix should matter"
    difference(f"export, {method}: {_what(name)}", relative(ours(mine, text), expected), 1e-5, name)

    theirs.save_pretrained(tmp_path / "theirs")
    for file in FILES:
        assert (tmp_path / "theirs" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()


@pytest.mark.parametrize("method", ["cartridge", "ptuning"])
def test_export_keeps_its_type(method: str, tmp_path: Path, difference: Any) -> None:
    name = "backbones/llama_grouped"
    mine, text = tuned(name, method), given(name)
    mine.save(tmp_path / "ours", "peft")
    theirs = peft.PeftModel.from_pretrained(reference(name), tmp_path / "ours").eval()
    expected = "CARTRIDGE" if method == "cartridge" else "P_TUNING"
    assert theirs.peft_config["default"].peft_type == expected
    delta = relative(ours(mine, text), MAKER.outputs(theirs, text))
    difference(f"export, {method}: {_what(name)}", delta, 1e-5, name)
    theirs.save_pretrained(tmp_path / "theirs")
    for file in FILES:
        assert (tmp_path / "theirs" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()


@pytest.mark.parametrize("method", ["prefix", "prompt"])
@pytest.mark.parametrize("name", [CAUSAL[0], CAUSAL[1], SEQ2SEQ[0], SEQ2SEQ[3]])
def test_export_generates_the_same_in_peft(
    name: str, method: str, tmp_path: Path, difference: Any
) -> None:
    mine = tuned(name, method)
    mine.save(tmp_path / "ours", "peft")
    theirs = peft.PeftModel.from_pretrained(reference(name), tmp_path / "ours").eval()
    prompts = given(name)["ids"].tolist()
    end = theirs.config.eos_token_id if name in SEQ2SEQ else 0
    model = mine.pretrained
    generator = Generator(
        model.backbone, model.unstacked(), LETTERS.tokenizer(), mine.prefix, (end,)
    )
    for beams in (1, 5):
        decode = DecodeConfig(max_new_tokens=NEW, num_beams=beams)
        for prompt, generation in zip(prompts, generator.generate(prompts, decode), strict=True):
            ids, score = generated(theirs, prompt, beams, end, name in SEQ2SEQ)
            assert list(generation.samples[0].ids) == ids
            if beams > 1:
                quantity = f"export, {method}: scores of {beams} beams"
                difference(quantity, generation.samples[0].score - score, 1e-5, name)


def generated(
    model: Any, prompt: list[int], beams: int, end: int, seq2seq: bool
) -> tuple[list[int], float]:
    """The tokens that PEFT generates, and the score of its beam."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            num_beams=beams,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    ids = out.sequences[0, 1 if seq2seq else len(prompt) :].tolist()
    length = ids.index(end) + 1 if end in ids else len(ids)
    return ids[:length], out.sequences_scores[0].item() if beams > 1 else 0.0


HEADS = [
    (name, task, kind, method)
    for name in ("encoders/bert", "encoders/roberta", "encoders/electra", "encoders/distilbert")
    for task, kind in (("SEQ_CLS", "classify"), ("TOKEN_CLS", "tag"), ("QUESTION_ANS", "span"))
    for method in ("prefix", "prompt")
    # PEFT supports neither keys and values for DistilBERT nor soft tokens for ELECTRA's embeddings.
    if (name, method) not in {("encoders/distilbert", "prefix"), ("encoders/electra", "prompt")}
]
HEADS += [
    (f"backbones/{name}", "SEQ_CLS", "classify", method)
    for name in ("gpt2", "llama_grouped")
    for method in ("prefix", "prompt")
]
HEADS += [(f"backbones/{name}", "TOKEN_CLS", "tag", "prefix") for name in ("gpt2", "qwen3")]


@pytest.mark.parametrize(("name", "task", "kind", "method"), HEADS)
def test_head_survives_export_and_import(
    name: str, task: str, kind: str, method: str, tmp_path: Path, difference: Any
) -> None:
    mine, text = tuned(name, method), given(name)
    model, rng = mine.pretrained, np.random.default_rng(5)
    arch = model.backbone.arch
    soft = method == "prompt" and kind == "classify" and not arch.causal
    labels = ("a", "b", "c")
    task_of_kind = {
        "classify": Classify(labels=labels, dropout=0.0, reads_soft=soft),
        "tag": Tag(labels=labels, dropout=0.0),
        "span": ExtractSpan(),
    }[kind]
    head = task_of_kind.head(arch)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), jnp.float32),
        head.init(jax.random.key(0), arch.d_model),
    )
    card = dataclasses.replace(mine.card, task=to_card(task_of_kind), head=head)
    mine = dataclasses.replace(mine, card=card, head=params)
    mine.save(tmp_path / "ours", "peft")
    base = MAKER.reference(FIXTURES / name, task)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    expected = MAKER.outputs(theirs, text)

    delta = relative(
        answered(model, mine.produced, head, params, text, task == "SEQ_CLS"), expected
    )
    difference(f"export, {method} and head of {task}", delta, 1e-5, name)

    theirs.save_pretrained(tmp_path / "theirs")
    again = import_peft(tmp_path / "theirs", model)
    assert sorted(again.head) == sorted(params)
    assert again.card.head.soft == soft
    for part, x in params.items():
        np.testing.assert_array_equal(again.head[part], x)


def answered(
    model: Pretrained,
    produced: Produced,
    head: Head,
    params: Any,
    text: dict[str, np.ndarray],
    whole: bool,
) -> np.ndarray:
    """The output of a head for a text with a prefix: one for the whole text, or one per token."""
    backbone, ids = model.backbone, jnp.asarray(text["ids"])
    prefix = jax.jit(backbone.lift)(model.stacked(), produced)
    h_BTD, _ = backbone.hidden(
        model.params, ids, TokenLayout.plain(jnp.ones(ids.shape, bool)), prefix
    )
    if not head.soft:
        h_BTD = h_BTD[:, -ids.shape[1] :]
    if whole:
        h_BTD = h_BTD[:, -1 if backbone.arch.causal else 0]
    h_BTD = backbone.pool(model.params, h_BTD) if head.pooled else h_BTD
    return np.asarray(head(params, h_BTD))


CONFIGS = {
    "prefix": (peft.PrefixTuningConfig, {}),
    "projected prefix": (peft.PrefixTuningConfig, {"prefix_projection": True}),
    "cartridge": (peft.CartridgeConfig, {"num_frozen_tokens": 2}),
    "prompt": (peft.PromptTuningConfig, {}),
    "P-tuning": (peft.PromptEncoderConfig, {"encoder_hidden_size": 16}),
}


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", [CAUSAL[1], SEQ2SEQ[1], ENCODERS[0]])
def test_import_computes_the_same(name: str, method: str, tmp_path: Path, difference: Any) -> None:
    kind, options = CONFIGS[method]
    config = kind(task_type=task_of(name), num_virtual_tokens=P, **options)
    if name in SEQ2SEQ and kind in (peft.PrefixTuningConfig, peft.CartridgeConfig):
        shape = pretrained(name).backbone.geometry.main
        config.token_dim = shape.kv_heads * shape.head_dim
        config.num_attention_heads, config.num_layers = shape.kv_heads, shape.layers
    theirs, text = MAKER.random_adapter(reference(name), config, seed=1), given(name)
    theirs.save_pretrained(tmp_path)
    mine = import_peft(tmp_path, pretrained(name))
    delta = relative(ours(mine, text), MAKER.outputs(theirs, text))
    difference(f"import, {method}: {_what(name)}", delta, 1e-5, name)


IMPORTED_HEADS = [
    (name, task, method)
    for name, task in (
        ("encoders/bert", "SEQ_CLS"),
        ("encoders/roberta", "TOKEN_CLS"),
        ("encoders/bert", "QUESTION_ANS"),
        ("backbones/llama_grouped", "SEQ_CLS"),
    )
    for method in (*CONFIGS, "multitask")
    # PEFT's own forward pass does not accept task_ids there.
    if (task, method) != ("QUESTION_ANS", "multitask")
]


@pytest.mark.parametrize(("name", "task", "method"), IMPORTED_HEADS)
def test_imported_head_matches_peft(
    name: str, task: str, method: str, tmp_path: Path, difference: Any
) -> None:
    several = (peft.MultitaskPromptTuningConfig, {"num_tasks": 3, "num_ranks": 2})
    kind, options = several if method == "multitask" else CONFIGS[method]
    config = kind(task_type=task, num_virtual_tokens=P, **options)
    theirs = MAKER.random_adapter(MAKER.reference(FIXTURES / name, task), config, seed=1)
    theirs.save_pretrained(tmp_path)
    which = 1 if method == "multitask" else None
    mine = import_peft(tmp_path, pretrained(name), task=which)
    head = mine.card.head
    actual = answered(
        mine.pretrained, mine.produced, head, mine.head, given(name), task == "SEQ_CLS"
    )
    delta = relative(actual, MAKER.outputs(theirs, given(name), which))
    difference(f"import, {method} and head of {task}", delta, 1e-5, name)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
@pytest.mark.parametrize("name", [CAUSAL[0], CAUSAL[1], SEQ2SEQ[0], SEQ2SEQ[3], ENCODERS[0]])
def test_gradients_and_an_adamw_step_match_peft(
    name: str, method: str, tmp_path: Path, difference: Any
) -> None:
    mine, text = tuned(name, method), given(name)
    mine.save(tmp_path / "start", "peft")
    theirs = peft.PeftModel.from_pretrained(reference(name), tmp_path / "start").eval()
    weight = theirs.prompt_encoder["default"].embedding.weight.requires_grad_(True)
    model = mine.pretrained
    upstream = np.random.default_rng(4).normal(size=ours(mine, text).shape).astype(np.float32)

    called = {"input_ids": torch.from_numpy(text["ids"]).long()}
    called["attention_mask"] = torch.ones_like(called["input_ids"])
    if "decoder_ids" in text:
        called["decoder_input_ids"] = torch.from_numpy(text["decoder_ids"]).long()
    output = theirs(**called)
    states = output.logits if "logits" in output else output.last_hidden_state
    (states[:, -upstream.shape[1] :] * torch.from_numpy(upstream)).sum().backward()
    torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.1).step()

    def loss(produced: Produced) -> jax.Array:
        return jnp.sum(outputs(model.backbone, model.stacked(), produced, text) * upstream)

    grads = jax.grad(loss)(mine.produced)
    config = OptimConfig(weight_decay=0.1, schedule="constant", clip_norm=None)
    optimizer = make_optimizer(
        config, make_schedule(config, 10), jax.tree.map(lambda _: "train", mine.produced)
    )
    updates, _ = optimizer.update(grads, optimizer.init(mine.produced), mine.produced)
    stepped = jax.tree.map(jnp.add, mine.produced, updates)

    # PEFT's gradient and updated parameters, imported.
    for quantity, flat, actual in (
        ("gradient, relative", weight.grad, grads),
        ("AdamW step", weight, stepped),
    ):
        theirs.save_pretrained(tmp_path / quantity)
        _store(tmp_path / quantity, flat.detach().numpy())
        expected = import_peft(tmp_path / quantity, model).produced
        largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
        scale = max(1.0, largest) if "relative" in quantity else 1.0
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            difference(f"{method}: {quantity}", (a - b) / scale, 1e-5, name)


def _store(folder: Path, flat: np.ndarray) -> None:
    from safetensors.numpy import save_file

    save_file({"prompt_embeddings": flat.copy()}, folder / FILES[1])


def _what(name: str) -> str:
    return "states" if name in ENCODERS else "logits"


def relative(x: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The difference, relative to the largest value if that is above 1.

    Logits of these models are up to 10, and PyTorch's own float32 ones up to 1e-5 from its float64
    ones.
    """
    return (x - expected) / max(1.0, np.abs(expected).max())
