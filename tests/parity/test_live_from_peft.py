"""The blocks of `docs/from_peft.md` that move weights give one model's logits on both sides.

Collected by `make parity` alone, whose environment has torch, transformers and peft.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prefix_jax.backbones.load import load
from prefix_jax.nn.mask import Tokens

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "backbones"


def _moves() -> dict[str, Any]:
    page = (ROOT / "docs" / "from_peft.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(import numpy.*?def to_peft.*?)```", page, re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    return namespace


@pytest.mark.parametrize(
    "variant", ["gpt2", "llama_grouped", "qwen3", "gemma", "gemma2", "gemma3_text", "opt", "neox"]
)
def test_weights_that_were_moved_give_the_same_logits(variant: str, tmp_path: Path) -> None:
    moves, ids = _moves(), np.random.default_rng(0).integers(0, 96, (2, 9), dtype=np.int32)
    ours = load(FIXTURES / variant, dtype="float32")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    theirs = peft.get_peft_model(_reference(variant), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    flat = load_file(tmp_path / "theirs" / "adapter_model.safetensors")["prompt_embeddings"]
    prefix = moves["from_peft"](flat, ours.backbone.geometry.main)

    tokens = Tokens.plain(jnp.ones(ids.shape, bool))
    h_BTD, _ = ours.backbone.hidden(ours.params, jnp.asarray(ids), tokens, prefix)
    logits_BTV = np.asarray(ours.backbone.unembed(ours.params, h_BTD))
    np.testing.assert_allclose(logits_BTV, _logits(theirs, ids), rtol=0, atol=1e-4)

    back = tmp_path / "back"
    back.mkdir()
    save_file({"prompt_embeddings": moves["to_peft"](prefix)}, back / "adapter_model.safetensors")
    (back / "adapter_config.json").write_text(
        json.dumps(
            {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
        )
    )
    again = peft.PeftModel.from_pretrained(_reference(variant), str(back)).eval()
    np.testing.assert_array_equal(_logits(again, ids), _logits(theirs, ids))


def _reference(variant: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        FIXTURES / variant, dtype=torch.float32, attn_implementation="eager"
    )


def _logits(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids).long()).logits.numpy()
