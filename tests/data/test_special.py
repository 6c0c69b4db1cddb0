"""Tests the special tokens around a text, and those that end one."""

from prefix_jax.data.special import end_tokens


def test_merges_end_tokens_of_tokenizer_and_checkpoint(tokenizer):
    eos = tokenizer.eos_token_id
    assert end_tokens(tokenizer) == (eos,)
    assert end_tokens(tokenizer, (7, eos, 7, 8)) == (eos, 7, 8)


def test_tokenizer_without_eos_uses_end_tokens_of_checkpoint(tokenizer):
    endless = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    assert end_tokens(endless) == ()
    assert end_tokens(endless, [3]) == (3,)
