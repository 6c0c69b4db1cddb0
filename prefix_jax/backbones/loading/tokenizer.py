"""Reads a tokenizer from a directory in Hugging Face layout, or rebuilds it from GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from tokenizers import pre_tokenizers as pre
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from prefix_jax.backbones.loading.gguf import GGUF, open_gguf
from prefix_jax.errors import BackboneError
from prefix_jax.untrusted.tokenizer import failures, probe
from prefix_jax.untrusted.tokenizer_files import read_tokenizer
from prefix_jax.untrusted.tokenizer_json import MAX_ID
from prefix_jax.validation import Interval

# gguf.TokenType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(pattern: str) -> list[pre.PreTokenizer]:
    return [pre.Split(Regex(pattern), "isolated"), pre.ByteLevel(False, use_regex=False)]


# The pre-tokenizers of byte-level tokenizers, by their `tokenizer.ggml.pre`.
_PRE_TOKENIZERS: dict[str, list[pre.PreTokenizer]] = {
    "gpt-2": [pre.ByteLevel(add_prefix_space=False)],
    "smollm": [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)],
    "llama-bpe": _split(rf"{_CONTRACTIONS}|\p{{N}}{{1,3}}|{_REST}"),
    "qwen2": _split(rf"{_CONTRACTIONS}|\p{{N}}|{_REST}"),
}


def load_tokenizer(path: Path, rows: int | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a model directory or of a GGUF file.

    Args:
        path: the model.
        rows: rows of the embedding table, which every token id must be below; None for no limit.

    Raises:
        BackboneError: there is no tokenizer, it is malformed, or its kind cannot be rebuilt.
    """
    where, error = str(path), BackboneError
    tokenizer = read_tokenizer(path, error) if path.is_dir() else from_gguf(open_gguf(path))
    probe(tokenizer, rows, where, error)
    return tokenizer


def from_gguf(file: GGUF) -> PreTrainedTokenizerFast:
    """Rebuilds the tokenizer that llama.cpp's converter stored in a GGUF file.

    Raises:
        BackboneError: the tokenizer is absent, malformed or of an unsupported kind.
    """
    get = _Metadata(file)
    tokens, types = get("tokens", list[str]), get("token_type", list[int])
    if len(types) != len(tokens) or len(tokens) > MAX_ID:
        raise BackboneError(
            f"{file.path}: expected at most {MAX_ID} tokens and a type for each, got "
            f"{len(tokens)} tokens and {len(types)} types"
        )
    with failures(f"{file.path}: the tokenizer cannot be rebuilt", BackboneError):
        return _rebuild(get, tokens, types)


def _rebuild(get: _Metadata, tokens: list[str], types: list[int]) -> PreTrainedTokenizerFast:
    # The converter pads the vocabulary to the size of the embedding table with unused tokens.
    vocab = {t: i for i, (t, kind) in enumerate(zip(tokens, types, strict=True)) if kind != _UNUSED}
    kind = get("model", str)
    if kind == "gpt2":
        tokenizer = _byte_level(get, vocab)
    elif kind == "llama":
        tokenizer = _sentencepiece(get, vocab, tokens)
    else:
        raise BackboneError(
            f"{get.path}: tokenizers of kind {kind!r:.80} cannot be rebuilt; "
            "supported: gpt2 (byte-level BPE), llama (SentencePiece BPE)"
        )
    added = [
        AddedToken(token, normalized=False, special=kind != _USER_DEFINED)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    token_id = Annotated[int, Interval(ge=-1, le=len(tokens) - 1)]
    special = {
        f"{role}_token": tokens[index]
        for role, key in (
            ("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")
        )
        if (index := get(f"{key}_token_id", token_id, -1)) >= 0
    }  # fmt: skip
    if get("add_bos_token", bool, kind == "llama"):
        bos = tokens[get("bos_token_id", Annotated[int, Interval(ge=0, le=len(tokens) - 1)])]
        if bos not in vocab:
            raise BackboneError(
                f"{get.path}: the token {bos!r:.80} begins texts but is marked as unused"
            )
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        chat_template=get.file.metadata.get("tokenizer.chat_template", str | None, None),
        **special,
    )


def _byte_level(get: _Metadata, vocab: dict[str, int]) -> Tokenizer:
    name = get("pre", str, "")
    if name not in _PRE_TOKENIZERS:
        raise BackboneError(
            f"{get.path}: the pre-tokenizer {name!r:.80} is unknown; "
            f"supported: {', '.join(_PRE_TOKENIZERS)}"
        )
    merges = [tuple(merge.split(" ")) for merge in get("merges", list[str])]
    wrong = next((merge for merge in merges if len(merge) != 2), None)
    if wrong is not None:
        raise BackboneError(
            f"{get.path}: tokenizer.ggml.merges contains {' '.join(wrong)!r:.80}; "
            "expected two tokens with a space between them"
        )
    tokenizer = Tokenizer(BPE(vocab, merges, ignore_merges=name == "llama-bpe"))
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.Sequence(_PRE_TOKENIZERS[name])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(get: _Metadata, vocab: dict[str, int], tokens: list[str]) -> Tokenizer:
    """Converts a SentencePiece model as transformers does for Llama and Mistral."""
    scores = get("scores", list[float])
    if len(scores) != len(tokens):
        raise BackboneError(
            f"{get.path}: tokenizer.ggml.scores has {len(scores)} values for {len(tokens)} tokens"
        )
    merges = generate_merges(vocab, dict(zip(tokens, scores, strict=True)))
    unknown = tokens[get("unknown_token_id", Annotated[int, Interval(ge=0, le=len(tokens) - 1)])]
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    before: list[normalizers.Normalizer] = []
    after: list[decoders.Decoder] = []
    if get("add_space_prefix", bool, True):
        before, after = [normalizers.Prepend("▁")], [decoders.Strip(" ", 1, 0)]
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return tokenizer


class _Metadata:
    """Reads metadata keys below `tokenizer.ggml`, with the arguments of `Metadata.get`."""

    def __init__(self, file: GGUF):
        self.file, self.path = file, file.path

    def __call__(self, key: str, hint: Any, *default: Any) -> Any:
        return self.file.metadata.get(f"tokenizer.ggml.{key}", hint, *default)
