"""Tests that chats become examples and prompts."""

import copy

import pytest

from prefix_jax.data.source import Record
from prefix_jax.data.special import end_tokens
from prefix_jax.errors import DataError
from prefix_jax.tasks import ChatTask, Reader

TURNS = [("user", "1"), ("assistant", "one"), ("user", "2"), ("assistant", "two")]


def record(**fields):
    return Record(fields, "a.jsonl:3")


def chat(*turns):
    return record(messages=[{"role": role, "content": content} for role, content in turns])


def render(record, tokenizer):
    (rendered,) = ChatTask().render(record, Reader(tokenizer))
    return rendered


def tokenize(tokenizer, *turns, end_ids=()):
    return ChatTask().examples([chat(*turns)], Reader(tokenizer, end_ids=tuple(end_ids)))


def test_assistant_turns_are_targets_including_end_token(tokenizer):
    turns = [("system", "be"), ("user", "1"), ("assistant", "one"), ("user", "2")]
    rendered = render(chat(*turns, ("assistant", "2!")), tokenizer)
    assert [span.text for span in rendered.spans if span.target] == [
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
        render(chat(("user", "1"), ("assistant", "a")), tokenizer)


def test_chat_rejected_by_template_is_an_error(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"a\.jsonl:3: .*rejects the chat: roles must alternate"):
        render(chat(("user", "1"), ("assistant", "a")), tokenizer)


def test_a_tokenizer_without_chat_template_is_an_error(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(DataError, match="no chat template"):
        render(chat(("user", "1"), ("assistant", "a")), tokenizer)


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
        render(record(messages=messages), tokenizer)


def test_chat_prompt_ends_before_last_answer(tokenizer):
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "and?"},
    ]
    task, reader = ChatTask("chat"), Reader(tokenizer)
    prompt = task.prompt(Record({"chat": turns}, "r"), reader).text
    assert prompt.endswith("and?<|im_end|>\n<|im_start|>assistant\n")
    answered = Record({"chat": [*turns, {"role": "assistant", "content": "so"}]}, "r")
    assert task.prompt(answered, reader).text == prompt
    assert render(Record({"messages": answered.value("chat")}, "r"), tokenizer).prompt == prompt
    with pytest.raises(DataError, match="no turn to answer"):
        task.prompt(Record({"chat": []}, "r"), reader)


def test_rejects_chat_that_is_too_long(tokenizer):
    turns = [("user", "1"), ("assistant", "a")] * 6_000
    with pytest.raises(DataError, match=r"a\.jsonl:3: the chat in 'messages' has 12,000 turns"):
        render(chat(*turns), tokenizer)


def test_chat_targets_are_assistant_turns_with_end_tokens(tokenizer):
    turns = [("user", "1"), ("assistant", "one"), ("user", "2"), ("assistant", "two")]
    (example,) = tokenize(tokenizer, *turns)
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


def test_turn_targets_end_at_a_decoding_end_token(tokenizer):
    gemma = _speaking(tokenizer, "<end_of_turn>\n", "<end_of_turn>")
    (example,) = tokenize(gemma, *TURNS)
    learnt = gemma.decode(example.ids_T[example.target_T])
    assert learnt == "one<end_of_turn>two<end_of_turn>"
    assert example.ids_T[example.target_T][-1] in ChatTask().ends(Reader(gemma))


def test_turn_may_end_with_end_token_of_checkpoint(tokenizer):
    stated = _speaking(tokenizer, "{{ '#' if m.content == 'two' else '' }}\n")
    sharp = stated.convert_tokens_to_ids("#")
    (example,) = tokenize(stated, *TURNS, end_ids=[sharp])
    assert stated.decode(example.ids_T[example.target_T]) == "one\ntwo#"


def test_chat_without_end_of_turn_token_ends_with_eos(tokenizer):
    plain = _speaking(tokenizer, "\n")
    (example,) = tokenize(plain, *TURNS)
    assert plain.decode(example.ids_T[example.target_T]) == "one\ntwo\n<|im_end|>"
    assert plain.decode(example.ids_T).count("<|im_end|>") == 1
    endless = type(plain)(
        tokenizer_object=plain.backend_tokenizer, chat_template=plain.chat_template
    )
    with pytest.raises(DataError, match="no end-of-sequence token"):
        tokenize(endless, *TURNS)


def test_chat_has_only_special_tokens_of_its_template(bos_tokenizer):
    (example,) = tokenize(bos_tokenizer, ("user", "1"), ("assistant", "x"))
    text = "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\nx<|im_end|>\n"
    assert bos_tokenizer.decode(example.ids_T) == text


TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}%s{% endfor %}"


@pytest.fixture
def speaking(tokenizer):
    """Gives the tokenizer a chat template whose turns end with the given text."""

    def make(ending=None, *added, template=TEMPLATE):
        changed = copy.deepcopy(tokenizer)
        changed.add_tokens(list(added))
        changed.chat_template = None if ending is None else template.replace("%s", ending)
        return changed

    return make


def test_chat_adds_end_of_turn_token_of_template(speaking):
    gemma = speaking("<end_of_turn>\n", "<end_of_turn>")
    turn = gemma.convert_tokens_to_ids("<end_of_turn>")
    assert ChatTask().ends(Reader(gemma)) == (gemma.eos_token_id, turn)
    assert end_tokens(gemma) == (gemma.eos_token_id,)


@pytest.mark.parametrize(
    "changes",
    [
        ("<|im_end|>\n",),
        (" END\n",),
        # Some tokenizers have separate tokens for line breaks.
        ("\n\n", "\n\n"),
        (None,),
        ("{{ raise_exception('give a system turn') }}",),
    ],
)
def test_template_without_end_of_turn_token_adds_nothing(speaking, changes):
    tokenizer = speaking(*changes)
    assert ChatTask().ends(Reader(tokenizer)) == (tokenizer.eos_token_id,)
