"""Tests that records become text examples."""

import json

import numpy as np
import pytest

from prefix_jax.data.pipeline import Pipeline
from prefix_jax.data.source import Record, read_records
from prefix_jax.errors import ConfigError, DataError
from prefix_jax.tasks import EncoderDecoder, Reader, TextTask
from prefix_jax.tasks.text import Span


def pairs(*texts):
    return [Record({"x": x, "y": y}, f"a.jsonl:{n}") for n, (x, y) in enumerate(texts, 1)]


def tokenize(records, tokenizer, *, encoder_decoder=None, **options):
    reader = Reader(tokenizer, encoder_decoder=encoder_decoder)
    return TextTask("{x}", "{y}", **options).examples(records, reader)


def record(**fields):
    return Record(fields, "a.jsonl:3")


def render(record, **fields):
    return TextTask(**fields).render(record, Reader(None))


def test_missing_field_error_names_the_record():
    with pytest.raises(DataError, match=r"a\.jsonl:3: no field 'mr'"):
        render(record(rm="x", ref="y"), input="{mr}", target="{ref}")


def test_target_list_gives_one_example_per_item():
    rendered = render(record(mr="m", refs=["a", "b"]), input="{mr}: ", target="{refs}.")
    assert [example.spans for example in rendered] == [
        (Span("m: ", False), Span("a.", True)),
        (Span("m: ", False), Span("b.", True)),
    ]
    assert all(
        example.references == ("a.", "b.") and example.prompt == "m: " for example in rendered
    )


def test_references_come_from_the_named_field():
    (example,) = render(record(y="a", all=["a", "b"]), target="{y}", references="all")
    assert example.references == ("a", "b")
    assert example.prompt == ""


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"x": ["a", "b"], "y": "c"}, "an input must have exactly one text"),
        ({"x": "a", "y": {"z": 1}}, "field 'y' must be a text or a number, got dict"),
        ({"x": "a", "y": b"\xff"}, "field 'y' must be a text or a number, got bytes"),
        ({"x": "a", "y": []}, "field 'y' is an empty list"),
        ({"x": "a", "y": ["b", None]}, "field 'y' must be a text or a number, got NoneType"),
        ({"x": "a", "y": " "}, "the target '{y}' is empty"),
        ({"x": "a", "y": float("nan")}, "field 'y' is NaN"),
    ],
)
def test_rejects_values_that_are_not_text(fields, message):
    with pytest.raises(DataError, match=f"a.jsonl:3: .*{message}"):
        render(record(**fields), input="{x}", target="{y}")


def test_rejects_reference_that_is_too_long_to_score():
    with pytest.raises(DataError, match=r"a\.jsonl:3: field 'all' has a reference of 100,001 ch"):
        render(record(y="a", all=["x" * 100_001]), target="{y}", references="all")


def test_input_tokens_do_not_depend_on_target(tokenizer):
    # Tokenised together, "the c" + "at" would merge into one token across the boundary.
    whole = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    first, second = tokenize(pairs(("the c", "at"), ("the c", "entre")), tokenizer)
    assert first.ids_T[:-1].tolist() != whole
    assert first.source_length == second.source_length
    assert (first.ids_T[: first.source_length] == second.ids_T[: second.source_length]).all()


def test_the_loss_is_on_the_target_and_its_end(tokenizer):
    (example,) = tokenize(pairs(("the cat", " sat")), tokenizer)
    assert tokenizer.decode(example.ids_T[~example.target_T]) == "the cat"
    assert tokenizer.decode(example.ids_T[example.target_T]) == " sat<|im_end|>"
    assert example.prompt == "the cat"
    assert example.origin == "a.jsonl:1"
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
    assert [example.origin for example in examples] == ["a.jsonl:2"]
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


def test_equal_prompts_become_one_example_with_all_references(tokenizer):
    examples = tokenize(
        pairs(("a", "one"), ("b", ["two", "three"]), ("a", "four"), ("a", "one")), tokenizer
    )
    grouped = TextTask("{x}", "{y}").inputs(examples)
    assert [(example.prompt, example.references) for example in grouped] == [
        ("a", ("one", "four")),
        ("b", ("two", "three")),
    ]
    assert grouped[0].origin == "a.jsonl:1"


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


def test_examples_come_from_a_file(tmp_path, tokenizer):
    path = tmp_path / "train.jsonl"
    rows = [{"mr": "name", "ref": ["one", "two"]}, {"mr": "area", "ref": "three"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TextTask("{mr} => ", "{ref}")
    examples = task.examples(read_records(path), Reader(tokenizer))
    assert [example.prompt for example in examples] == ["name => ", "name => ", "area => "]
    assert [example.origin for example in examples] == ["train.jsonl:1"] * 2 + ["train.jsonl:2"]
    assert examples[0].references == ("one", "two")
    batch = Pipeline(examples, batch_size=3).batch(0)
    assert batch.examples == 3


def test_label_with_nan_is_named_by_file_row_and_column(tmp_path, tokenizer):
    path = tmp_path / "train.csv"
    path.write_text("text,label\ngood,1\nbad,nan\n")
    with pytest.raises(DataError, match=r"train\.csv:3: field 'label'"):
        TextTask("{text}", "{label}").examples(read_records(path), Reader(tokenizer))
