"""Regression: a number for a text, or for a pair of texts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from prefix_jax.data.batch import Batch, Example
from prefix_jax.data.source import Record, shown
from prefix_jax.errors import DataError
from prefix_jax.nn.head import Head
from prefix_jax.nn.loss import squared_errors
from prefix_jax.tasks import metrics as scorers
from prefix_jax.tasks.base import Prediction
from prefix_jax.tasks.heads import SequenceTask, predict
from prefix_jax.tasks.metrics import Metric, head_metrics

if TYPE_CHECKING:
    from prefix_jax.backbones.architecture import Architecture


@dataclasses.dataclass(frozen=True)
class Regress(SequenceTask):
    """Predicts a number for a text, or for a pair of texts."""

    label_dtype: ClassVar[type[np.generic]] = np.float32

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return head_metrics(pearson=scorers.pearson, spearman=scorers.spearman)

    def head(self, architecture: Architecture) -> Head:
        """One value."""
        return self.head_of(architecture, 1)

    def answer(self, record: Record) -> tuple[float, str]:
        number = number_of(record, self.label, record.value(self.label))
        return number, str(number)

    def losses(self, out_BMY: jax.Array, batch: Batch) -> jax.Array:
        """Squared error."""
        error_BM = squared_errors(out_BMY[..., 0], batch.label_BM)
        return jnp.sum(error_BM * batch.weight_BM, axis=1)

    def predictions(
        self, examples: Sequence[Example], outputs: Sequence[np.ndarray]
    ) -> list[Prediction]:
        values = [float(out_MY[0, 0]) for out_MY in outputs]
        return [
            predict(example, f"{value:.6g}", value, float(example.label_M[0]))
            for example, value in zip(examples, values, strict=True)
        ]


def number_of(record: Record, field: str, value: object) -> float:
    """Returns a value as a number that is finite in float32.

    Args:
        record: its record, for messages.
        field: its field, for messages.
        value: a number, or a text that spells one.

    Raises:
        DataError: it is not a number, or not finite.
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    except OverflowError:
        number = math.inf
    if number != number:
        raise DataError(f"{record.origin}: field {field!r} must be a number, got {shown(value)}")
    if not abs(number) <= float(np.finfo(np.float32).max):
        raise DataError(
            f"{record.origin}: field {field!r} must be finite in float32, got {shown(value)}"
        )
    return number
