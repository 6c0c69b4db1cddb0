"""Compares losses of encoder-decoders with transformers, and one training step of soft tokens
before the encoder with PEFT.

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
from prefix_jax.config import OptimConfig
from prefix_jax.data.batch import Batch, Example
from prefix_jax.data.pack import Packing, arrange, collate, measure
from prefix_jax.methods.prefix import PrefixTuning
from prefix_jax.methods.prompt import PromptTuning
from prefix_jax.model import PrefixModel
from prefix_jax.train.optimizer import make_optimizer, make_schedule
from prefix_jax.train.partition import labels, merge, split

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

FIXTURES = Path(__file__).parents[1] / "fixtures"


def _maker() -> ModuleType:
    script = FIXTURES / "make_encoder_decoders.py"
    spec = importlib.util.spec_from_file_location("make_encoder_decoders", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = _maker()


def _pairs() -> list[tuple[list[int], list[int]]]:
    """Sources and targets; some share a source."""
    rng = np.random.default_rng(0)
    sources = [rng.integers(3, 96, size).tolist() for size in (4, 11, 7)]
    return [(sources[i % 3], [*rng.integers(3, 96, size).tolist(), 1])
            for i, size in enumerate((3, 8, 5, 2, 6))]  # fmt: skip


def _batch(pairs: list[tuple[list[int], list[int]]], start_id: int, pack: bool) -> Batch:
    rows = []
    for source, target in pairs:
        ids = np.array([start_id, *target], np.int32)
        learnt = np.arange(len(ids)) > 0
        source_ids = np.array(source, np.int32)
        rows.append(Example.of_text(ids, learnt, "a pair", source_ids_S=source_ids))
    return collate(arrange(measure(rows), Packing(pack=pack)), rows)


def _summed_loss(model: Any, pairs: list[tuple[list[int], list[int]]]) -> Any:
    """transformers' loss of labels, summed over tokens."""
    return sum(
        len(target)
        * model(
            input_ids=torch.tensor([source]),
            attention_mask=torch.ones(1, len(source), dtype=torch.long),
            labels=torch.tensor([target]),
        ).loss
        for source, target in pairs
    )


def _load(reference: Any, directory: Path) -> Pretrained:
    reference.save_pretrained(directory)
    return load(directory, dtype="float32")


@pytest.mark.parametrize("name", MAKER.CONFIGS)
def test_packed_loss_matches_transformers(name: str, tmp_path: Path, difference: Any) -> None:
    reference = MAKER.random_model(MAKER.CONFIGS[name], seed=3)
    pretrained = _load(reference, tmp_path)
    backbone, pairs = pretrained.backbone, _pairs()
    batch = _batch(pairs, backbone.arch.start_id, pack=True)
    assert len(batch.ids_BT) < len(pairs)
    with torch.no_grad():
        bare = float(_summed_loss(reference, pairs))
        sites = MAKER.random_sites(reference, seed=3)
        with MAKER.prefixed(reference, sites):
            prefixed = float(_summed_loss(reference, pairs))

    model = PrefixModel(backbone, PrefixTuning(MAKER.P))
    trained = {
        site: {"k_LPKH": jnp.asarray(k), "v_LPKH": jnp.asarray(v)} for site, (k, v) in sites.items()
    }
    params = {"backbone": pretrained.params, "prefix": trained}
    ours = float(jax.jit(model.loss)(params, batch))
    score = float(jax.jit(model.score)(pretrained.params, None, batch).sum())
    difference("loss of labels, relative", score / bare - 1, limit=1e-5)
    difference("loss of labels with a prefix, relative", ours / prefixed - 1, limit=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_training_step_of_encoder_soft_tokens_matches_peft(
    name: str, tmp_path: Path, difference: Any
) -> None:
    P, pairs = 4, _pairs()
    reference = MAKER.random_model(MAKER.CONFIGS[name], seed=5)
    pretrained = _load(reference, tmp_path)
    backbone = pretrained.backbone
    x_PD = np.random.default_rng(1).normal(size=(P, backbone.arch.d_model)).astype(np.float32)

    config = peft.PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, num_transformer_submodules=1
    )
    theirs = peft.get_peft_model(reference, config).eval()
    weight = theirs.prompt_encoder["default"].embedding.weight
    weight.data = torch.from_numpy(x_PD.copy())
    adamw = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.01)
    count = sum(len(target) for _, target in pairs)
    loss = _summed_loss(theirs, pairs) / count
    loss.backward()
    gradient = weight.grad.numpy().copy()
    adamw.step()

    model = PrefixModel(backbone, PromptTuning(P))
    params = {"backbone": pretrained.params, "prefix": {"x_PD": jnp.asarray(x_PD)}}
    batch = _batch(pairs, backbone.arch.start_id, pack=model.packs)
    partition = labels(params)
    train, frozen = split(params, partition)
    ours, grads = jax.jit(
        jax.value_and_grad(lambda train: model.loss(merge(train, frozen), batch) / count)
    )(train)
    options = OptimConfig(learning_rate=0.1, weight_decay=0.01, clip_norm=None, schedule="constant")
    optimizer = make_optimizer(options, make_schedule(options, 10), partition)
    whole = merge(grads, jax.tree.map(jnp.zeros_like, frozen))
    updates, _ = optimizer.update(whole, optimizer.init(params), params)
    moved = x_PD + np.asarray(updates["prefix"]["x_PD"])

    difference("loss after soft tokens, relative", float(ours) / loss.item() - 1, limit=1e-5)
    g_PD = np.asarray(grads["prefix"]["x_PD"])
    difference("gradient of soft tokens", (g_PD - gradient) / abs(gradient).max(), limit=1e-5)
    difference("soft tokens after a step of AdamW", moved - weight.detach().numpy(), limit=1e-5)
