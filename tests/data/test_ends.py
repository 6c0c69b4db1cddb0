"""Tests the tokens that end a text or a chat turn."""

import copy

import pytest

from prefix_jax.data.ends import end_tokens

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}%s{% endfor %}"


@pytest.fixture
def speaking(tokenizer):
    """Gives the tokenizer a chat template whose turns end with the given text."""

    def make(ending=None, *added, template=TURNS):
        changed = copy.deepcopy(tokenizer)
        changed.add_tokens(list(added))
        changed.chat_template = None if ending is None else template.replace("%s", ending)
        return changed

    return make


def test_merges_end_tokens_of_tokenizer_and_checkpoint(tokenizer):
    eos = tokenizer.eos_token_id
    assert end_tokens(tokenizer) == (eos,)
    assert end_tokens(tokenizer, (7, eos, 7, 8)) == (eos, 7, 8)


def test_tokenizer_without_eos_uses_end_tokens_of_checkpoint(tokenizer):
    endless = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    assert end_tokens(endless) == ()
    assert end_tokens(endless, [3]) == (3,)


def test_chat_adds_end_of_turn_token_of_template(speaking):
    gemma = speaking("<end_of_turn>\n", "<end_of_turn>")
    turn = gemma.convert_tokens_to_ids("<end_of_turn>")
    assert end_tokens(gemma, chat=True) == (gemma.eos_token_id, turn)
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
    assert end_tokens(tokenizer, chat=True) == (tokenizer.eos_token_id,)
