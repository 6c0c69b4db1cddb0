"""Multitask prompt tuning: a shared prompt times a low-rank task prompt (Wang et al. 2023)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from prefix_jax.errors import ConfigError, PrefixError
from prefix_jax.methods.base import Method, Params
from prefix_jax.prefix import Embeds, Geometry
from prefix_jax.untrusted.names import check_storable_names
from prefix_jax.untrusted.paths import expand
from prefix_jax.untrusted.safetensors import read_tensors
from prefix_jax.validation import Count, Width, renamed

# The arrays of a source, named as in PEFT's MULTITASK_PROMPT_TUNING: (P, D), (tasks, P, ranks) and
# (tasks, ranks, D).
_SHARED, _COLS, _ROWS = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"
# The file in a run directory that holds them.
PARTS = "multitask.safetensors"


@renamed(tasks="datasets")
@dataclasses.dataclass(frozen=True)
class MultitaskPromptTuning(Method[Embeds]):
    """Trains the prompt of a task: the elementwise product shared (P, D) * (cols (P, R) @
    rows (R, D)).

    In the first stage of the paper, several source tasks, which are datasets here, are trained
    together: they share one prompt, and each has its own cols and rows. In the second stage, a
    target task starts from the result (`source`). The stored prefix of a dataset is the product.
    The paper's first stage also distils teacher prompts trained separately on each source task;
    like PEFT, this implementation does not.

    Attributes:
        ranks: R, the rank of the task part (1 in the paper).
        datasets: the datasets trained together, as named in the field `data.dataset` of the
            records; None for all datasets in the training examples, sorted. Without
            `data.dataset`, one prompt is trained.
        source: a multitask prompt in PEFT's format: a run that trained several datasets, or
            adapter_model.safetensors or its directory; None starts according to `init`.
        source_init: the task part starts from the "average" of the source tasks' cols and rows
            (PEFT's AVERAGE_SOURCE_TASKS), from those of `source_task` ("exact",
            EXACT_SOURCE_TASK), or at random ("shared", ONLY_SOURCE_SHARED).
        source_task: the source task for "exact", counted from 0.
    """

    ranks: Width = 1
    datasets: tuple[str, ...] | None = None
    source: str | None = None
    source_init: Literal["average", "exact", "shared"] = "average"
    source_task: Count = 0

    produces = Embeds
    default_start = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.datasets is not None:
            self._check_datasets(self.datasets)

    def _check_datasets(self, datasets: tuple[str, ...]) -> None:
        if not datasets:
            raise ConfigError(
                "method.datasets is empty; name the datasets, or omit it to use those of the "
                "training examples"
            )
        # The prefix of each dataset is stored in a directory of this name.
        check_storable_names(datasets, "the names of method.datasets or data.dataset", ConfigError)
        if self.source is not None:
            raise ConfigError(
                "method.source can initialise only one prompt, got several datasets "
                "(data.dataset); remove it, or train the datasets one by one"
            )

    @property
    def dataset_names(self) -> tuple[str, ...]:
        """The datasets with one prompt each, in the order of the bank."""
        return self.datasets or ()

    def init(self, rng: jax.Array, geometry: Geometry, start: Embeds | None) -> Params:
        """Initialises the parameters; without start and source, at random as PEFT does.

        Raises:
            ConfigError: there are both a source and another start, or the source has no such task.
            PrefixError: the source is not a multitask prompt, or has another shape.
        """
        P, D, R = self.length, geometry.input_dim, self.ranks
        # Parameter names end in their axes; several datasets add the axis A.
        (A, task) = ((), "") if self.datasets is None else ((len(self.datasets),), "A")
        cols, rows = f"cols_{task}PR", f"rows_{task}RD"
        shared_rng, cols_rng, rows_rng = jax.random.split(rng, 3)
        params = {
            "shared_PD": jax.random.normal(shared_rng, (P, D)),
            cols: 0.02 * jax.random.normal(cols_rng, (*A, P, R)),
            rows: 0.02 * jax.random.normal(rows_rng, (*A, R, D)),
        }
        if start is not None and self.source is not None:
            raise ConfigError(
                "method.source already initialises the prompt; remove init.start, or set it to "
                "random"
            )
        if start is not None:
            # The task part is 1 everywhere, so that the product equals the start: the first rank
            # holds the ones, and the columns of the other ranks start at zero.
            params["shared_PD"] = start.x_PD
            params[cols] = jnp.zeros((*A, P, R)).at[..., 0].set(1)
            params[rows] = params[rows].at[..., 0, :].set(1)
        return params if self.source is None else params | self._from_source(P, D)

    def _from_source(self, length: int, d_model: int) -> dict[str, jax.Array]:
        path = expand(str(self.source), PrefixError)
        if path.is_dir():
            parts = path / PARTS
            path = parts if parts.is_file() else path / "adapter_model.safetensors"
        arrays = read_parts(path)
        shapes = tuple(arrays[name].shape for name in (_SHARED, _COLS, _ROWS))
        tasks = shapes[1][0]
        P, D, R = length, d_model, self.ranks
        expected = ((P, D), (tasks, P, R), (tasks, R, D))
        if shapes != expected:
            raise PrefixError(
                f"method.source {path} has arrays of shapes {shapes}; expected {expected} for {P} "
                f"slots of width {D} and {R} ranks"
            )
        shared_PD, cols_APR, rows_ARD = (jnp.float32(arrays[n]) for n in (_SHARED, _COLS, _ROWS))
        params = {"shared_PD": shared_PD}
        if self.source_init == "exact":
            if self.source_task >= tasks:
                raise ConfigError(
                    f"method.source_task is {self.source_task}; {path} has tasks 0 to {tasks - 1}"
                )
            params["cols_PR"] = cols_APR[self.source_task]
            params["rows_RD"] = rows_ARD[self.source_task]
        elif self.source_init == "average":
            params["cols_PR"], params["rows_RD"] = cols_APR.mean(0), rows_ARD.mean(0)
        return params

    def __call__(self, params: Params, rng: jax.Array | None = None) -> Embeds:
        if self.datasets is None:
            task_PD = params["cols_PR"] @ params["rows_RD"]
            return Embeds(self.drop(params["shared_PD"] * task_PD, rng))
        task_APD = params["cols_APR"] @ params["rows_ARD"]
        x_APD = self.drop(params["shared_PD"] * task_APD, rng)
        return Embeds(x_APD.reshape(-1, x_APD.shape[-1]), bank_size=len(self.datasets))


def read_parts(path: Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a multitask prompt in PEFT's format.

    Raises:
        PrefixError: the file is not a multitask prompt.
    """
    arrays = read_tensors(path, PrefixError)
    if missing := {_SHARED, _COLS, _ROWS} - arrays.keys():
        raise PrefixError(f"{path} is not a multitask prompt: {', '.join(sorted(missing))} missing")
    shared, cols, rows = (arrays[name].shape for name in (_SHARED, _COLS, _ROWS))
    tasks, ranks = (cols[0], cols[-1]) if len(cols) == 3 else (0, 0)
    if len(shared) != 2 or cols != (tasks, shared[0], ranks) or rows != (tasks, ranks, shared[1]):
        raise PrefixError(
            f"{path}: {_SHARED}, {_COLS} and {_ROWS} have shapes {shared}, {cols} and {rows}; "
            "expected (P, D), (tasks, P, ranks) and (tasks, ranks, D)"
        )
    if broken := sorted(name for name, x in arrays.items() if not np.isfinite(x).all()):
        raise PrefixError(f"{path}: {', '.join(broken)} holds NaN or infinite values")
    return arrays


def to_parts(params: Params) -> dict[str, np.ndarray]:
    """Converts the parameters of several datasets to PEFT's format, which `source` reads."""
    names = {_SHARED: "shared_PD", _COLS: "cols_APR", _ROWS: "rows_ARD"}
    return {theirs: np.array(params[ours], np.float32, order="C") for theirs, ours in names.items()}
