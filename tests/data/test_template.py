import pytest

from prefix_jax.data.source import Record
from prefix_jax.data.template import Segment, Template, render, render_chat, render_chat_prompt
from prefix_jax.errors import DataError


def record(**fields):
    return Record(fields, "a.jsonl:3")


def chat(*turns):
    return record(messages=[{"role": role, "content": content} for role, content in turns])


def test_fields_are_filled_and_doubled_braces_are_literal():
    template = Template("{{{x}}} is {y}, {x}")
    assert template.render(record(x="one", y=2)) == ["{one} is 2, one"]
    assert template.fields == ("x", "y", "x")


def test_values_are_inserted_unchanged():
    assert Template("{x}").render(record(x="{y} {{")) == ["{y} {{"]


def test_field_names_are_not_attribute_lookups():
    assert Template("{a.b}").render(Record({"a.b": "plain", "a": "no"}, "r")) == ["plain"]
    with pytest.raises(DataError, match=r"no field 'x\.__class__'"):
        Template("{x.__class__}").render(record(x="one"))
    with pytest.raises(DataError, match=r"no field 'x\[0\]'"):
        Template("{x[0]}").render(record(x="one"))


@pytest.mark.parametrize("text", ["{", "a } b", "{}", "{x!r}", "{x:>9}", "{x:{y}}"])
def test_rejects_braces_that_are_not_a_field(text):
    with pytest.raises(DataError, match="write a literal brace twice"):
        Template(text)


def test_missing_field_error_names_the_record():
    with pytest.raises(DataError, match=r"a\.jsonl:3: no field 'mr'"):
        render(record(rm="x", ref="y"), input=Template("{mr}"), target=Template("{ref}"))


def test_target_list_gives_one_example_per_item():
    rendered = render(
        record(mr="m", refs=["a", "b"]), input=Template("{mr}: "), target=Template("{refs}.")
    )
    assert [one.segments for one in rendered] == [
        (Segment("m: ", False), Segment("a.", True)),
        (Segment("m: ", False), Segment("b.", True)),
    ]
    assert all(one.references == ("a.", "b.") and one.prompt == "m: " for one in rendered)


def test_references_come_from_the_named_field():
    (one,) = render(
        record(y="a", all=["a", "b"]), input=None, target=Template("{y}"), references="all"
    )
    assert one.references == ("a", "b")
    assert one.prompt == ""


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"x": ["a", "b"], "y": "c"}, "only the target may use a list"),
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
        render(record(**fields), input=Template("{x}"), target=Template("{y}"))


def test_rejects_two_lists_in_one_template():
    with pytest.raises(DataError, match="are both lists"):
        Template("{x} {y}").render(record(x=["a", "b"], y=["c"]))


def test_assistant_turns_are_targets_including_end_token(tokenizer):
    turns = [("system", "be"), ("user", "1"), ("assistant", "one"), ("user", "2")]
    rendered = render_chat(chat(*turns, ("assistant", "2!")), "messages", tokenizer)
    assert [segment.text for segment in rendered.segments if segment.target] == [
        "one<|im_end|>\n",
        "2!<|im_end|>\n",
    ]
    # The text before the last answer is the prompt for generation.
    assert rendered.prompt == tokenizer.apply_chat_template(
        chat(*turns).value("messages"), tokenize=False, add_generation_prompt=True
    )
    assert rendered.references == ("2!",)


def test_rejects_template_that_rewrites_earlier_turns(tokenizer, monkeypatch):
    # Like templates that drop the reasoning of all answers except the last.
    monkeypatch.setattr(
        tokenizer,
        "chat_template",
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] if loop.last else '' }};"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
    )
    with pytest.raises(DataError, match="rewrites earlier turns at turn"):
        render_chat(chat(("user", "1"), ("assistant", "a")), "messages", tokenizer)


def test_chat_rejected_by_template_is_an_error(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"a\.jsonl:3: .*rejects the chat: roles must alternate"):
        render_chat(chat(("user", "1"), ("assistant", "a")), "messages", tokenizer)


def test_a_tokenizer_without_chat_template_is_an_error(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(DataError, match="no chat template"):
        render_chat(chat(("user", "1"), ("assistant", "a")), "messages", tokenizer)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "must be a list of turns"),
        ([{"role": "user"}], "turn 1 of 'messages' must be"),
        ([{"role": "user", "content": "x"}], "no assistant turn"),
        ([], "no assistant turn"),
        ([{"role": "assistant", "content": "x"}], "begins with an assistant turn"),
        ([{"role": "assistant", "content": " "}], "turn 1, of the assistant, is empty"),
    ],
)
def test_rejects_invalid_chat(tokenizer, messages, message):
    with pytest.raises(DataError, match=f"a.jsonl:3: .*{message}"):
        render_chat(record(messages=messages), "messages", tokenizer)


def test_chat_prompt_ends_before_last_answer(tokenizer):
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "and?"},
    ]
    prompt = render_chat_prompt(Record({"chat": turns}, "r"), "chat", tokenizer)
    assert prompt.endswith("and?<|im_end|>\n<|im_start|>assistant\n")
    answered = [*turns, {"role": "assistant", "content": "so"}]
    assert render_chat_prompt(Record({"chat": answered}, "r"), "chat", tokenizer) == prompt
    rendered = render_chat(Record({"chat": answered}, "r"), "chat", tokenizer)
    assert rendered.prompt == prompt
    with pytest.raises(DataError, match="no turn to answer"):
        render_chat_prompt(Record({"chat": []}, "r"), "chat", tokenizer)


def test_rejects_unpaired_surrogate():
    with pytest.raises(DataError, match=r"a\.jsonl:3: not valid Unicode text"):
        Template("{x}").render(record(x="\ud800"))


def test_rejects_too_many_alternatives(tokenizer):
    words = ["x"] * 10_000
    assert len(Template("{x}").render(record(x=words))) == 10_000
    with pytest.raises(DataError, match=r"a\.jsonl:3: field 'x' is a list of 10,001 texts"):
        Template("{x}").render(record(x=[*words, "x"]))
    turns = [("user", "1"), ("assistant", "a")] * 6_000
    with pytest.raises(DataError, match=r"a\.jsonl:3: the chat in 'messages' has 12,000 turns"):
        render_chat(chat(*turns), "messages", tokenizer)


def test_rejects_reference_that_is_too_long_to_score():
    with pytest.raises(DataError, match=r"a\.jsonl:3: field 'all' has a reference of 100,001 ch"):
        render(
            record(y="a", all=["x" * 100_001]), input=None, target=Template("{y}"), references="all"
        )


def test_rejects_nan_in_a_list():
    with pytest.raises(DataError, match=r"a\.jsonl:3: field 'x' contains NaN"):
        Template("{x}").render(record(x=["one", float("nan")]))
