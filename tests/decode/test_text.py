"""Tests streaming of text pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from prefix_jax.config import DecodeConfig
from prefix_jax.decode import Generator
from prefix_jax.decode.text import TextStream


def pieces(
    tokenizer, text: str, stop=(), context: str = "before: "
) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer.backend_tokenizer, tokenizer(context)["input_ids"], stop)
    texts = []
    for token in tokenizer(text)["input_ids"]:
        texts.append(stream.push(token))
        if stream.stopped:
            break
    return [*texts, stream.finish()], stream


@given(text=st.text(), context=st.text(max_size=5))
def test_pieces_form_the_text_and_never_split_a_character(
    tokenizer: PreTrainedTokenizerFast, text: str, context: str
) -> None:
    texts, stream = pieces(tokenizer, text, context=context)
    assert "".join(texts) == stream.text == text
    assert "\ufffd" not in stream.text or "\ufffd" in text


@given(text=st.text("ab\n"), stop=st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=3))
def test_text_ends_before_the_first_stop_text(
    tokenizer: PreTrainedTokenizerFast, text: str, stop: list[str]
) -> None:
    texts, stream = pieces(tokenizer, text, stop)
    shown = "".join(texts)
    assert shown == stream.text
    ends = {len(text[: text.find(s) + len(s)]): text.find(s) for s in stop if s in text}
    assert stream.stopped == bool(ends)
    if not ends:
        assert shown == text
    else:
        first = min(ends)
        starts = [text.find(s) for s in stop if s in text and text.find(s) + len(s) == first]
        assert shown == text[: min(starts)]


def test_incomplete_character_at_the_end_is_dropped(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = TextStream(tokenizer.backend_tokenizer, [], ())
    for token in tokenizer("aé")["input_ids"][:-1]:
        stream.push(token)
    stream.finish()
    assert stream.text == "a"


class TestStreaming:
    PROMPTS = ("one", "another prompt", "x")

    def test_pieces_form_the_texts(self, generator: Generator) -> None:
        for config in (
            DecodeConfig(max_new_tokens=8),
            DecodeConfig(max_new_tokens=8, temperature=1.0, num_samples=2),
            DecodeConfig(max_new_tokens=8, num_beams=3, num_samples=2),
        ):
            heard: dict[tuple[int, int], str] = {}

            def hear(prompt: int, sample: int, piece: str, heard=heard) -> None:
                assert piece
                heard[prompt, sample] = heard.get((prompt, sample), "") + piece

            generations = generator.generate(self.PROMPTS, config, on_text=hear)
            assert heard == {
                (p, s): sample.text
                for p, generation in enumerate(generations)
                for s, sample in enumerate(generation.samples)
                if sample.text
            }
            silent = generator.generate(self.PROMPTS, config)
            assert [[s.ids for s in g.samples] for g in generations] == [
                [s.ids for s in g.samples] for g in silent
            ]

    def test_on_done_is_called_once_per_prompt(self, generator: Generator) -> None:
        heard = {}
        generations = generator.generate(
            self.PROMPTS, DecodeConfig(max_new_tokens=4), batch_size=1, on_done=heard.__setitem__
        )
        assert [heard[index] for index in range(3)] == generations

    def test_stop_text_ends_a_continuation_with_and_without_streaming(
        self, generator: Generator
    ) -> None:
        config = DecodeConfig(max_new_tokens=40)
        free = [generation.samples[0] for generation in generator.generate(self.PROMPTS, config)]
        stop = free[0].text[5:7]
        stopping = DecodeConfig(max_new_tokens=40, stop=(stop,))
        heard: list[str] = []
        generations = generator.generate(self.PROMPTS, stopping)
        assert generations == generator.generate(
            self.PROMPTS, stopping, on_text=lambda prompt, _, piece: heard.append(piece)
        )
        assert stop not in "".join(heard)
        for before, generation in zip(free, generations, strict=True):
            (sample,) = generation.samples
            assert sample.text == before.text.split(stop)[0]
            assert sample.ids == before.ids[: len(sample.ids)]
            assert sample.finish == ("stop" if stop in before.text else before.finish)
        assert generations[0].samples[0].finish == "stop"
        assert len(generations[0].samples[0].ids) < 40
