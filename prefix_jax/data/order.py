"""Which examples a step holds, from the seed and the step alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from prefix_jax.errors import ConfigError


class Order:
    """An endless shuffled order of examples, one permutation an epoch, cut into steps.

    Step s holds places [s·N, (s+1)·N) of the order, so that the last step of an epoch runs on into
    the next one and every step has N examples.
    """

    def __init__(
        self, count: int, batch_size: int, *, seed: int = 0, groups: Sequence[int] | None = None
    ):
        """An order of `count` examples.

        Args:
            count: the number of examples.
            batch_size: N, examples in a step.
            seed: of the permutations.
            groups: one number an example; examples of equal number stay adjacent, while the groups
                and the examples within each are shuffled. None shuffles all alike.

        Raises:
            ConfigError: the count or the batch size is not positive.
        """
        if count < 1 or batch_size < 1:
            raise ConfigError(
                f"{count} examples in batches of {batch_size}: both must be at least 1"
            )
        self.count = count
        self.batch_size = batch_size
        self._seed = seed
        self._groups = None if groups is None else np.unique(groups, return_inverse=True)[1]
        # A pure function: remembering its values changes none of them. Steps of two epochs meet
        # at their border.
        self._epoch = functools.lru_cache(maxsize=4)(self._permutation)

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every example was seen."""
        return math.ceil(self.count / self.batch_size)

    def step(self, step: int) -> np.ndarray:
        """The examples of a step, int [N]."""
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
