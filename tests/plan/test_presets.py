"""Presets have the same number of parameters as the published checkpoints."""

import jax
import pytest

from prefix_jax.backbones.backbone import Backbone
from prefix_jax.backbones.loading.config import architecture
from prefix_jax.errors import BackboneError
from prefix_jax.plan.presets import PRESETS, preset

# Parameter counts on the Hugging Face hub; for Gemma 3, without the vision encoder.
PUBLISHED = {
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "gemma-3-4b": 3_880_263_168,
    "gemma-3-12b": 11_766_034_176,
    "gemma-3-27b": 27_009_346_304,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "mistral-7b": 7_248_023_552,
    "mistral-7b-v0.1": 7_241_732_096,
    "t5-large": 783_150_080,
    "t5-xl": 2_849_757_184,
    "t5-xxl": 11_135_332_352,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count_matches_the_checkpoint(name: str) -> None:
    backbone = Backbone(architecture(preset(name), name))
    shapes = jax.eval_shape(lambda: backbone.init(jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == PUBLISHED[name]


def test_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(
        BackboneError, match=r"unknown preset 'llama-9'; did you .* use one of llama-3-8b, "
    ):
        preset("llama-9")
