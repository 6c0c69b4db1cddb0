"""The host's side of continuous batching: a queue of continuations, and the rows they run in."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from prefix_jax.engine import drafts
from prefix_jax.engine.cache import Layout
from prefix_jax.engine.request import Handle, Sample
from prefix_jax.engine.sampling import Settings, keys_of
from prefix_jax.engine.warm import Slots, Warm


class Schedule:
    """Assigns continuations to rows, first come first served, and describes the rows to programs.

    Attributes:
        queue: continuations that wait for a row.
        rows: the continuation in each row; None for a free row.
        shared: the prefix of each row if rows share it; None for other rows.
        layout, settings: of all rows, as NumPy arrays that are changed in place.
        ids_BS: the prompts and generated tokens of all rows.
        acceptance_B: the estimated probability that a drafted token of a row is accepted.
    """

    def __init__(self, rows: int, width: int, eos: int):
        self.queue: deque[Sample] = deque()
        self.rows: list[Sample | None] = [None] * rows
        self.shared: list[Warm | None] = [None] * rows
        self.layout = Layout.empty(rows)
        self.settings = Settings.empty(rows, eos)
        self.ids_BS = np.zeros((rows, width), np.int32)
        self.acceptance_B = np.full(rows, drafts.PRIOR, np.float32)
        # Rows whose prompt is not read, in the order of their admission.
        self._reading: list[int] = []
        self._columns: dict[int, tuple[int, int]] = {}

    @property
    def idle(self) -> bool:
        """True if nothing is waiting or running."""
        return not self.queue and not any(self.rows)

    @property
    def columns(self) -> tuple[int, int]:
        """The largest numbers of columns that a row needs, of its own and of cross-attention."""
        own, cross = zip(*self._columns.values(), strict=True)
        return max(own), max(cross)

    @property
    def running_B(self) -> np.ndarray:
        """The rows that generate tokens."""
        return np.array([sample is not None and not sample.unread for sample in self.rows])

    def submit(self, handle: Handle, start_id: int | None) -> None:
        """Queues all continuations of a request.

        Args:
            handle: the request.
            start_id: the decoder's start token, with an encoder.
        """
        for number in range(handle.request.config.num_samples):
            self.queue.append(Sample(handle, number, start_id))

    def free_row(self) -> int | None:
        """Returns a free row, or None."""
        return next((row for row, sample in enumerate(self.rows) if sample is None), None)

    def admit(
        self, row: int, sample: Sample, slots: Slots, warm: Warm | None, columns: tuple[int, int]
    ) -> None:
        """Puts a continuation into a free row.

        Args:
            row: the row.
            sample: the continuation.
            slots: the slots of its prefix.
            warm: its prefix.
            columns: the numbers of columns that it needs, of its own and of cross-attention.
        """
        self.rows[row], self._columns[row] = sample, columns
        self.shared[row] = warm if slots.shared else None
        self.layout.slots_B[row] = self.layout.length_B[row] = slots.columns
        self.layout.shared_slots_B[row] = slots.count - slots.columns
        self.layout.text_position_B[row] = slots.text_position
        self.layout.pinned_B[row] = slots.pinned
        if sample.unread:
            self._reading.append(row)

    def set_up(self, row: int, eos: Sequence[int], banned: Sequence[Sequence[int]] = ()) -> None:
        """Writes the prompt and the settings of a row, after `resize`.

        Args:
            row: the row.
            eos: the tokens that end its text.
            banned: token sequences that must not be completed.
        """
        sample = self.rows[row]
        assert sample is not None
        request = sample.handle.request
        self.settings = self.settings.with_room(eos, banned)
        key = keys_of(request.config, request.index)[sample.number]
        self.settings.set_row(row, request.config, len(sample.prompt), key, eos, banned)
        self.acceptance_B[row] = drafts.PRIOR
        self.ids_BS[row] = 0
        self.ids_BS[row, : len(sample.prompt)] = sample.prompt

    def share(self) -> list[Warm]:
        """Returns the shared prefixes in use, and writes their indices to the layout.

        The longest prefix comes first: another order would be another program.
        """
        used = {id(warm): warm for warm in self.shared if warm is not None}
        prefixes = sorted(used.values(), key=lambda warm: warm.shared_size, reverse=True)
        indices = {id(warm): index for index, warm in enumerate(prefixes)}
        self.layout.shared_B[:] = [indices.get(id(warm), 0) for warm in self.shared]
        return prefixes

    def can_share(self, warm: Warm, most: int) -> bool:
        """Checks whether a row may use a prefix without exceeding `most` shared ones."""
        used = {id(other) for other in self.shared if other is not None}
        return len(used | {id(warm)}) <= most

    def layout_of(self, rows: Sequence[int]) -> Layout:
        """Returns the layout of some rows that have the same shared prefix, or none: a copy,
        because programs run while it changes."""
        layout: Layout = jax.tree.map(lambda x: x[list(rows)], self.layout)
        return dataclasses.replace(layout, shared_B=np.zeros(len(rows), np.int32))

    @property
    def unread(self) -> Mapping[int, Sample]:
        """The rows whose prompts are not read, in the order of their admission."""
        samples = {row: self.rows[row] for row in self._reading}
        return {row: sample for row, sample in samples.items() if sample is not None}

    def read(self, row: int, count: int) -> None:
        """Records that tokens of a prompt are in the cache."""
        sample = self.rows[row]
        assert sample is not None
        sample.unread -= count
        self.layout.length_B[row] += count
        if not sample.unread:
            self._reading.remove(row)

    def append(self, row: int, ids: Sequence[int]) -> None:
        """Records generated tokens."""
        first = self.layout.length_B[row] - self.layout.slots_B[row] + 1
        self.ids_BS[row, first : first + len(ids)] = ids
        self.layout.length_B[row] += len(ids)

    def release(self, row: int) -> None:
        """Frees a row."""
        self.rows[row] = self.shared[row] = None
        self.layout.shared_slots_B[row] = 0
        del self._columns[row]
        if row in self._reading:
            self._reading.remove(row)

    def cancel(self, handle: Handle) -> None:
        """Removes all continuations of a request."""
        self.queue = deque(sample for sample in self.queue if sample.handle is not handle)
        for row, sample in enumerate(self.rows):
            if sample is not None and sample.handle is handle:
                self.release(row)

    def resize(self, width: int) -> None:
        """Changes the number of columns of `ids_BS`."""
        old_BS = self.ids_BS
        self.ids_BS = np.zeros((len(self.rows), width), np.int32)
        kept = min(width, old_BS.shape[1])
        self.ids_BS[:, :kept] = old_BS[:, :kept]
