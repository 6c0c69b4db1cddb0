"""Tokenizers: read from a directory in Hugging Face layout, or rebuilt from GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from tokenizers import pre_tokenizers as pre
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from prefix_jax.backbones.gguf import GGUF, open_gguf
from prefix_jax.errors import BackboneError, reason

# gguf.TokenType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(pattern: str) -> list[pre.PreTokenizer]:
    return [pre.Split(Regex(pattern), "isolated"), pre.ByteLevel(False, use_regex=False)]


# What the `tokenizer.ggml.pre` of each byte-level tokenizer stands for in its `tokenizer.json`.
_PRE_TOKENIZERS: dict[str, list[pre.PreTokenizer]] = {
    "gpt-2": [pre.ByteLevel(add_prefix_space=False)],
    "smollm": [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)],
    "llama-bpe": _split(rf"{_CONTRACTIONS}|\p{{N}}{{1,3}}|{_REST}"),
    "qwen2": _split(rf"{_CONTRACTIONS}|\p{{N}}|{_REST}"),
}


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model directory or of a GGUF file.

    Raises:
        BackboneError: there is none, or it is of a kind that cannot be rebuilt.
    """
    if not path.is_dir():
        return from_gguf(open_gguf(path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise BackboneError(
            f"{path} holds no tokenizer that can be read: {reason(error)}"
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise BackboneError(
            f"{path} holds a tokenizer in Python code ({type(tokenizer).__name__}); "
            "convert it to a tokenizer.json"
        )
    return tokenizer


def from_gguf(file: GGUF) -> PreTrainedTokenizerFast:
    """Rebuilds the tokenizer that llama.cpp's converter took apart.

    Raises:
        BackboneError: the file holds none, or one of an unsupported kind.
    """
    get = _Metadata(file)
    tokens, types = get["tokens"], get["token_type"]
    # The converter fills the vocabulary up to the embedding table with unused tokens.
    vocab = {t: i for i, (t, kind) in enumerate(zip(tokens, types, strict=True)) if kind != _UNUSED}
    if get["model"] == "gpt2":
        tokenizer = _byte_level(get, vocab)
    elif get["model"] == "llama":
        tokenizer = _sentencepiece(get, vocab)
    else:
        raise BackboneError(
            f"{file.path}: tokenizers of kind {get['model']!r} cannot be rebuilt; "
            "supported: gpt2 (byte-level BPE), llama (SentencePiece BPE)"
        )
    added = [
        AddedToken(token, normalized=False, special=kind != _USER_DEFINED)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    special = {
        f"{role}_token": tokens[get.optional(f"{key}_token_id", -1)]
        for role, key in (
            ("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")
        )
        if get.optional(f"{key}_token_id", -1) >= 0
    }  # fmt: skip
    if get.optional("add_bos_token", get["model"] == "llama"):
        bos = tokens[get["bos_token_id"]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        chat_template=file.metadata.values.get("tokenizer.chat_template"),
        **special,
    )


def _byte_level(get: _Metadata, vocab: dict[str, int]) -> Tokenizer:
    name = get.optional("pre", "")
    if name not in _PRE_TOKENIZERS:
        raise BackboneError(
            f"{get.file.path}: the pre-tokenizer {name!r} is unknown; "
            f"supported: {', '.join(_PRE_TOKENIZERS)}"
        )
    merges = [tuple(merge.split(" ")) for merge in get["merges"]]
    tokenizer = Tokenizer(BPE(vocab, merges, ignore_merges=name == "llama-bpe"))
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.Sequence(_PRE_TOKENIZERS[name])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(get: _Metadata, vocab: dict[str, int]) -> Tokenizer:
    """The conversion that transformers gives Llama's and Mistral's SentencePiece models."""
    merges = generate_merges(vocab, dict(zip(get["tokens"], get["scores"], strict=True)))
    unknown = get["tokens"][get["unknown_token_id"]]
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    before: list[normalizers.Normalizer] = []
    after: list[decoders.Decoder] = []
    if get.optional("add_space_prefix", True):
        before, after = [normalizers.Prepend("▁")], [decoders.Strip(" ", 1, 0)]
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return tokenizer


class _Metadata:
    """The keys under `tokenizer.ggml`."""

    def __init__(self, file: GGUF):
        self.file = file

    def __getitem__(self, key: str) -> Any:
        value = self.optional(key, None)
        if value is None:
            raise BackboneError(f"{self.file.path} lacks the metadata key tokenizer.ggml.{key}")
        return value

    def optional(self, key: str, default: Any) -> Any:
        return self.file.metadata.values.get(f"tokenizer.ggml.{key}", default)
