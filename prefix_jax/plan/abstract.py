"""A run without weights and data: the shapes and shardings of its arrays."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from prefix_jax.backbones.architecture import Architecture
from prefix_jax.backbones.backbone import Backbone
from prefix_jax.backbones.loading.config import architecture
from prefix_jax.backbones.loading.pretrained import architecture_of
from prefix_jax.backbones.loading.quantized import abstract_params
from prefix_jax.config import Config
from prefix_jax.data.batch import Batch, Source
from prefix_jax.errors import ConfigError
from prefix_jax.mesh import check_rows, replicated, rows_sharding, weight_shardings
from prefix_jax.methods import make_method
from prefix_jax.model import Params, PrefixModel
from prefix_jax.nn.attention.mask import TokenLayout
from prefix_jax.plan.presets import PREFIX, preset
from prefix_jax.tasks import check_task, make_task
from prefix_jax.train.partition import check_trainable

Job = Literal["train", "decode"]

# Default row length, if the config sets none and the model's positions allow more.
_USUAL_TOKENS = 2048
# Minimum columns per device if several devices share a row: fewer are not worth the exchange.
_SHARE = 1024


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The shape of one step's batch, over all devices.

    Attributes:
        rows: B.
        tokens: T per row; for an encoder-decoder, the decoder's.
        targets: M per row.
        source: S, the encoder tokens per row; 0 for a single stack.
        micro: the number of micro-batches.
    """

    rows: int
    tokens: int
    targets: int
    source: int = 0
    micro: int = 1

    def worth_sharing(self, devices: int) -> bool:
        """Whether a row is long enough for this many devices to share its columns."""
        return max(self.tokens, self.source) >= _SHARE * devices


