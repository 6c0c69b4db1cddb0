"""The engine without its conveniences: continuous batching of rows with different prefixes.

    handle = core.submit(Request(ids, prefix="legal"))
    while not core.idle:
        for event in core.step():
            …

A step admits waiting requests to free rows, reads prompts in chunks, and generates tokens in all
rows whose prompt is read. Nothing runs between calls, and there are no threads: a server calls
`step` in a loop of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from prefix_jax.backbones.backbone import dtype_of
from prefix_jax.backbones.loading.pretrained import Pretrained
from prefix_jax.backbones.stacking import Params
from prefix_jax.data.special import end_tokens
from prefix_jax.decode.continuation import Writer
from prefix_jax.decode.options import banned_sequences
from prefix_jax.decode.prompts import check_prompt
from prefix_jax.decode.sizes import bucket, prompt_bucket
from prefix_jax.decode.text import TextStream
from prefix_jax.engine import drafts, programs
from prefix_jax.engine.bank import Bank
from prefix_jax.engine.request import (
    MAX_TOP_LOGPROBS,
    Event,
    Handle,
    Request,
    Sample,
    Score,
    tops,
)
from prefix_jax.engine.sampling import check_supported
from prefix_jax.engine.schedule import Schedule
from prefix_jax.engine.warm import Slots, Warm, warm_start
from prefix_jax.errors import (
    BackboneError,
    ConfigError,
    ContextError,
    MeshError,
    NonFiniteError,
    PrefixJaxError,
)
from prefix_jax.mesh import HEAD_AXIS, check_rows, on_mesh_of
from prefix_jax.prefix import Prefix, Produced

# Columns and chunks are at least this wide, so that short texts share programs.
_MIN_WIDTH, _MIN_CHUNK = 64, 32
# End tokens per row. Tokenizers and checkpoints list up to four.
_EOS = 8


@dataclasses.dataclass
class DecodingStats:
    """Counts of an engine since it was made.

    Attributes:
        steps: forward passes that generated tokens.
        row_steps: the same, counted once per running row; `generated_tokens / row_steps` is the
            mean number of tokens per row and step.
        generated_tokens: tokens that they generated, in all rows.
        drafted_tokens: tokens that were drafted and verified.
        accepted_tokens: drafted tokens that became part of a text.
    """

    steps: int = 0
    row_steps: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    def add(self, burst: programs.Burst) -> None:
        """Adds the counts of a call of the decoding program."""
        self.steps += int(burst.steps)
        self.row_steps += int(burst.steps_B.sum())
        self.generated_tokens += int(burst.count_B.sum())
        self.drafted_tokens += int(burst.drafted_B.sum())
        self.accepted_tokens += int(burst.accepted_B.sum())


class EngineCore:
    """Generates text in rows that join and leave independently.

    The tokens of a row depend neither on the other rows nor on the time at which it joins.

    Attributes:
        bank: the prefixes.
        stats: counts of decoding steps and drafted tokens.
    """

    def __init__(
        self,
        pretrained: Pretrained,
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
    ):
        """Allocates the rows; see `prefix_jax.Engine` for the arguments.

        Raises:
            ConfigError: an argument is out of range.
            BackboneError: the model is an encoder.
            MeshError: the rows do not divide over the mesh, or there are several processes.
        """
        if (processes := jax.process_count()) > 1:
            raise MeshError(
                f"the engine needs all devices in one process, got {processes} processes; run one "
                "engine per host, without jax.distributed.initialize, or use Tuned.generate"
            )
        limits = {"rows": rows, "chunk": chunk, "decode_steps": decode_steps}
        limits |= {} if max_length is None else {"max_length": max_length}
        limits |= {} if share_slots is None else {"share_slots": share_slots}
        limits |= {"max_shared": max_shared}
        for name, value in limits.items():
            if value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value}")
        if num_speculative_tokens is not None and num_speculative_tokens < 0:
            raise ConfigError(
                f"num_speculative_tokens must be at least 0, got {num_speculative_tokens}"
            )
        arch = pretrained.backbone.arch
        if not arch.causal:
            raise BackboneError(
                f"the engine generates text, and {arch.model_type} is an encoder; use Tuned.predict"
            )
        check_rows(pretrained.mesh, rows, "rows")
        self._pretrained, self._backbone = pretrained, pretrained.backbone
        self._max_length, self._decode_steps = max_length, decode_steps
        self._share_slots, self._max_shared = share_slots, max_shared
        platform = next(iter(pretrained.mesh.devices.flat)).platform
        if num_speculative_tokens is None:
            num_speculative_tokens = drafts.best_length(platform, rows)
        self._num_drafted = num_speculative_tokens
        self._relative_cost = drafts.relative_cost(platform, rows, num_speculative_tokens)
        self._chunk = bucket(chunk, _MIN_CHUNK)
        self._eos = end_tokens(pretrained.tokenizer, arch.end_ids)
        self._top = min(MAX_TOP_LOGPROBS, arch.vocab)
        self._lift = jax.jit(self._backbone.lift)
        self.bank = Bank(self._make, self._put, device_bytes, host_bytes)
        self.stats = DecodingStats()
        self._tables: drafts.Tables | None = None
        self._schedule = Schedule(rows, _MIN_WIDTH, _EOS)
        params = pretrained.unstacked()
        with on_mesh_of(params):
            dtype = jnp.dtype(dtype_of(params))
            self._cache = programs.empty(arch.geometry, rows, _MIN_WIDTH, dtype)

    @property
    def idle(self) -> bool:
        """True if no request is waiting or running."""
        return self._schedule.idle

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self._schedule.rows)

    @property
    def max_length(self) -> int:
        """The maximum number of tokens of a row: slots, prompt and new tokens together."""
        positions = self._backbone.arch.max_positions
        return positions if self._max_length is None else min(positions, self._max_length)

    @property
    def running(self) -> int:
        """The number of continuations that have a row."""
        return sum(sample is not None for sample in self._schedule.rows)

    @property
    def waiting(self) -> int:
        """The number of continuations that wait for a row."""
        return len(self._schedule.queue)

    @property
    def cache_usage(self) -> float:
        """The used share of the cache's columns, between 0 and 1."""
        rows = zip(self._schedule.rows, self._schedule.layout.length_B, strict=True)
        used = sum(int(length) for sample, length in rows if sample is not None)
        return used / (len(self._schedule.rows) * self._cache.width)

    def room(self, request: Request) -> int:
        """The number of new tokens that fit after a prompt; negative if the prompt does not fit.

        Raises:
            PrefixError: there is no prefix with this name.
        """
        arch, (slots, _) = self._backbone.arch, self._prefix_of(request)
        tokens = 0 if arch.encoder is not None else len(request.ids)
        room = arch.max_positions - slots.text_position - tokens
        if self._max_length is not None:
            room = min(room, self._max_length - slots.count - max(tokens, 1))
        return room

    def submit(self, request: Request) -> Handle:
        """Queues a request.

        Raises:
            PrefixError: there is no prefix with this name.
            DataError: the prompt is empty, or contains a token id outside the vocabulary.
            ContextError: prefix, prompt and new tokens exceed the model's positions or
                `max_length`.
            ConfigError: the engine does not support a decoding option.
        """
        self.check(request)
        handle = Handle(request)
        self._schedule.submit(handle, self._backbone.arch.start_id)
        return handle

    def check(self, request: Request) -> None:
        """Checks a request without queueing it; raises what `submit` raises."""
        check_supported(request.config, request.name)
        if not 0 <= request.top_logprobs <= MAX_TOP_LOGPROBS:
            raise ConfigError(
                f"{request.name}: top_logprobs must be between 0 and {MAX_TOP_LOGPROBS}, got "
                f"{request.top_logprobs}"
            )
        if request.score_prompt and self._backbone.arch.encoder is not None:
            raise ConfigError(
                f"{request.name}: the prompt of an encoder-decoder has no log-probabilities"
            )
        slots, eos = self._prefix_of(request)
        self._check_length(request, slots)
        self._banned(request, eos)

    def cancel(self, handle: Handle) -> None:
        """Ends a request early and frees its rows. Does nothing if it has ended."""
        if not handle.done:
            handle.cancelled = True
            self._schedule.cancel(handle)

    def step(self) -> list[Event]:
        """Advances all rows by a few tokens, and returns what happened."""
        # Training and likelihoods convert the weights of a shared model to their form.
        params = self._pretrained.unstacked()
        with on_mesh_of(params):
            events = self._admit(params)
            self._read_prompts(params)
            return events + self._decode(params)

    # Prefixes.

    def _make(self, produced: Produced) -> tuple[Warm, Slots]:
        params = self._pretrained.unstacked()

        def lift(produced: Produced) -> Prefix:
            with on_mesh_of(params):
                prefix: Prefix = self._lift(params, produced)
            return prefix

        return warm_start(
            produced,
            self._backbone.geometry,
            lift,
            dtype_of(params),
            most=self._backbone.arch.max_positions,
            share_slots=self._share_slots,
        )

    def _put(self, warm: Warm) -> Warm:
        """Replicates a prefix on the mesh; the heads of shared slots are split as in the cache."""
        mesh = self._pretrained.mesh
        kv_heads = self._backbone.geometry.main.kv_heads
        heads = PartitionSpec(HEAD_AXIS if kv_heads % mesh.shape[HEAD_AXIS] == 0 else None)
        rest = dataclasses.replace(warm, shared=None)
        put: Warm = jax.device_put(rest, NamedSharding(mesh, PartitionSpec()))
        shared = jax.device_put(warm.shared, NamedSharding(mesh, heads))
        return dataclasses.replace(put, shared=shared)

    def _prefix_of(self, request: Request) -> tuple[Slots, Sequence[int]]:
        """The slots of a request's prefix, and the tokens that end its text."""
        slots, eos = Slots(), tuple(self._eos)
        if request.prefix is not None:
            banked = self.bank.find(request.prefix)
            slots, eos = banked.slots, banked.eos
        return slots, (*eos, *(token for token in request.eos if token not in eos))

    def _check_length(self, request: Request, slots: Slots) -> None:
        arch, config = self._backbone.arch, request.config
        room = (arch.encoder or arch).max_positions - slots.input_position
        decoder_room = arch.max_positions - slots.text_position
        new = config.max_new_tokens
        check_prompt(arch, request.ids, request.name, new, room, decoder_room)
        tokens = 1 if arch.encoder is not None else len(request.ids)
        columns = slots.count + max(tokens + new, len(request.ids))
        if self._max_length is not None and columns > self._max_length:
            raise ContextError(
                f"{request.name}: {len(request.ids)} tokens after {slots.count} slots of its "
                f"prefix, and {new} new ones, exceed max_length {self._max_length} of the engine; "
                "shorten the prompt or max_new_tokens, or raise max_length"
            )

    def _banned(self, request: Request, eos: Sequence[int]) -> list[list[int]]:
        """The token sequences that a request bans."""
        words, tokenizer = request.config.banned_words, self._pretrained.tokenizer
        return [ids.tolist() for array in banned_sequences(words, tokenizer, eos) for ids in array]

    # The parts of a step.

    def _admit(self, params: Params) -> list[Event]:
        """Moves continuations from the queue to free rows."""
        schedule, events = self._schedule, []
        while schedule.queue and (row := schedule.free_row()) is not None:
            sample = schedule.queue.popleft()
            request = sample.handle.request
            try:
                # The prefix may have changed while the request waited.
                slots, eos = self._prefix_of(request)
                self._check_length(request, slots)
                banned = self._banned(request, eos)
                warm = None if request.prefix is None else self.bank.use(request.prefix)
                guide = None if request.guide is None else request.guide(eos)
            except PrefixJaxError as error:
                events.append(self._fail(sample, error))
                continue
            self._start(params, row, sample, slots, warm)
            context = [] if self._backbone.arch.encoder is not None else request.ids
            tokenizer = self._pretrained.tokenizer.backend_tokenizer
            stream = TextStream(tokenizer, context, request.config.stop)
            sample.start(Writer(stream, eos, sample.add_piece), guide)
            schedule.set_up(row, eos, banned)
        return events

    def _start(
        self, params: Params, row: int, sample: Sample, slots: Slots, warm: Warm | None
    ) -> None:
        """Starts a row with a prefix; with an encoder, also reads the prompt."""
        schedule, ids = self._schedule, sample.handle.request.ids
        if self._num_drafted:
            self._start_table(row, None if warm is None else warm.ngrams_G2W)
        copied = None
        if warm is not None and slots.shared and not schedule.can_share(warm, self._max_shared):
            slots, copied = dataclasses.replace(slots, shared=False), warm.shared
        cross = 0
        if self._backbone.arch.encoder is not None:
            E = bucket(len(ids), _MIN_CHUNK)
            cross = E + _cross_slots(warm)
        columns = (self._columns(sample, slots), cross)
        schedule.admit(row, sample, slots, warm, columns)
        width, cross_width = map(_rounded, schedule.columns)
        cross_width = cross_width if cross else 0
        if (width, cross_width) != (self._cache.width, self._cache.cross_width):
            self._cache = programs.resize(self._cache, width=width, cross_width=cross_width)
            schedule.resize(width)
        if warm is not None:  # programs are compiled for what they use
            warm = dataclasses.replace(warm, ngrams_G2W=None)
        if warm is not None and not self._cache.fits(warm):
            self._cache = programs.add_outside(self._cache, warm)
        decoder = None if warm is None else warm.decoder
        self._cache = programs.start(self._cache, np.int32(row), decoder, copied)
        if cross:
            ids_1E = np.zeros((1, E), np.int32)
            ids_1E[0, : len(ids)] = ids
            self._cache = programs.encode(
                self._backbone,
                params,
                self._cache,
                np.int32(row),
                warm,
                ids_1E,
                np.int32(len(ids)),
            )

    def _start_table(self, row: int, entry_G2W: jax.Array | None) -> None:
        """Gives a row an n-gram table, or none."""
        if self._tables is None and entry_G2W is None:
            return
        if entry_G2W is not None:
            buckets, _, ways = entry_G2W.shape
            if self._tables is None or buckets > self._tables.entry_BG2W.shape[1]:
                self._tables = programs.resize_tables(
                    self._tables, rows=self.rows, buckets=buckets, ways=ways
                )
        assert self._tables is not None
        self._tables = programs.start_table(self._tables, np.int32(row), entry_G2W)

    def _columns(self, sample: Sample, slots: Slots) -> int:
        """The number of columns that a row needs, including the padding of its last chunk."""
        unread = sample.unread
        full = unread - unread % self._chunk
        padded = full + self._chunk_size(unread - full)
        tokens = len(sample.prompt) + sample.handle.request.config.max_new_tokens
        # Drafts are as long as ever at the end of a text.
        tokens += self._num_drafted
        # The padded slots of a prefix are copied together.
        return max(bucket(slots.columns), slots.columns + max(padded, tokens))

    def _read_prompts(self, params: Params) -> None:
        """Reads up to `chunk` tokens of prompts; all of them if no row could decode meanwhile."""
        schedule, budget = self._schedule, self._chunk
        while unread := schedule.unread:
            sizes = {row: self._chunk_size(sample.unread) for row, sample in unread.items()}
            size = next(iter(sizes.values()))
            if size > budget:
                if schedule.running_B.any():
                    return
                budget = self._chunk
            first, sample = next(iter(unread.items()))
            scored, shared = sample.handle.request.score_prompt, schedule.shared[first]
            same = [
                row
                for row, sample in unread.items()
                if sizes[row] == size
                and sample.handle.request.score_prompt == scored
                and schedule.shared[row] is shared
            ]
            rows = same[: _power_of_4(min(len(same), budget // size))]
            counts = [min(unread[row].unread, size) for row in rows]
            ids_RC = np.zeros((len(rows), size), np.int32)
            next_RC = np.zeros_like(ids_RC)
            for r, (row, count) in enumerate(zip(rows, counts, strict=True)):
                ids = unread[row].next_ids(count + 1)
                ids_RC[r, :count], next_RC[r, :count] = ids[:-1], ids[1:]
            self._cache, scores = programs.extend(
                self._backbone,
                params,
                self._cache,
                () if shared is None or shared.shared is None else (shared.shared,),
                np.array(rows, np.int32),
                schedule.layout_of(rows),
                ids_RC,
                np.array(counts, np.int32),
                next_RC if scored else None,
                top=self._top if scored else 0,
            )
            if scores is not None:
                _record(jax.device_get(scores), [unread[row] for row in rows], counts)
            for row, count in zip(rows, counts, strict=True):
                schedule.read(row, count)
            budget -= len(rows) * size

    def _chunk_size(self, unread: int) -> int:
        """The size of the next chunk of a prompt, padding included."""
        return bucket(min(unread, self._chunk), _MIN_CHUNK)

    def _decode(self, params: Params) -> list[Event]:
        """Generates tokens in all rows whose prompt is read."""
        schedule = self._schedule
        running_B = schedule.running_B
        if not running_B.any():
            return []
        allowed_BW, events = self._allowed(running_B)
        samples = [self._schedule.rows[row] for row in np.flatnonzero(running_B)]
        top = any(sample is not None and sample.handle.request.top_logprobs for sample in samples)
        # Prompts that are not read wait for one token only, and so do guides.
        single = bool(schedule.unread) or allowed_BW is not None
        shared = tuple(warm.shared for warm in schedule.share() if warm.shared is not None)
        num_drafted = 0 if allowed_BW is not None else self._num_drafted
        self._cache, burst = programs.decode(
            self._backbone,
            params,
            self._cache,
            shared,
            schedule.layout,
            schedule.settings,
            schedule.ids_BS,
            running_B,
            schedule.acceptance_B,
            self._tables if num_drafted else None,
            np.int32(1 if single else self._decode_steps),
            np.bool_(bool(schedule.queue)),
            allowed_BW,
            capacity=self._decode_steps,
            top=self._top if top else 0,
            num_drafted=num_drafted,
            relative_cost=self._relative_cost if num_drafted else 1.0,
        )
        burst = jax.device_get(burst)
        schedule.acceptance_B = np.array(burst.acceptance_B)
        self.stats.add(burst)
        for row in np.flatnonzero(running_B):
            sample = schedule.rows[row]
            if sample is None:  # its guide, or another of its samples, has failed
                continue
            if burst.invalid_B[row]:
                name = sample.handle.request.name
                events.append(self._fail(sample, NonFiniteError.of(name, "the model's logits")))
                continue
            count = burst.count_B[row]
            ids = burst.token_BU[row, :count].tolist()
            schedule.append(row, ids)
            top_ids_UX, top_logprobs_UX = burst.top_id_BUX[row], burst.top_logprob_BUX[row]
            try:
                event = sample.extend(
                    ids,
                    burst.logprob_BU[row, :count].tolist(),
                    tops(top_ids_UX, top_logprobs_UX, sample.handle.request.top_logprobs),
                    ended=not burst.running_B[row],
                )
            except PrefixJaxError as error:  # of its guide
                event = self._fail(sample, error)
            events.append(event)
            if event.finish is not None:
                schedule.release(row)
        return events

    def _allowed(self, running_B: np.ndarray) -> tuple[np.ndarray | None, list[Event]]:
        """The tokens that guides allow in every row, None without guides; and their failures."""
        allowed_BW, events = None, []
        for row in np.flatnonzero(running_B):
            sample = self._schedule.rows[row]
            if sample is None or sample.guide is None:
                continue
            if allowed_BW is None:
                words = -(-self._backbone.arch.vocab // 32)
                allowed_BW = np.full((len(running_B), words), 2**32 - 1, np.uint32)
            try:
                allowed_BW[row] = sample.guide.allowed()
            except PrefixJaxError as error:
                events.append(self._fail(sample, error))
        return allowed_BW, events

    def _fail(self, sample: Sample, error: PrefixJaxError) -> Event:
        """Ends a request because of an error."""
        sample.handle.error = error
        self._schedule.cancel(sample.handle)
        return Event(sample.handle, sample.number, error=error)


def _record(scores: programs.Scores, samples: Sequence[Sample], counts: Sequence[int]) -> None:
    """Hands the scores of a chunk to the continuations that it belongs to."""
    for r, (sample, count) in enumerate(zip(samples, counts, strict=True)):
        top = tops(
            scores.top_id_RCX[r], scores.top_logprob_RCX[r], sample.handle.request.top_logprobs
        )
        sample.score(list(map(Score, scores.logprob_RC[r, :count].tolist(), top)))


def _rounded(columns: int) -> int:
    """Rounds a number of columns up to one that programs are compiled for."""
    return prompt_bucket(max(columns, _MIN_WIDTH))


def _cross_slots(warm: Warm | None) -> int:
    """The columns of cross-attention before the encoder's tokens, padding included."""
    if warm is None:
        return 0
    cross = None if warm.cross is None else warm.cross.k_LKPH
    soft = 0 if warm.embeds_PD is None else len(warm.embeds_PD)
    return soft + (0 if cross is None else cross.shape[2])


def _power_of_4(size: int) -> int:
    """Rounds down to a power of 4: the numbers of rows that `extend` is compiled for."""
    return 4 ** ((size.bit_length() - 1) // 2)
