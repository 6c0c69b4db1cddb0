"""Text generation with a prefix."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from transformers import PreTrainedTokenizerFast

from prefix_jax.backbones.backbone import Backbone
from prefix_jax.backbones.stacking import Params
from prefix_jax.config import DecodeConfig
from prefix_jax.data.special import end_tokens
from prefix_jax.decode.continuation import Continuation, Generation, Writer
from prefix_jax.decode.loop import Search, advance, prefill
from prefix_jax.decode.options import make_search
from prefix_jax.decode.prompts import check_prompt, encode_prompts
from prefix_jax.decode.sizes import bucket, prompt_bucket
from prefix_jax.decode.state import Beams, State
from prefix_jax.decode.text import TextStream
from prefix_jax.errors import ConfigError, NonFiniteError
from prefix_jax.mesh import on_mesh_of
from prefix_jax.prefix import Prefix

OnText = Callable[[int, int, str], None]

# Tokens between two checks for stop texts.
_STOP_INTERVAL = 8
# Number of batches sorted by length together. Sorting all of them would delay the first prompts.
_WINDOW = 8


@dataclasses.dataclass(frozen=True)
class Generator:
    """Generates text after prompts.

    Programs are compiled for a small set of sizes (rows, prompt width, room for new tokens) and
    cached for the life of the process.

    Attributes:
        backbone: the model without its weights.
        params: the backbone's weights; the unstacked form, `backbone.unstacked(params)`, is faster
            here.
        tokenizer: a fast tokenizer from Hugging Face transformers.
        prefix: precedes every prompt; None runs the bare model.
        eos: the tokens that end a text; None uses those of the tokenizer and the checkpoint. A
            prefix trained on chats needs more: see `ChatTask.ends`.
    """

    backbone: Backbone
    params: Params = dataclasses.field(repr=False)
    tokenizer: PreTrainedTokenizerFast = dataclasses.field(repr=False)
    prefix: Prefix | None = dataclasses.field(default=None, repr=False)
    eos: tuple[int, ...] | None = None

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        config: DecodeConfig = DecodeConfig(),
        *,
        batch_size: int = 16,
        names: Sequence[str] | None = None,
        on_text: OnText | None = None,
        on_done: Callable[[int, Generation], None] | None = None,
    ) -> list[Generation]:
        """Generates `config.num_samples` continuations of every prompt.

        The results depend neither on the batch size nor on the other prompts. Sampling depends on
        the seed and on the prompt's position in the list.

        Args:
            prompts: texts, or token ids, which are used unchanged.
            config: decoding options.
            batch_size: prompts per batch; prompts of similar length share a batch.
            names: names of the prompts in error messages, such as "test.jsonl:17"; None numbers
                them.
            on_text: called with (prompt index, sample index, piece of text) as soon as the piece
                is final: token by token, or at the end of a beam search.
            on_done: called with the prompt index and its Generation.

        Returns:
            One Generation per prompt, in the order of the prompts.

        Raises:
            ConfigError: the batch size is not positive.
            DataError: a prompt is empty, or contains a token id outside the vocabulary.
            ContextError: prefix, prompt and new tokens exceed the model's positions.
            NonFiniteError: the model gives NaN or infinite logits.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        names = names or [f"prompt {i}" for i in range(len(prompts))]
        arch, backbone = self.backbone.arch, self.backbone
        encoded = encode_prompts(self.tokenizer, arch, prompts, names)
        room = backbone.room(self.prefix, backbone.input_stack)
        decoder_room = backbone.room(self.prefix, "decoder")
        for ids, name in zip(encoded, names, strict=True):
            check_prompt(arch, ids, name, config.max_new_tokens, room, decoder_room)
        generations: dict[int, Generation] = {}
        by_length: list[int] = []
        for start in range(0, len(encoded), _WINDOW * batch_size):
            window = range(start, min(start + _WINDOW * batch_size, len(encoded)))
            by_length += sorted(window, key=lambda index: len(encoded[index]))
        for start in range(0, len(by_length), batch_size):
            batch = {index: encoded[index] for index in by_length[start : start + batch_size]}
            with on_mesh_of(self.params):
                continuations = self._continue(batch, names, config, on_text)
            for index, samples in zip(batch, continuations, strict=True):
                generations[index] = Generation(samples)
                if on_done is not None:
                    on_done(index, generations[index])
        return [generations[index] for index in range(len(encoded))]

    def _continue(
        self,
        prompts: dict[int, list[int]],
        names: Sequence[str],
        config: DecodeConfig,
        on_text: OnText | None,
    ) -> list[tuple[Continuation, ...]]:
        """Generates the continuations of one batch.

        Args:
            prompts: maps each prompt's index to its tokens.
            names: the names of all prompts, by index.
            config: decoding options.
            on_text: as in `generate`.
        """
        eos = self.eos
        if eos is None:
            eos = end_tokens(self.tokenizer, self.backbone.arch.end_ids)
        B, filling = bucket(len(prompts)), bucket(len(prompts)) - len(prompts)
        ids_BS = np.zeros((B, prompt_bucket(max(map(len, prompts.values())))), np.int32)
        for row, ids in enumerate(prompts.values()):
            ids_BS[row, : len(ids)] = ids
        arch = self.backbone.arch
        search = make_search(
            config, self.tokenizer, eos, [*prompts, *[0] * filling], arch.first_id, arch.last_id
        )
        state = prefill(
            self.backbone,
            self.params,
            self.prefix,
            search,
            ids_BS,
            np.array([*map(len, prompts.values()), *[1] * filling], np.int32),
            np.arange(B) < len(prompts),
            np.int32(config.max_new_tokens),
            capacity=bucket(config.max_new_tokens, 16),
        )

        def writer(index: int, sample: int) -> Writer:
            # With an encoder, the decoder's output does not continue the prompt's text.
            before = prompts[index] if arch.encoder is None else []
            stream = TextStream(self.tokenizer.backend_tokenizer, before, config.stop)
            return Writer(stream, eos, on_text and functools.partial(on_text, index, sample))

        rows = [names[index] for index in prompts]
        writers = [[writer(index, m) for m in range(config.num_samples)] for index in prompts]
        if config.num_beams > 1:
            return self._finish_beams(search, state, config, writers, rows)
        interval = 1 if on_text else _STOP_INTERVAL if config.stop else config.max_new_tokens
        return self._finish_draws(search, state, config, writers, rows, interval)

    def _finish_draws(
        self,
        search: Search,
        state: State,
        config: DecodeConfig,
        writers: list[list[Writer]],
        rows: Sequence[str],
        interval: int,
    ) -> list[tuple[Continuation, ...]]:
        while True:
            # Fetch everything except the cache, which stays on the device.
            now = _fetch(_without_cache(state))
            _check_finite(now, rows)
            done_BM = now.search_state.done_BM.copy()
            for row, samples in enumerate(writers):
                ids_MU = now.ids_BMW[row, :, now.prompt_B[row] :]
                for m, writer in enumerate(samples):
                    new = slice(len(writer), now.search_state.count_BM[row, m])
                    writer.extend(
                        ids_MU[m, new].tolist(), now.search_state.logprob_BMU[row, m, new].tolist()
                    )
                    done_BM[row, m] |= writer.finish is not None
            if done_BM.all():
                return [tuple(writer.close() for writer in samples) for samples in writers]
            draws = dataclasses.replace(state.search_state, done_BM=jax.device_put(done_BM))
            state = dataclasses.replace(state, search_state=draws)
            state = self._advance(search, state, int(now.step) + interval, config)

    def _finish_beams(
        self,
        search: Search,
        state: State,
        config: DecodeConfig,
        writers: list[list[Writer]],
        rows: Sequence[str],
    ) -> list[tuple[Continuation, ...]]:
        state = self._advance(search, state, config.max_new_tokens, config)
        now = _fetch(_without_cache(state))
        _check_finite(now, rows)
        beams: Beams = now.search_state
        continuations = []
        for row, samples in enumerate(writers):
            ids_MU = beams.final_ids_BMW[row, :, now.prompt_B[row] :]
            for m, writer in enumerate(samples):
                count = beams.final_count_BM[row, m]
                writer.extend(
                    ids_MU[m, :count].tolist(), beams.final_logprob_BMU[row, m, :count].tolist()
                )
            scores = beams.final_score_BM[row]
            continuations.append(
                tuple(w.close(score) for w, score in zip(samples, scores, strict=False))
            )
        return continuations

    def _advance(self, search: Search, state: State, until: int, config: DecodeConfig) -> State:
        return advance(
            self.backbone,
            self.params,
            self.prefix,
            search,
            state,
            np.int32(until),
            np.int32(config.max_new_tokens),
        )


def _check_finite(state: State, names: Sequence[str]) -> None:
    """Raises NonFiniteError if the model gave NaN or infinite logits.

    Args:
        state: a state on the host.
        names: the names of the prompts, by row.
    """
    for name, invalid in zip(names, state.invalid_B, strict=False):
        if invalid:
            raise NonFiniteError.of(name, "the model's logits")


def _without_cache(state: State) -> Any:
    """Drops the arrays that stay on the device."""
    return dataclasses.replace(state, cache=cast(Any, None), encoded=None)


def _fetch(tree: Any) -> Any:
    """Fetches arrays to the host as numpy arrays, with the rows of all processes."""

    def whole(x: Any) -> Any:
        here = not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
        return x if here else multihost_utils.process_allgather(x, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))
