"""Methods: what trains, one file each. A new one is a file and a line in `METHODS`."""

from __future__ import annotations

from prefix_jax.methods.base import Method
from prefix_jax.methods.hidden import HiddenPrefixTuning
from prefix_jax.methods.prefix import PrefixTuning
from prefix_jax.methods.prompt import PromptTuning

# By the name that a config gives them. "full" is fine-tuning without a prefix: no method at all.
METHODS: dict[str, type[Method] | None] = {
    "prefix": PrefixTuning,
    "hidden": HiddenPrefixTuning,
    "prompt": PromptTuning,
    "full": None,
}
