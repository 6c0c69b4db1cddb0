"""Compares outputs and gradients of methods with PEFT, from the same parameters.

Runs only under `make parity`, whose environment has torch, transformers and peft.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax.backbones.loading.pretrained import Pretrained, load
from prefix_jax.methods.adapter import LlamaAdapter
from prefix_jax.methods.base import Method
from prefix_jax.methods.cartridge import Cartridge
from prefix_jax.methods.multitask import MultitaskPromptTuning
from prefix_jax.methods.ptuning import PTuning
from prefix_jax.nn.attention.mask import TokenLayout
from prefix_jax.prefix import Adapter

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

FIXTURES = Path(__file__).parents[1] / "fixtures" / "backbones"
P = 5
IDS = np.random.default_rng(0).integers(0, 96, (2, 9), dtype=np.int32)
# A loss without symmetries that would make it flat.
WEIGHT = np.random.default_rng(1).normal(size=(2, 9, 96)).astype(np.float32)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def reference(variant: str | Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        FIXTURES / variant, dtype=torch.float32, attn_implementation="eager"
    )


def theirs(model: Any) -> np.ndarray:
    """PEFT's logits. Leaves the gradient of the loss in its parameters."""
    logits = model(torch.from_numpy(IDS).long()).logits
    (logits * torch.from_numpy(WEIGHT)).sum().backward()
    return logits.detach().numpy()


def ours(pretrained: Pretrained, method: Method, params: Any) -> tuple[np.ndarray, Any]:
    """Our logits, and the gradient of the loss."""
    tokens = TokenLayout.plain(jnp.ones(IDS.shape, bool))

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        backbone = pretrained.backbone
        prefix = backbone.lift(pretrained.params, method(params))
        h_BTD, _ = backbone.hidden(pretrained.params, jnp.asarray(IDS), tokens, prefix)
        logits_BTV = backbone.unembed(pretrained.params, h_BTD)
        return jnp.sum(logits_BTV * WEIGHT), logits_BTV

    grads, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    return np.asarray(logits), grads


Close = Callable[..., None]


@pytest.fixture
def close(difference: Callable[..., None]) -> Close:
    """Records a difference, relative to the largest value if that is above 1."""

    def close(quantity: str, a: Any, b: Any, limit: float = 1e-5) -> None:
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape
        difference(quantity, (a - b) / max(1, np.abs(b).max()), limit)

    return close


# LLaMA-Adapter.


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uses head dimension D / N, the only one that PEFT's adapter supports."""
    path = tmp_path_factory.mktemp("mistral")
    config = transformers.AutoConfig.from_pretrained(FIXTURES / "mistral", head_dim=8)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return path


@pytest.mark.parametrize("variant", ["llama", "llama_grouped", "mistral"])
@pytest.mark.parametrize("layers", [1, 2])
def test_adaption_prompts_match_peft(
    variant: str | Path, layers: int, mistral: Path, close: Close
) -> None:
    variant = mistral if variant == "mistral" else variant
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=P, adapter_layers=layers)
    model = peft.get_peft_model(reference(variant), config).eval()
    named = dict(model.named_parameters())
    prompts = [p for name, p in named.items() if name.endswith("adaption_prompt")]
    gates = [p for name, p in named.items() if name.endswith("adaption_gate")]
    assert len(prompts) == len(gates) == layers
    with torch.no_grad():
        for number, gate in enumerate(gates):
            gate.fill_(0.4 + number)

    pretrained = load(FIXTURES / variant, dtype="float32")
    method = LlamaAdapter(P, layers=layers, gate="plain")
    params = method.init(jax.random.key(0), pretrained.backbone.geometry, None)
    adapter = Adapter(
        jnp.stack([jnp.asarray(p.detach().numpy()[0]) for p in prompts]),
        jnp.stack([jnp.asarray(g.detach().numpy()) for g in gates]),
        params["adapter"].layers,
    )
    assert jax.tree.map(jnp.shape, {"adapter": adapter}) == jax.tree.map(jnp.shape, params)
    logits, grads = ours(pretrained, method, {"adapter": adapter})
    expected = theirs(model)
    close("adapter: logits", logits, expected)
    close(
        "adapter: gradient", grads["adapter"].h_LPD, np.stack([p.grad.numpy()[0] for p in prompts])
    )
    close("adapter: gradient", grads["adapter"].gate_LN, np.stack([g.grad.numpy() for g in gates]))


# Cartridge.


@pytest.mark.parametrize("variant", ["gpt2", "llama_grouped"])
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_cartridges_match_peft(variant: str, frozen: int, close: Close) -> None:
    config = peft.CartridgeConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, num_frozen_tokens=frozen
    )
    model = peft.get_peft_model(reference(variant), config).eval()
    encoder = model.prompt_encoder["default"]
    pretrained = load(FIXTURES / variant, dtype="float32")
    shape = pretrained.backbone.geometry.main

    def pair(flat: Any) -> dict[str, jax.Array]:
        size = (-1, shape.layers, 2, shape.kv_heads, shape.head_dim)
        k_LPKH, v_LPKH = flat.detach().numpy().reshape(size).transpose(2, 1, 0, 3, 4)
        return {"k_LPKH": jnp.asarray(k_LPKH), "v_LPKH": jnp.asarray(v_LPKH)}

    params = {"trained": pair(encoder.trainable_embedding)}
    if frozen:
        params["frozen"] = pair(encoder.frozen_embedding)
    logits, grads = ours(pretrained, Cartridge(P, frozen=frozen), {"decoder": params})
    close("cartridge: logits", logits, theirs(model))
    expected = pair(encoder.trainable_embedding.grad)
    jax.tree.map(partial(close, "cartridge: gradient"), grads["decoder"]["trained"], expected)
    trained = sum(leaf.size for leaf in jax.tree.leaves(params["trained"]))
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