@dataclasses.dataclass(frozen=True)
class AbstractRun:
    """The shapes that a config describes.

    Attributes:
        config: the run.
        model: backbone, method and head.
        dtype: dtype of the weights, and of the scales of quantised weights.
        job: "train" or "decode".
    """

    config: Config
    model: PrefixModel
    dtype: str
    job: Job = "train"

    @classmethod
    def of(cls, config: Config, job: Job = "train") -> AbstractRun:
        """Reads the shape of the model, but neither its weights nor the data.

        Raises:
            PrefixJaxError: there is no such model, or the config does not fit it.
        """
        arch = read_architecture(config.model.path)
        method = make_method(config.method)
        if method is not None and config.data.dataset is not None and not method.dataset_names:
            raise ConfigError(
                "data.dataset: a plan reads no data; name the datasets, as in "
                "method.datasets=[a, b]"
            )
        check_trainable(method is None, config.model.quantize)
        task = make_task(config.data, config.task)
        check_task(task, arch, method, config.evaluate, config.optim.head_learning_rate)
        dtype = config.model.dtype
        if dtype == "auto":
            # As in `load` on a TPU; trained parameters are float32.
            dtype = "bfloat16" if method is not None else "float32"
        # Without labels in the config, their number depends on the data: a head has at least two.
        model = PrefixModel(Backbone(arch, config.model.remat), method, task)
        model.check_context(config.data.max_length)
        if job == "decode":
            _check_decoding(model)
        return cls(config, model, dtype, job=job)

    def with_model(self, **fields: Any) -> AbstractRun:
        """Returns a copy with changed settings in the `model` section."""
        model = dataclasses.replace(self.config.model, **fields)
        return AbstractRun.of(dataclasses.replace(self.config, model=model), self.job)

    def batch_shape(self, tokens: int | None = None, targets: int | None = None) -> BatchShape:
        """The batch of a step: one example of maximum length per row, every token a target.

        Packing reduces the number of rows, by an amount that depends on the data.

        Args:
            tokens: T (S for an encoder-decoder); None for `data.max_length`, or else the smaller of
                2,048 and what the model's positions allow.
            targets: M (also T for an encoder-decoder); None for all tokens, or the number that the
                task of a head has.

        Raises:
            ConfigError: `tokens` or `targets` do not fit the model.
        """
        model, data = self.model, self.config.data
        room = model.room
        if tokens is None:
            tokens = data.max_length or min(_USUAL_TOKENS, room)
        if not 2 <= tokens <= room:
            raise ConfigError(
                f"--tokens {tokens}: must be at least 2 and at most {room}, the model's positions "
                "after the prefix"
            )
        if targets is not None and self.job == "decode":
            raise ConfigError(f"--targets {targets}: decoding has no targets; remove it")
        two_sided = model.encoder_decoder
        most = tokens if two_sided is None else two_sided.max_target
        if targets is None:
            targets = min(tokens, most) if model.task.dense else 1
        if not 1 <= targets <= most:
            raise ConfigError(f"--targets {targets}: must be at least 1 and at most {most:,}")
        count, micro = (
            data.batch_size,
            self.config.optim.grad_accum_steps if self.job == "train" else 1,
        )
        if two_sided is None:
            return BatchShape(count, tokens, targets, 0, micro)
        return BatchShape(count, targets, targets, tokens, micro)

    def params(self, mesh: Mesh) -> Params:
        """Abstract {"backbone": …, "prefix": …, "head": …}, sharded as in training."""
        model, backbone = self.model, self.model.backbone
        weights = abstract_params(backbone, self.dtype, self.config.model.quantize)
        params: dict[str, Any] = {"backbone": placed(weights, weight_shardings(weights, mesh))}
        if (method := model.method) is not None:
            init = jax.eval_shape(lambda: method.init(jax.random.key(0), backbone.geometry, None))
            params["prefix"] = everywhere(init, mesh)
        if (head := model.head) is not None:
            init = jax.eval_shape(lambda: head.init(jax.random.key(0), backbone.arch.d_model))
            params["head"] = everywhere(init, mesh)
        return params

    def batch(self, shape: BatchShape, mesh: Mesh) -> Batch:
        """The abstract batch of a step, with rows over the batch axes.

        Raises:
            MeshError: the rows do not divide over the mesh.
        """
        count = shape.rows // shape.micro
        check_rows(mesh, count, "data.batch_size" if shape.micro == 1 else "a micro-batch of")
        head, arch = self.model.head, self.model.backbone.arch

        def of(size: int, dtype: Any = jnp.int32) -> Any:
            return jax.ShapeDtypeStruct(
                (shape.micro, count, size), dtype, sharding=rows_sharding(mesh, 3, leading=1)
            )

        def layout(size: int) -> TokenLayout:
            branches = self.config.data.group_by_source
            segments = arch.token_types > 0 and head is not None
            banked = self.model.method is not None and bool(self.model.method.dataset_names)
            return TokenLayout(
                of(size),
                of(size) if branches else None,
                of(size),
                of(size) if segments else None,
                of(size) if banked else None,
            )

        M = shape.targets
        examples: Any = jax.ShapeDtypeStruct((shape.micro,), jnp.float32, sharding=replicated(mesh))
        task = self.model.task
        return Batch(
            ids_BT=of(shape.tokens),
            layout=layout(shape.tokens),
            index_BM=of(M),
            label_BM=of(M, task.label_dtype),
            weight_BM=of(M, jnp.float32),
            examples=examples,
            source=Source(of(shape.source), layout(shape.source)) if shape.source else None,
            question_BM=of(M) if task.candidates else None,
        )


def read_architecture(source: str) -> Architecture:
    """Reads the architecture of a preset, or of anything that `load` accepts. Only the
    configuration of the model is needed.

    Raises:
        BackboneError: the model does not exist or is not supported.
    """
    if source.startswith(PREFIX):
        return architecture(preset(source), source)
    return architecture_of(source)


def _check_decoding(model: PrefixModel) -> None:
    if model.head is not None or not model.backbone.arch.causal:
        raise ConfigError(
            "--for decode: a task with labels runs in one pass and generates no text; plan its "
            "training step instead"
        )
    if model.method is not None and model.method.dataset_names:
        raise ConfigError(
            "--for decode: not supported for several datasets (method.datasets), as text is "
            "generated with the prefix of one; plan its training step instead"
        )


def placed(shapes: Any, shardings: Any) -> Any:
    """Adds shardings to abstract arrays."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def everywhere(shapes: Any, mesh: Mesh) -> Any:
    """Marks abstract arrays as replicated on every device."""
    return placed(shapes, jax.tree.map(lambda _: replicated(mesh), shapes))
