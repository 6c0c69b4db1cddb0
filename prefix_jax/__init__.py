r"""Prefix tuning of pretrained language models in JAX.

One idea holds the package together: a prefix is a KV cache that you can train.

    import prefix_jax as pj

    model = pj.load("HuggingFaceTB/SmolLM2-135M-Instruct")
    method = pj.PrefixTuning(length=16)
    tuned = pj.fit(model, method, "train.jsonl", input="{facts}\n", target="{text}", steps=200)
    print(tuned.generate({"facts": "name[Harrow Mill], platforms[5]"}))

Arrays carry their shape as a suffix of their name, and einsums use the same letters:

    B batch · T query tokens · S keys · P prefix length · L layers · N query heads
    K key/value heads · G query heads per key/value head, N/K · H head dim · D model dim
    F feed-forward dim · V vocabulary · M targets in a row
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefix_jax.api import Engine, Tuned, bake, bake_text, fit, import_peft, load_prefix
    from prefix_jax.backbones.loading.pretrained import Pretrained, load
    from prefix_jax.config import Config, DecodeConfig
    from prefix_jax.config import load as load_config
    from prefix_jax.methods import (
        Cartridge,
        HiddenPrefixTuning,
        LlamaAdapter,
        MultitaskPromptTuning,
        PrefixTuning,
        PrefixTuningPlus,
        PromptTuning,
        PTuning,
    )
    from prefix_jax.tasks import (
        ChatTask,
        Classify,
        ExtractSpan,
        MultipleChoice,
        Rank,
        Regress,
        Tag,
        TextTask,
    )

# transformers lends its tokenizers, which need no PyTorch; it warns of the lack all the same.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__all__ = [
    "Cartridge",
    "ChatTask",
    "Classify",
    "Config",
    "DecodeConfig",
    "Engine",
    "ExtractSpan",
    "HiddenPrefixTuning",
    "LlamaAdapter",
    "MultipleChoice",
    "MultitaskPromptTuning",
    "PTuning",
    "PrefixTuning",
    "PrefixTuningPlus",
    "Pretrained",
    "PromptTuning",
    "Rank",
    "Regress",
    "Tag",
    "TextTask",
    "Tuned",
    "bake",
    "bake_text",
    "fit",
    "import_peft",
    "load",
    "load_config",
    "load_prefix",
]

# Where each name lives. They are imported when they are asked for, so that `import prefix_jax` and
# the command line's help do not wait for JAX.
_HOMES = {
    **dict.fromkeys(
        ("Engine", "Tuned", "bake", "bake_text", "fit", "import_peft", "load_prefix"),
        "prefix_jax.api",
    ),
    **dict.fromkeys(("Pretrained", "load"), "prefix_jax.backbones.loading.pretrained"),
    **dict.fromkeys(("Config", "DecodeConfig"), "prefix_jax.config"),
    "load_config": "prefix_jax.config:load",
    **dict.fromkeys(
        (
            "Cartridge",
            "HiddenPrefixTuning",
            "LlamaAdapter",
            "MultitaskPromptTuning",
            "PTuning",
            "PrefixTuning",
            "PrefixTuningPlus",
            "PromptTuning",
        ),
        "prefix_jax.methods",
    ),
    **dict.fromkeys(
        (
            "ChatTask",
            "Classify",
            "ExtractSpan",
            "MultipleChoice",
            "Rank",
            "Regress",
            "Tag",
            "TextTask",
        ),
        "prefix_jax.tasks",
    ),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'prefix_jax' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute or name)


def __dir__() -> list[str]:
    return sorted(__all__)