# P-tuning.


def from_torch(state: Mapping[str, Any], encoder: str, layers: int) -> dict[str, Any]:
    """The parameters of PEFT's prompt encoder in our layout."""
    arrays = {name: x.numpy() for name, x in state.items()}
    linear = {
        str(number): {
            "weight_XY": arrays[f"mlp_head.{2 * number}.weight"].T,
            "bias_Y": arrays[f"mlp_head.{2 * number}.bias"],
        }
        for number in range(3 if encoder == "mlp" else 2)
    }
    params: dict[str, Any] = {"embedding_PD": arrays["embedding.weight"], "linear": linear}
    if encoder == "lstm":
        params["lstm"] = {
            str(number): {
                direction: {
                    "input_Y4X": arrays[f"lstm_head.weight_ih_l{number}{suffix}"].T,
                    "state_X4X": arrays[f"lstm_head.weight_hh_l{number}{suffix}"].T,
                    "input_bias_4X": arrays[f"lstm_head.bias_ih_l{number}{suffix}"],
                    "state_bias_4X": arrays[f"lstm_head.bias_hh_l{number}{suffix}"],
                }
                for direction, suffix in (("forward", ""), ("backward", "_reverse"))
            }
            for number in range(layers)
        }
    return jax.tree.map(jnp.asarray, params)


@pytest.mark.parametrize(
    ("encoder", "hidden", "layers"), [("mlp", 24, 2), ("lstm", 12, 2), ("lstm", 7, 3)]
)
def test_prompt_encoders_match_peft(encoder: str, hidden: int, layers: int, close: Close) -> None:
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=P,
        encoder_reparameterization_type=encoder.upper(),
        encoder_hidden_size=hidden,
        encoder_num_layers=layers,
    )
    model = peft.get_peft_model(reference("llama_grouped"), config).eval()
    torch_encoder = model.prompt_encoder["default"]
    pretrained = load(FIXTURES / "llama_grouped", dtype="float32")
    method = PTuning(P, encoder=encoder, hidden=hidden, lstm_layers=layers)
    params = from_torch(torch_encoder.state_dict(), encoder, layers)
    initial = method.init(jax.random.key(0), pretrained.backbone.geometry, None)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, initial)
    close(
        "P-tuning: soft tokens",
        method(params).x_PD,
        torch_encoder(torch.arange(P)).detach().numpy(),
    )

    logits, grads = ours(pretrained, method, params)
    full = model(torch.from_numpy(IDS).long()).logits[:, P:]
    close("P-tuning: logits", logits, full.detach().numpy())
    (full * torch.from_numpy(WEIGHT)).sum().backward()
    expected = from_torch(
        {name: p.grad for name, p in torch_encoder.named_parameters()}, encoder, layers
    )
    jax.tree.map(partial(close, "P-tuning: gradient"), grads, expected)


# Multitask prompts.


@pytest.mark.parametrize("init", ["average", "exact", "shared"])
def test_multitask_prompts_from_a_source_match_peft(
    init: str, tmp_path: Path, close: Close
) -> None:
    config = peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, num_tasks=3, num_ranks=2
    )
    peft.get_peft_model(reference("gpt2"), config).save_pretrained(tmp_path)
    names = {
        "average": "AVERAGE_SOURCE_TASKS",
        "exact": "EXACT_SOURCE_TASK",
        "shared": "ONLY_SOURCE_SHARED",
    }
    target = dataclasses.replace(
        config,
        num_tasks=1,
        prompt_tuning_init=names[init],
        prompt_tuning_init_task=2,
        prompt_tuning_init_state_dict_path=str(tmp_path / "adapter_model.safetensors"),
    )
    encoder = peft.get_peft_model(reference("gpt2"), target).prompt_encoder["default"]
    pretrained = load(FIXTURES / "gpt2", dtype="float32")
    method = MultitaskPromptTuning(
        P, ranks=2, source=str(tmp_path), source_init=init, source_task=2
    )
    params = dict(method.init(jax.random.key(0), pretrained.backbone.geometry, None))
    if init == "shared":
        # Both sides draw the task's part with their own generators.
        params["cols_PR"] = jnp.asarray(encoder.prefix_task_cols.detach().numpy()[0])
        params["rows_RD"] = jnp.asarray(encoder.prefix_task_rows.detach().numpy()[0])
    task = torch.zeros(1, dtype=torch.long)
    prompt = encoder(torch.arange(P)[None], task).detach().numpy()[0]
    close("multitask: soft tokens", method(params).x_PD, prompt, 1e-6)
