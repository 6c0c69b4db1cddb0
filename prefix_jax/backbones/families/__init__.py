"""Model families, one module each.

A module describes its family by three names:

    DEFAULTS               for every `model_type` that it covers, values of keys that a
                           `config.json` may omit
    architecture(config)   reads a `config.json` into an `Architecture`
    hf_names(arch)         the tensor names of a checkpoint in Hugging Face layout

An optional `as_stored(arch, names)` adds features that only the checkpoint shows.
"""

from __future__ import annotations

from types import ModuleType

from prefix_jax.backbones.families import bart, bert, gemma, gpt2, llama, neox, opt, t5

FAMILIES: dict[str, ModuleType] = {
    model_type: family
    for family in (gpt2, llama, gemma, opt, neox, bert, t5, bart)
    for model_type in family.DEFAULTS
}
