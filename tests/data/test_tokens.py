import copy

import numpy as np
import pytest

from prefix_jax.data.ends import end_tokens
from prefix_jax.data.source import Record
from prefix_jax.data.template import Template, render, render_chat
from prefix_jax.data.tokens import EncoderDecoder, group_references, tokenize
from prefix_jax.errors import ConfigError, DataError


def pairs(*texts):
    input, target = Template("{x}"), Template("{y}")
    return [
        one
        for n, (x, y) in enumerate(texts, 1)
        for one in render(Record({"x": x, "y": y}, f"a.jsonl:{n}"), input=input, target=target)
    ]


def chat(tokenizer, *turns):
    messages = [{"role": role, "content": content} for role, content in turns]
    return render_chat(Record({"messages": messages}, "a.jsonl:1"), "messages", tokenizer)


def test_input_tokens_do_not_depend_on_target(tokenizer):
    # Tokenised together, "the c" + "at" would merge into one token across the boundary.
    whole = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    one, two = tokenize(pairs(("the c", "at"), ("the c", "entre")), tokenizer)
    assert one.ids_T[:-1].tolist() != whole
    assert one.source_length == two.source_length
    assert (one.ids_T[: one.source_length] == two.ids_T[: two.source_length]).all()


def test_the_loss_is_on_the_target_and_its_end(tokenizer):
    (example,) = tokenize(pairs(("the cat", " sat")), tokenizer)
    assert tokenizer.decode(example.ids_T[~example.target_T]) == "the cat"
    assert tokenizer.decode(example.ids_T[example.target_T]) == " sat<|im_end|>"
    assert example.prompt == "the cat"
    assert example.source == "a.jsonl:1"
    assert example.ids_T.dtype == np.int32


def test_loss_may_cover_all_tokens_except_the_first(tokenizer):
    (example,) = tokenize(pairs(("the cat", " sat")), tokenizer, loss="all")
    assert example.target_T.tolist() == [False] + [True] * (len(example.ids_T) - 1)


def test_text_starts_with_special_tokens_of_tokenizer(bos_tokenizer):
    (example,) = tokenize(pairs(("the cat", " sat")), bos_tokenizer)
    prompt = bos_tokenizer("the cat")["input_ids"]
    assert example.ids_T[: example.source_length].tolist() == prompt
    (cut,) = tokenize(pairs(("the cat", " sat")), bos_tokenizer, max_length=len(example.ids_T) - 1)
    assert cut.ids_T[: cut.source_length].tolist() == [prompt[0], *prompt[2:]]


@pytest.mark.parametrize("written", ["<s> $A <|im_end|>", "$A <|im_end|>"])
def test_appended_end_token_is_not_put_before_the_target(make_tokenizer, written):
    """Llama's tokenizer does this with add_eos_token."""
    tokenizer = make_tokenizer(written)
    (example,) = tokenize(pairs(("the cat", " sat")), tokenizer)
    begin = written.removesuffix("$A <|im_end|>").strip()
    assert tokenizer.decode(example.ids_T) == f"{begin}the cat sat<|im_end|>"
    assert tokenizer.decode(example.prompt_ids) == f"{begin}the cat"


def test_special_token_is_not_duplicated(bos_tokenizer):
    inputs = pairs(("<s>the cat", " sat"), ("", "<s>the cat"), ("the cat", " sat"))
    examples = tokenize(inputs, bos_tokenizer)
    for example in examples:
        assert bos_tokenizer.decode(example.ids_T).count("<s>") == 1
    (cut,) = tokenize(inputs[:1], bos_tokenizer, max_length=len(examples[0].ids_T) - 1)
    assert cut.ids_T[0] == bos_tokenizer.bos_token_id


def test_first_token_without_input_is_not_a_target(tokenizer):
    (example,) = tokenize(pairs(("", "the cat")), tokenizer)
    assert not example.target_T[0]
    assert example.target_T[1:].all()
    assert example.source_length == 1


@pytest.mark.parametrize(("side", "kept"), [("left", "cdef"), ("right", "abcd")])
def test_long_input_is_cut_but_target_is_not(tokenizer, side, kept):
    examples = tokenize(pairs(("abcdef", "xy"), ("a", "b")), tokenizer, max_length=7, truncate=side)
    assert tokenizer.decode(examples[0].ids_T) == kept + "xy<|im_end|>"
    assert len(examples[0].ids_T) == 7
    assert examples.truncated == ("a.jsonl:1",)
    assert examples.dropped == ()


