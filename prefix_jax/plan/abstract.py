"""A run without weights and data: all of its shapes, and where they would lie."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from prefix_jax.backbones.architecture import Architecture
from prefix_jax.backbones.backbone import Backbone
from prefix_jax.backbones.load import architecture, architecture_of
from prefix_jax.backbones.quantized import abstract_params
from prefix_jax.config import Config
from prefix_jax.data.batch import Batch, Source
from prefix_jax.errors import ConfigError
from prefix_jax.mesh import check_rows, replicated, rows_sharding, weight_shardings
from prefix_jax.methods import make_method
from prefix_jax.model import Params, PrefixModel
from prefix_jax.nn.mask import Tokens
from prefix_jax.plan.presets import PREFIX, preset
from prefix_jax.train.setup import check_quantized
from prefix_jax.train.task import check_task, head_of

Job = Literal["train", "decode"]

# Of a model whose positions allow more, and a config that does not say.
_USUAL_TOKENS = 2048
# Columns that a device has at least where several share a row: fewer are not worth the exchange.
_SHARE = 1024


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of one step, on all devices together.

    Attributes:
        rows: B.
        tokens: T of each row; of an encoder-decoder, of the decoder.
        targets: M of each row.
        source: S, what an encoder reads of each row; 0 for a single stack.
        micro: micro-batches that they come in.
    """

    rows: int
    tokens: int
    targets: int
    source: int = 0
    micro: int = 1

    def worth_sharing(self, devices: int) -> bool:
        """Whether a row is so long that so many devices may share its columns."""
        return max(self.tokens, self.source) >= _SHARE * devices


