"""Memory and time of a step on any TPU, from the TPU compiler, without the TPU."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from prefix_jax.backbones.architecture import Architecture
from prefix_jax.config import Config
from prefix_jax.model import Params
from prefix_jax.nn.quantized import Quantize
from prefix_jax.plan.abstract import AbstractRun, BatchShape, Job
from prefix_jax.plan.decode import lower_step
from prefix_jax.plan.floor import Floor, floor
from prefix_jax.plan.hlo import parse
from prefix_jax.plan.roofline import Roofline, roofline
from prefix_jax.plan.topology import OutOfMemory, Topology
from prefix_jax.prefix import Produced
from prefix_jax.train.program import make_program
from prefix_jax.train.step import abstract_state


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        weights: the frozen backbone and the trainable parameters.
        arguments: all arguments of the step: weights, optimizer state and batch.
        temporaries: peak memory in addition to the arguments.
        total: arguments and temporaries together.
        limit: the memory that the compiler allows a program.
    """

    weights: int
    arguments: int
    temporaries: int
    total: int
    limit: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory and minimum time of a step.

    Attributes:
        model: the model, as in the config.
        method: the name of the method.
        quantize: quantisation of the weights.
        topology: the chips.
        chips, devices: how many there are; some chips are two devices.
        mesh: the mesh axis sizes.
        job: "train" or "decode".
        batch: the shape of the step's batch.
        needs: bytes that one device needs in total, according to the compiler.
        limit: bytes available on one device.
        memory: memory of one device; None if the step does not fit.
        floor: minimum operations of the step, over all devices; None if there is no formula.
        roofline: minimum time of the step; None if it does not fit.
        compile_seconds: compilation time.
    """

    model: str
    method: str
    quantize: Quantize
    topology: str
    chips: int
    devices: int
    mesh: Mapping[str, int]
    job: Job
    batch: BatchShape
    needs: int
    limit: int
    memory: Memory | None
    floor: int | None
    roofline: Roofline | None
    compile_seconds: float

    @property
    def fits(self) -> bool:
        """Whether the step fits in the memory of a device."""
        return self.memory is not None

    @property
    def over(self) -> int:
        """Bytes over the per-device limit; 0 if the step fits."""
        return 0 if self.fits else self.needs - self.limit

    @property
    def tokens_per_second(self) -> float | None:
        """Upper bound of the tokens per second that all devices process (generate, in decoding)."""
        if self.roofline is None:
            return None
        shape = self.batch
        each = shape.tokens + shape.source if self.job == "train" else 1
        return shape.rows * each / self.roofline.seconds


def plan(
    config: Config,
    topology: Topology | str,
    *,
    tokens: int | None = None,
    targets: int | None = None,
    job: Job = "train",
) -> Plan:
    """Compiles a step of a config for a topology, with abstract weights.

    Args:
        config: the run. Neither its weights nor its data are read.
        topology: for example "v5e:4x4".
        tokens, targets: per row, see `AbstractRun.batch_shape`.
        job: plan a training step or a decoding step.

    Raises:
        PrefixJaxError: the config is inconsistent or does not fit the topology, or the TPU compiler
            is not installed. Running out of memory is not an error.
    """
    topology = Topology.parse(topology) if isinstance(topology, str) else topology
    run = AbstractRun.of(config, job)
    shape = run.batch_shape(tokens, targets)
    return compile_step(run, shape, topology, topology.mesh(config.mesh.sizes))


def compile_step(run: AbstractRun, shape: BatchShape, topology: Topology, mesh: Mesh) -> Plan:
    """Compiles one step on one mesh.

    Raises:
        MeshError: the rows do not divide over the mesh.
    """
    arch = run.model.backbone.arch
    begin = time.perf_counter()
    lowered, params = _lower(run, shape, mesh)
    compiled, out_of_memory = None, None
    try:
        with _nothing_kept():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        out_of_memory = OutOfMemory.parse(str(error))
        if out_of_memory is None:
            raise
    took = time.perf_counter() - begin
    limit = topology.hbm_limit
    memory, minimum, needs = None, None, 0
    if compiled is not None:
        memory = _memory(compiled, params, limit)
        needs = memory.total
        text = compiled.as_text()
        assert text is not None  # always available from the TPU compiler
        minimum = roofline(
            parse(text),
            topology,
            list(mesh.devices.flat),
            # Encoders are not causal, so all tiles count in encoder-decoders.
            causal=arch.causal and arch.encoder is None,
        )
    elif out_of_memory is not None:
        needs = out_of_memory.used
    return Plan(
        model=run.config.model.path,
        method=str(run.config.method["name"]),
        quantize=run.config.model.quantize,
        topology=str(topology),
        chips=topology.chips,
        devices=mesh.size,
        mesh=dict(mesh.shape),
        job=run.job,
        batch=shape,
        needs=needs,
        limit=limit,
        memory=memory,
        floor=_floor(run, shape),
        roofline=minimum,
        compile_seconds=took,
    )


@contextlib.contextmanager
def _nothing_kept() -> Iterator[None]:
    """Disables the persistent compilation cache, from which JAX cannot load TPU programs without a
    TPU."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[name]
    jax.config.update(name, float("inf"))
    try:
        yield
    finally:
        jax.config.update(name, before)


def _lower(run: AbstractRun, shape: BatchShape, mesh: Mesh) -> tuple[jax.stages.Lowered, Params]:
    """Lowers the step. Also returns its abstract parameters."""
    if run.job == "decode":
        return lower_step(run, shape.rows, max(shape.tokens, shape.source), mesh)
    params, batch = run.params(mesh), run.batch(shape, mesh)
    config = run.config
    program = make_program(
        run.model,
        params,
        config.optim,
        steps=1,
        mesh=mesh,
        reduction=config.data.reduction,
        seed=config.train.seed,
        init=abstract_state,
    )
    with jax.set_mesh(mesh):
        return program.step.lower(program.state, program.frozen, batch), params


def _memory(compiled: jax.stages.Compiled, params: Any, limit: int) -> Memory:
    stats = compiled.memory_analysis()
    assert stats is not None  # always available from the TPU compiler
    # The compiler compares peak memory with the limit. The temporaries that it reports sum to more:
    # in steps that fit, up to a third over the limit.
    total = stats.peak_memory_in_bytes + stats.generated_code_size_in_bytes
    arguments = stats.argument_size_in_bytes
    return Memory(bytes_on_one(params), arguments, total - arguments, total, limit)


def bytes_on_one(tree: Any) -> int:
    """Bytes of abstract arrays on one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * jax.dtypes.itemsize_bits(leaf.dtype) // 8
    return total


def _floor(run: AbstractRun, shape: BatchShape) -> int | None:
    """Minimum operations of a training step; None for decoding, full fine-tuning and heads."""
    model = run.model
    method, arch = model.method, model.backbone.arch
    if run.job == "decode" or method is None or model.head is not None:
        return None
    produced: Produced = jax.eval_shape(
        lambda: method(method.init(jax.random.key(0), arch.geometry, None))
    )
    return floor_of(arch, shape, produced).total


def floor_of(arch: Architecture, shape: BatchShape, produced: Produced | None) -> Floor:
    """Minimum operations of a training step with this batch shape."""
    return floor(
        arch,
        rows=shape.rows,
        tokens=shape.tokens,
        targets=shape.targets,
        produced=produced,
        source=shape.source,
    )