def test_long_target_error_names_lengths(tokenizer):
    with pytest.raises(DataError, match=r"a\.jsonl:1: 2 tokens of input and 4 .* max_length 4"):
        tokenize(pairs(("ab", "xyz")), tokenizer, max_length=4)
    (example,) = tokenize(pairs(("ab", "xyz")), tokenizer, max_length=5)
    assert example.source_length == 1
    (example,) = tokenize(pairs(("", "xyz")), tokenizer, max_length=4)
    assert len(example.ids_T) == 4


def test_dropped_examples_are_reported(tokenizer):
    rendered = pairs(("ab", "xyz"), ("a", "b"))
    examples = tokenize(rendered, tokenizer, max_length=4, on_overflow="drop")
    assert [example.source for example in examples] == ["a.jsonl:2"]
    assert examples.dropped == ("a.jsonl:1",)
    with pytest.raises(DataError, match="all 2 examples exceed max_length 2"):
        tokenize(rendered, tokenizer, max_length=2, on_overflow="drop")


def test_rejects_target_without_tokens(tokenizer, monkeypatch):
    from tokenizers import normalizers

    silent = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    silent.backend_tokenizer.normalizer = normalizers.Replace("#", "")
    with pytest.raises(DataError, match=r"a\.jsonl:1: the target '#' has no tokens"):
        tokenize(pairs(("a", "#")), silent)


def test_a_tokenizer_without_end_token_is_an_error(tokenizer):
    endless = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match="no end-of-sequence token"):
        tokenize(pairs(("a", "b")), endless)


def test_chat_targets_are_assistant_turns_with_end_tokens(tokenizer):
    turns = [("user", "1"), ("assistant", "one"), ("user", "2"), ("assistant", "two")]
    (example,) = tokenize([chat(tokenizer, *turns)], tokenizer)
    learnt = tokenizer.decode(example.ids_T[example.target_T])
    assert learnt == "one<|im_end|>two<|im_end|>"
    assert tokenizer.decode(example.ids_T).endswith("two<|im_end|>\n")
    prompt = tokenizer(example.prompt, add_special_tokens=False)["input_ids"]
    assert example.prompt.endswith("<|im_start|>assistant\n")
    assert example.ids_T[: len(prompt)].tolist() == prompt


def _speaking(tokenizer, ending, *added):
    """Gives the tokenizer a chat template whose turns end with this text."""
    changed = copy.deepcopy(tokenizer)
    changed.add_tokens(list(added))
    changed.chat_template = tokenizer.chat_template.replace("<|im_end|>\n", ending)
    return changed


TURNS = [("user", "1"), ("assistant", "one"), ("user", "2"), ("assistant", "two")]


def test_turn_targets_end_at_a_decoding_end_token(tokenizer):
    gemma = _speaking(tokenizer, "<end_of_turn>\n", "<end_of_turn>")
    (example,) = tokenize([chat(gemma, *TURNS)], gemma)
    learnt = gemma.decode(example.ids_T[example.target_T])
    assert learnt == "one<end_of_turn>two<end_of_turn>"
    assert example.ids_T[example.target_T][-1] in end_tokens(gemma, chat=True)


def test_turn_may_end_with_end_token_of_checkpoint(tokenizer):
    stated = _speaking(tokenizer, "{{ '#' if m.content == 'two' else '' }}\n")
    sharp = stated.convert_tokens_to_ids("#")
    (example,) = tokenize([chat(stated, *TURNS)], stated, end_ids=[sharp])
    assert stated.decode(example.ids_T[example.target_T]) == "one\ntwo#"


def test_chat_without_end_of_turn_token_ends_with_eos(tokenizer):
    plain = _speaking(tokenizer, "\n")
    (example,) = tokenize([chat(plain, *TURNS)], plain)
    assert plain.decode(example.ids_T[example.target_T]) == "one\ntwo\n<|im_end|>"
    assert plain.decode(example.ids_T).count("<|im_end|>") == 1
    endless = type(plain)(tokenizer_object=plain.backend_tokenizer)
    with pytest.raises(DataError, match="no end-of-sequence token"):
        tokenize([chat(plain, *TURNS)], endless)


