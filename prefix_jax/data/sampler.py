"""Selects the examples of each step as a pure function of the seed and the step."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from prefix_jax.errors import ConfigError


class EpochSampler:
    """An endless shuffled order of examples, one permutation per epoch, split into steps.

    Step s has positions [s·N, (s+1)·N) of the order. The last step of an epoch therefore continues
    into the next epoch, and every step has N examples.
    """

    def __init__(
        self, count: int, batch_size: int, *, seed: int = 0, groups: Sequence[int] | None = None
    ):
        """Creates a sampler.

        Args:
            count: the number of examples.
            batch_size: the number of examples N per step.
            seed: the seed of the permutations.
            groups: one group number per example. Examples of one group stay adjacent; the groups,
                and the examples within each group, are shuffled. None shuffles without groups.

        Raises:
            ConfigError: the count or the batch size is not positive.
        """
        if count < 1 or batch_size < 1:
            raise ConfigError(
                f"examples and batch_size must be at least 1, got {count} and {batch_size}"
            )
        self.count = count
        self.batch_size = batch_size
        self._seed = seed
        self._groups = None if groups is None else np.unique(groups, return_inverse=True)[1]
        # The function is pure, so caching is safe. A step at an epoch boundary needs two epochs.
        self._epoch = functools.lru_cache(maxsize=4)(self._permutation)

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps until every example has been seen."""
        return math.ceil(self.count / self.batch_size)

    def step(self, step: int) -> np.ndarray:
        """Returns the indices of a step's examples, int [N]."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, within = np.divmod(places, self.count)
        return np.array([self._epoch(int(e))[i] for e, i in zip(epochs, within, strict=True)])

    def _permutation(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(self.count)
        if self._groups is None:
            return order
        rank = rng.permutation(int(self._groups.max()) + 1)
        return order[np.argsort(rank[self._groups[order]], kind="stable")]