@dataclasses.dataclass(frozen=True)
class AbstractRun:
    """What a config describes, as far as shapes go.

    Attributes:
        config: the run.
        model: backbone, method and head.
        dtype: of the weights, and of the scales of quantised ones.
        job: "train" or "decode".
    """

    config: Config
    model: PrefixModel
    dtype: str
    job: Job = "train"

    @classmethod
    def of(cls, config: Config, job: Job = "train") -> AbstractRun:
        """Reads the shape of the model; neither its weights nor the data.

        Raises:
            PrefixJaxError: there is no such model, or something in the config contradicts it.
        """
        arch = read_architecture(config.model.path)
        method = make_method(config.method)
        if method is not None and config.data.task is not None and not method.task_names:
            raise ConfigError(
                "data.task: a plan reads no data, so name the tasks: method.tasks=[a, b]"
            )
        check_quantized(config, full=method is None)
        check_task(config, arch, config.model.path)
        dtype = config.model.dtype
        if dtype == "auto":
            # As `load` has it on a TPU; what trains is float32.
            dtype = "bfloat16" if method is not None else "float32"
        model = PrefixModel(Backbone(arch, config.model.remat), method)
        if config.task.name != "generate":
            # The data tells how many labels there are, where the config does not: two at least.
            head = head_of(config.task, arch, len(config.task.labels or ("", "")))
            model = dataclasses.replace(model, head=head)
        model.check_context(config.data.max_length)
        if job == "decode":
            _check_decoding(model)
        return cls(config, model, dtype, job=job)

    def with_model(self, **fields: Any) -> AbstractRun:
        """The same with other settings of `model`."""
        model = dataclasses.replace(self.config.model, **fields)
        return AbstractRun.of(dataclasses.replace(self.config, model=model), self.job)

    def rows(self, tokens: int | None = None, targets: int | None = None) -> Rows:
        """The rows of a step: an example a row, each as long as it may be, learnt as a whole.

        How many rows packing makes of the examples is known to the data alone: fewer, at most as
        many.

        Args:
            tokens: T (of an encoder-decoder, S); None takes `data.max_length`, or 2,048, or what
                the model's positions allow.
            targets: M (of an encoder-decoder, T as well); None takes all of them, and for a head
                what its task has.

        Raises:
            ConfigError: these do not fit the model.
        """
        model, data = self.model, self.config.data
        room = model.room
        if tokens is None:
            tokens = data.max_length or min(_USUAL_TOKENS, room)
        if not 2 <= tokens <= room:
            raise ConfigError(
                f"--tokens {tokens}: a row has 2 tokens at least, and {room} fit the model's "
                "positions beside the prefix"
            )
        if targets is not None and self.job == "decode":
            raise ConfigError(f"--targets {targets}: nothing is learnt in decoding; leave it out")
        two_sided = model.encoder_decoder
        most = tokens if two_sided is None else two_sided.max_target
        if targets is None:
            all_of_them = self.config.task.name in ("generate", "tag", "span")
            targets = min(tokens, most) if all_of_them else 1
        if not 1 <= targets <= most:
            raise ConfigError(f"--targets {targets}: a row has 1 at least, and {most:,} at most")
        count, micro = data.batch_size, self.config.optim.accumulate if self.job == "train" else 1
        if two_sided is None:
            return Rows(count, tokens, targets, 0, micro)
        return Rows(count, targets, targets, tokens, micro)

    def params(self, mesh: Mesh) -> Params:
        """{"backbone": …, "prefix": …, "head": …}, abstract, placed as training places them."""
        model, backbone = self.model, self.model.backbone
        weights = abstract_params(backbone, self.dtype, self.config.model.quantize)
        made: dict[str, Any] = {"backbone": placed(weights, weight_shardings(weights, mesh))}
        if (method := model.method) is not None:
            init = jax.eval_shape(lambda: method.init(jax.random.key(0), backbone.geometry, None))
            made["prefix"] = everywhere(init, mesh)
        if (head := model.head) is not None:
            init = jax.eval_shape(lambda: head.init(jax.random.key(0), backbone.arch.d_model))
            made["head"] = everywhere(init, mesh)
        return made

    def batch(self, rows: Rows, mesh: Mesh) -> Batch:
        """The batch of a step, abstract, rows over the batch axes.

        Raises:
            MeshError: its rows do not divide over the mesh.
        """
        count = rows.rows // rows.micro
        check_rows(mesh, count, "data.batch_size" if rows.micro == 1 else "a micro-batch of")
        head, arch = self.model.head, self.model.backbone.arch

        def of(size: int, dtype: Any = jnp.int32) -> Any:
            return jax.ShapeDtypeStruct(
                (rows.micro, count, size), dtype, sharding=rows_sharding(mesh, 3, leading=1)
            )

        def tokens(size: int) -> Tokens:
            branches = self.config.data.group_by_source
            segments = arch.segments > 0 and head is not None
            tasks = self.model.method is not None and bool(self.model.method.task_names)
            return Tokens(
                of(size),
                of(size) if branches else None,
                of(size),
                of(size) if segments else None,
                of(size) if tasks else None,
            )

        M = rows.targets
        examples: Any = jax.ShapeDtypeStruct((rows.micro,), jnp.float32, sharding=replicated(mesh))
        regress = head is not None and head.kind == "regress"
        candidates = head is not None and head.kind in ("span", "choice")
        return Batch(
            ids_BT=of(rows.tokens),
            tokens=tokens(rows.tokens),
            index_BM=of(M),
            label_BM=of(M, jnp.float32 if regress else jnp.int32),
            weight_BM=of(M, jnp.float32),
            examples=examples,
            source=Source(of(rows.source), tokens(rows.source)) if rows.source else None,
            question_BM=of(M) if candidates else None,
        )


def read_architecture(source: str) -> Architecture:
    """The shape of a model: of a preset, or of anything that `load` reads, of which the
    configuration will do.

    Raises:
        BackboneError: there is no such thing, or it is not supported.
    """
    if source.startswith(PREFIX):
        return architecture(preset(source), source)
    return architecture_of(source)


def _check_decoding(model: PrefixModel) -> None:
    if model.head is not None or not model.backbone.arch.causal:
        raise ConfigError(
            "--for decode: a task with labels answers in one pass and writes no text; plan its "
            "training step"
        )
    if model.method is not None and model.method.task_names:
        raise ConfigError("--for decode: text is written behind the prefix of one task")


def placed(shapes: Any, shardings: Any) -> Any:
    """Abstract arrays with a sharding each."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def everywhere(shapes: Any, mesh: Mesh) -> Any:
    """Abstract arrays that are whole on every device."""
    return placed(shapes, jax.tree.map(lambda _: replicated(mesh), shapes))