def test_chat_has_only_special_tokens_of_its_template(bos_tokenizer):
    (example,) = tokenize([chat(bos_tokenizer, ("user", "1"), ("assistant", "x"))], bos_tokenizer)
    text = "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\nx<|im_end|>\n"
    assert bos_tokenizer.decode(example.ids_T) == text


def test_equal_prompts_become_one_example_with_all_references(tokenizer):
    examples = tokenize(
        pairs(("a", "one"), ("b", ["two", "three"]), ("a", "four"), ("a", "one")), tokenizer
    )
    grouped = group_references(examples)
    assert [(example.prompt, example.references) for example in grouped] == [
        ("a", ("one", "four")),
        ("b", ("two", "three")),
    ]
    assert grouped[0].source == "a.jsonl:1"


def test_unpaired_surrogate_error_names_the_record(tokenizer):
    with pytest.raises(DataError, match=r"a\.jsonl:2: not valid Unicode text"):
        tokenize(pairs(("ab", "x"), ("c\ud83d", "y")), tokenizer)


def seq2seq(**options):
    return EncoderDecoder(**{"start_id": 7, "max_target": 50} | options)


class TestEncoderDecoders:
    """Encoder input and decoder target both have the tokenizer's special tokens."""

    @pytest.mark.parametrize("written", ["$A <|im_end|>", "<s> $A <|im_end|>", "$A"])
    def test_source_and_target_match_the_tokenizer(self, make_tokenizer, written):
        tokenizer = make_tokenizer(written)
        (example,) = tokenize(pairs(("the cat", " sat")), tokenizer, encoder_decoder=seq2seq())
        target = tokenizer(" sat")["input_ids"]
        ends = [] if "im_end" in written else [tokenizer.eos_token_id]
        assert example.source_ids_S.tolist() == tokenizer("the cat")["input_ids"]
        assert example.ids_T.tolist() == [7, *target, *ends]
        assert example.target_T.tolist() == [False] + [True] * len([*target, *ends])
        assert example.prompt_ids == example.source_ids_S.tolist()
        assert example.prompt == "the cat"
        # The tokens before those of a label.
        assert example.ids_T[: example.prompt_length].tolist() == (
            [7, 0] if written.startswith("<s>") else [7]
        )

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_source_is_truncated_between_its_special_tokens(self, make_tokenizer, side):
        tokenizer = make_tokenizer("<s> $A <|im_end|>")
        how = {"truncate": side, "encoder_decoder": seq2seq()}
        (whole,) = tokenize(pairs(("the cat sat", "on")), tokenizer, **how)
        cut = tokenize(pairs(("the cat sat", "on")), tokenizer, max_length=4, **how)
        first, *text, last = whole.source_ids_S.tolist()
        kept = text[-2:] if side == "left" else text[:2]
        assert cut[0].source_ids_S.tolist() == [first, *kept, last]
        assert cut.truncated == ("a.jsonl:1",)
        assert cut[0].ids_T.tolist() == whole.ids_T.tolist()

    def test_target_too_long_for_decoder_is_an_error_or_dropped(self, tokenizer):
        texts = pairs(("the", "cat"), ("the", "none of these"))
        how = {"encoder_decoder": seq2seq(max_target=4)}
        with pytest.raises(DataError, match=r"a\.jsonl:2: \d+ tokens of target exceed the 4"):
            tokenize(texts, tokenizer, **how)
        kept = tokenize(texts, tokenizer, on_overflow="drop", **how)
        assert (len(kept), kept.dropped) == (1, ("a.jsonl:2",))

    def test_empty_input_needs_soft_tokens(self, tokenizer):
        texts = pairs(("", "cat"))
        with pytest.raises(DataError, match=r"a\.jsonl:1: the input is empty"):
            tokenize(texts, tokenizer, encoder_decoder=seq2seq())
        soft = seq2seq(source_needed=False)
        (example,) = tokenize(texts, tokenizer, encoder_decoder=soft)
        assert example.source_ids_S.tolist() == []

    def test_rejects_loss_on_encoder_input(self, tokenizer):
        with pytest.raises(ConfigError, match=r"use data\.loss: target"):
            tokenize(pairs(("a", "b")), tokenizer, loss="all", encoder_decoder=seq2seq())
