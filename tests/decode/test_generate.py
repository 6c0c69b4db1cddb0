"""Tests generation with a small random model and a random prefix."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from prefix_jax.backbones.backbone import Backbone
from prefix_jax.backbones.loading.pretrained import load
from prefix_jax.config import DecodeConfig
from prefix_jax.data.source import read_records
from prefix_jax.decode import Generator
from prefix_jax.decode.loop import advance, prefill
from prefix_jax.decode.options import make_search
from prefix_jax.errors import (
    BackboneError,
    ConfigError,
    ContextError,
    DataError,
    NonFiniteError,
)
from prefix_jax.mesh import make_mesh, weight_shardings
from prefix_jax.nn.attention.mask import TokenLayout
from prefix_jax.tasks import Reader, TextTask

NEW = 8
# Three or four prompts, which share the programs for four rows.
PROMPTS = st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=14), min_size=3, max_size=4)
few = settings(max_examples=15)


FORWARD = jax.jit(Backbone.hidden, static_argnums=0)


def untied(generator: Generator):
    """An untied output head with the weights of the embedding."""
    return {"unembed_DV": generator.params["embed"]["tokens_VD"].T}


def ids_of(generations):
    return [[sample.ids for sample in generation.samples] for generation in generations]


@pytest.mark.parametrize(
    "config",
    [
        DecodeConfig(max_new_tokens=NEW),
        DecodeConfig(max_new_tokens=NEW, num_beams=3, num_samples=2),
        DecodeConfig(max_new_tokens=NEW, temperature=1.0, num_samples=2, seed=5),
    ],
    ids=["greedy", "beams", "sampled"],
)
class TestBatches:
    @few
    @given(prompts=PROMPTS)
    def test_ragged_batches_do_not_change_results(
        self, generator: Generator, config: DecodeConfig, prompts
    ) -> None:
        together = generator.generate(prompts, config)
        apart = generator.generate(prompts, config, batch_size=1)
        assert ids_of(together) == ids_of(apart)
        for batched, other in zip(together, apart, strict=True):
            for sample, same in zip(batched.samples, other.samples, strict=True):
                np.testing.assert_allclose(sample.logprobs, same.logprobs, atol=1e-4)
                assert sample.score == pytest.approx(same.score, abs=1e-4)

    def test_stacked_and_unstacked_weights_give_equal_results(
        self, generator: Generator, params, config: DecodeConfig
    ) -> None:
        stacked = dataclasses.replace(generator, params=params)
        prompts = [[1, 2, 3], [4], [5, 6]]
        assert ids_of(stacked.generate(prompts, config)) == ids_of(
            generator.generate(prompts, config)
        )

    def test_sharded_columns_give_equal_results(
        self, generator: Generator, config: DecodeConfig
    ) -> None:
        """Only prompts are split over devices; a new token is a single column."""
        mesh = make_mesh(1, 2, sequence=4)
        params = jax.device_put(generator.params, weight_shardings(generator.params, mesh))
        shared = dataclasses.replace(generator, params=params)
        prompts = [[1, 2, 3], [4], [*range(5, 18)]]
        assert ids_of(shared.generate(prompts, config)) == ids_of(
            generator.generate(prompts, config)
        )


@few
@given(prompts=PROMPTS)
def test_greedy_tokens_match_a_forward_pass_over_the_whole_text(
    generator: Generator, prompts
) -> None:
    backbone, params, prefix = generator.backbone, generator.params, generator.prefix
    for prompt, generation in zip(
        prompts, generator.generate(prompts, DecodeConfig(max_new_tokens=NEW)), strict=True
    ):
        (sample,) = generation.samples
        whole = np.zeros((1, 24), np.int32)
        whole[0, : len(prompt) + len(sample.ids)] = [*prompt, *sample.ids]
        tokens = TokenLayout.plain(jnp.arange(24)[None] < len(prompt) + len(sample.ids))
        h_BTD, _ = FORWARD(backbone, params, whole, tokens, prefix)
        logprobs_TV = jax.nn.log_softmax(backbone.unembed(params, h_BTD))[0, len(prompt) - 1 :]
        for token, logprob, logprobs_V in zip(
            sample.ids, sample.logprobs, np.asarray(logprobs_TV), strict=False
        ):
            assert token == logprobs_V.argmax()
            assert logprob == pytest.approx(logprobs_V.max(), abs=1e-4)


def test_prefix_changes_generated_text(generator: Generator) -> None:
    bare = dataclasses.replace(generator, prefix=None)
    prompts = [[i] for i in range(4)]
    config = DecodeConfig(max_new_tokens=NEW)
    assert ids_of(bare.generate(prompts, config)) != ids_of(generator.generate(prompts, config))


def test_score_is_the_sum_of_logprobs(generator: Generator) -> None:
    (generation,) = generator.generate([[1, 2]], DecodeConfig(max_new_tokens=NEW))
    assert generation.samples[0].score == pytest.approx(sum(generation.samples[0].logprobs))


@few
@given(prompts=PROMPTS)
def test_beam_score_is_logprob_divided_by_length(generator: Generator, prompts) -> None:
    config = DecodeConfig(max_new_tokens=NEW, num_beams=3, num_samples=3)
    for generation in generator.generate(prompts, config):
        scores = [sample.score for sample in generation.samples]
        assert scores == sorted(scores, reverse=True)
        for sample in generation.samples:
            assert sample.score == pytest.approx(sum(sample.logprobs) / len(sample.ids), abs=1e-4)


class TestConstraints:
    @few
    @given(prompts=PROMPTS, beams=st.sampled_from([1, 3]))
    def test_no_ngram_occurs_twice(self, generator: Generator, prompts, beams: int) -> None:
        config = DecodeConfig(max_new_tokens=NEW, num_beams=beams, no_repeat_ngram_size=2)
        for prompt, generation in zip(prompts, generator.generate(prompts, config), strict=True):
            whole = [*prompt, *generation.samples[0].ids]
            grams = list(itertools.pairwise(whole))
            generated = grams[max(0, len(prompt) - 1) :]
            before = grams[: max(0, len(prompt) - 1)]
            assert len(set(generated)) == len(generated)
            assert not set(generated) & set(before)

    @few
    @given(prompts=PROMPTS, beams=st.sampled_from([1, 3]))
    def test_banned_words_are_never_generated(
        self, generator: Generator, prompts, beams: int
    ) -> None:
        config = DecodeConfig(max_new_tokens=NEW, num_beams=beams)
        free = "".join(g.text for g in generator.generate([*prompts, "a", "b"], config))
        words = re.findall("[!-~]", free)[:1] + re.findall("[!-~]{2}", free)[-1:]
        banned = dataclasses.replace(config, banned_words=tuple(words))
        for prompt, generation in zip(prompts, generator.generate(prompts, banned), strict=True):
            whole = [*prompt, *generation.samples[0].ids]
            for word in words:
                ids = generator.tokenizer(word)["input_ids"]
                for start in range(max(0, len(prompt) - len(ids) + 1), len(whole)):
                    assert whole[start : start + len(ids)] != ids

    @few
    @given(prompts=PROMPTS, beams=st.sampled_from([1, 3]), least=st.integers(1, NEW))
    def test_texts_have_their_minimum_length(
        self, generator: Generator, prompts, beams: int, least: int
    ) -> None:
        (free,) = generator.generate([prompts[0]], DecodeConfig(max_new_tokens=NEW))
        ending = dataclasses.replace(generator, eos=(free.samples[0].ids[0],))
        config = DecodeConfig(max_new_tokens=NEW, num_beams=beams, min_new_tokens=least)
        for generation in ending.generate(prompts, config):
            (sample,) = generation.samples
            assert len(sample.ids) >= least + (sample.finish == "eos")


class TestEnds:
    def test_end_token_ends_a_text_and_is_its_last_token(self, generator: Generator) -> None:
        prompts = [[i] for i in range(4)]
        config = DecodeConfig(max_new_tokens=NEW)
        free = ids_of(generator.generate(prompts, config))
        eos = free[0][0][3]
        for (ids,), generation in zip(
            free, dataclasses.replace(generator, eos=(eos,)).generate(prompts, config), strict=True
        ):
            (sample,) = generation.samples
            ends = ids.index(eos) + 1 if eos in ids else NEW
            assert sample.ids == ids[:ends]
            assert sample.finish == ("eos" if eos in ids else "length")
            assert len(sample.logprobs) == len(sample.ids)

    @pytest.mark.parametrize(
        "config",
        [
            DecodeConfig(max_new_tokens=NEW),
            DecodeConfig(max_new_tokens=NEW, temperature=1.5, num_samples=4, seed=3),
            DecodeConfig(max_new_tokens=NEW, num_beams=3, num_samples=3, min_new_tokens=2),
        ],
        ids=["greedy", "sampled", "beams"],
    )
    def test_any_of_several_end_tokens_ends_a_text(
        self, generator: Generator, config: DecodeConfig
    ) -> None:
        """Without other end tokens, the generator uses those of the checkpoint."""
        prompts = [[i] for i in range(4)]
        free = generator.generate(prompts, config)
        ends = tuple(sorted({generation.samples[-1].ids[3] for generation in free}))
        assert len(ends) > 1
        arch = dataclasses.replace(generator.backbone.arch, end_ids=ends)
        ending = dataclasses.replace(generator, backbone=Backbone(arch))
        ended = set()
        for generation in ending.generate(prompts, config):
            for sample in generation.samples:
                assert not {*ends} & {*sample.ids[:-1]}
                assert (sample.finish == "eos") == (sample.ids[-1] in (*ends, 256))
                ended |= {*sample.ids[-1:]} & {*ends}
        assert len(ended) > 1

    def test_no_end_token_comes_before_the_minimum_length(self, generator: Generator) -> None:
        (free,) = generator.generate([[1]], DecodeConfig(max_new_tokens=NEW))
        ending = dataclasses.replace(generator, eos=free.samples[0].ids[:2])
        (late,) = ending.generate([[1]], DecodeConfig(max_new_tokens=NEW, min_new_tokens=NEW))
        assert len(late.samples[0].ids) == NEW

    def test_length_ends_a_text(self, generator: Generator) -> None:
        (generation,) = generator.generate([[1]], DecodeConfig(max_new_tokens=5))
        assert len(generation.samples[0].ids) == 5
        assert generation.samples[0].finish == "length"


class TestSampling:
    def test_seed_determines_samples(self, generator: Generator) -> None:
        def draw(seed: int):
            config = DecodeConfig(max_new_tokens=NEW, temperature=1.5, num_samples=3, seed=seed)
            return ids_of(generator.generate([[1, 2]] * 2, config))

        assert draw(0) == draw(0) != draw(1)
        every = [ids for prompt in draw(0) for ids in prompt]
        assert len(set(every)) == len(every), "every sample and prompt has its own key"

    def test_top_k_1_is_greedy(self, generator: Generator) -> None:
        greedy = generator.generate([[1, 2]], DecodeConfig(max_new_tokens=NEW))
        config = DecodeConfig(max_new_tokens=NEW, temperature=2.0, top_k=1, num_samples=2)
        (sampled,) = ids_of(generator.generate([[1, 2]], config))
        assert sampled == [greedy[0].samples[0].ids] * 2

    def test_sample_frequencies_match_probabilities(self, generator: Generator) -> None:
        config = DecodeConfig(max_new_tokens=1, temperature=1.0, num_samples=4000)
        (generation,) = generator.generate([[7, 8, 9]], config)
        drawn = np.array([sample.ids[0] for sample in generation.samples])
        probability = {s.ids[0]: np.exp(s.logprobs[0]) for s in generation.samples}
        for token, p in probability.items():
            deviation = np.sqrt(p * (1 - p) / len(drawn))
            assert abs((drawn == token).mean() - p) < 5 * deviation + 1 / len(drawn)


class TestPrompts:
    @pytest.mark.parametrize("written", ["$A", "! $A", "$A </s>", "! $A </s>"])
    @pytest.mark.parametrize("prompt", ["ab", "!ab"])
    def test_prompt_has_the_same_tokens_as_in_training(
        self, generator: Generator, written: str, prompt: str
    ) -> None:
        """This holds for any special tokens around a text, including an end of text."""
        tokenizer = copy.deepcopy(generator.tokenizer)
        tokenizer.add_special_tokens({"bos_token": "!"})
        special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("!", "</s>")]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=written, special_tokens=special
        )
        assert ("</s>" in written) == (tokenizer("ab")["input_ids"][-1] == 256)
        records = [{"x": prompt, "y": "c"}]
        task = TextTask("{x}", "{y}")
        (example,) = task.examples(read_records(records), Reader(tokenizer))
        config = DecodeConfig(max_new_tokens=NEW)
        generator = dataclasses.replace(generator, tokenizer=tokenizer)
        of_text, of_ids = generator.generate([prompt, example.prompt_ids], config)
        assert of_text.samples[0].ids == of_ids.samples[0].ids
        np.testing.assert_allclose(
            of_text.samples[0].logprobs, of_ids.samples[0].logprobs, atol=1e-4
        )


class TestNonFiniteLogits:
    @pytest.mark.parametrize(
        "config",
        [
            DecodeConfig(max_new_tokens=NEW),
            DecodeConfig(max_new_tokens=NEW, stop=("zzz",)),
            DecodeConfig(max_new_tokens=NEW, temperature=1.0, num_samples=2),
            DecodeConfig(max_new_tokens=NEW, num_beams=3),
        ],
        ids=["greedy", "stop", "sampled", "beams"],
    )
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_error_names_the_prompt(
        self, generator: Generator, config: DecodeConfig, value: float
    ) -> None:
        """Only the second prompt contains the broken token."""
        table_VD = generator.params["embed"]["tokens_VD"].at[7].set(value)
        broken = {**generator.params, "embed": {"tokens_VD": table_VD}, "head": untied(generator)}
        arch = dataclasses.replace(generator.backbone.arch, tied=False)
        generator = dataclasses.replace(generator, backbone=Backbone(arch), params=broken)
        generator.generate([[1]], config)
        with pytest.raises(
            NonFiniteError, match=r"^second: the model's logits are NaN or infinite"
        ):
            generator.generate([[1], [1, 7]], config, names=["first", "second"])

    def test_no_text_is_emitted(self, generator: Generator) -> None:
        nowhere = jax.tree.map(lambda leaf: leaf * jnp.nan, generator.params)
        pieces = []
        with pytest.raises(NonFiniteError, match="prompt 0"):
            dataclasses.replace(generator, params=nowhere).generate(
                ["a"], DecodeConfig(max_new_tokens=NEW), on_text=lambda *piece: pieces.append(piece)
            )
        assert pieces == []

    def test_ignored_after_the_end_of_a_text(self, generator: Generator) -> None:
        """A batch continues until its last text has ended."""
        prompts = [[1], [2]]
        free = generator.generate(prompts, DecodeConfig(max_new_tokens=NEW))
        end = free[0].samples[0].ids[0]
        assert end not in free[1].samples[0].ids
        table_VD = generator.params["embed"]["tokens_VD"]
        params = {
            **generator.params,
            "embed": {"tokens_VD": table_VD.at[end].set(jnp.nan)},
            "head": untied(generator),
        }
        arch = dataclasses.replace(generator.backbone.arch, tied=False)
        ending = dataclasses.replace(generator, backbone=Backbone(arch), params=params, eos=(end,))
        generations = ending.generate(prompts, DecodeConfig(max_new_tokens=NEW))
        assert generations[0].samples[0].ids == (end,)
        assert generations[1].samples[0].ids == free[1].samples[0].ids


class TestContext:
    def test_prefix_prompt_and_new_tokens_must_fit_the_positions(
        self, generator: Generator
    ) -> None:
        room = generator.backbone.arch.max_positions - generator.prefix.text_position
        config = DecodeConfig(max_new_tokens=NEW)
        generator.generate([[1] * (room - NEW)], config)
        with pytest.raises(ContextError, match=r"prompt 1: 246 tokens after a prefix of 3"):
            generator.generate([[1], [1] * (room - NEW + 1)], config)

    def test_rejects_empty_prompt(self, generator: Generator) -> None:
        with pytest.raises(DataError, match="prompt 1 is empty"):
            generator.generate(["a", ""], DecodeConfig())

    @pytest.mark.parametrize("ids", [[1, -1], [1, 10**6]])
    def test_rejects_token_outside_the_vocabulary(
        self, generator: Generator, ids: list[int]
    ) -> None:
        with pytest.raises(DataError, match="prompt 0 contains token id"):
            generator.generate([ids], DecodeConfig())

    @pytest.mark.parametrize("size", [0, -1])
    def test_rejects_batch_size_below_one(self, generator: Generator, size: int) -> None:
        with pytest.raises(ConfigError, match=f"batch_size must be at least 1, got {size}"):
            generator.generate(["a"], DecodeConfig(), batch_size=size)


class TestPrograms:
    def test_batches_of_similar_size_share_two_programs(self, generator: Generator) -> None:
        config = DecodeConfig(max_new_tokens=20, repetition_penalty=1.1)
        generator.generate([[1, 2, 3]] * 3, config)
        compiled = prefill._cache_size(), advance._cache_size()
        other = dataclasses.replace(config, max_new_tokens=30, repetition_penalty=1.5)
        generator.generate([[5] * 14, [6], [7], [8]], other)
        assert (prefill._cache_size(), advance._cache_size()) == compiled

    def test_cache_is_written_in_place(self, generator: Generator) -> None:
        ones = np.ones(1, np.int32)
        search = make_search(DecodeConfig(num_beams=3), generator.tokenizer, (256,), [0])
        args = generator.backbone, generator.params, generator.prefix, search
        prompt = np.ones((1, 16), np.int32)
        state = prefill(*args, prompt, ones, ones > 0, ones[0], capacity=1024)
        cache = sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache.layers))
        memory = advance.lower(*args, state, ones[0], ones[0]).compile().memory_analysis()
        assert memory.alias_size_in_bytes >= cache
        assert memory.temp_size_in_bytes < cache


def test_encoder_rejects_generation(tmp_path: Path) -> None:
    model = load(tiny.write_encoder(tmp_path / "bert"))
    generator = Generator(model.backbone, model.params, model.tokenizer)
    with pytest.raises(BackboneError, match=r"bert is an encoder.*task\.name: classify"):
        generator.generate(["a film"], DecodeConfig(max_new_tokens=2))
