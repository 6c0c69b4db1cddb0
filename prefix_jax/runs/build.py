"""From a config to everything that a training run needs."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from prefix_jax.backbones.loading.pretrained import Pretrained, load
from prefix_jax.backbones.stacking import Params
from prefix_jax.config import Config, TaskConfig
from prefix_jax.data.pipeline import Pipeline, load_examples
from prefix_jax.data.prepare import prepare as prepare_records
from prefix_jax.data.source import Record, read_records
from prefix_jax.data.template import Template
from prefix_jax.data.tokens import Examples
from prefix_jax.errors import ConfigError
from prefix_jax.evaluate.run import needs_references
from prefix_jax.mesh import batch_shards, make_mesh, replicated
from prefix_jax.methods import make_method
from prefix_jax.model import PrefixModel
from prefix_jax.runs.config_warnings import careless
from prefix_jax.runs.memory import check_memory
from prefix_jax.runs.multitask import tell_tasks_apart
from prefix_jax.train.init import init_prefix
from prefix_jax.train.partition import merge
from prefix_jax.train.program import make_program
from prefix_jax.train.step import Step, TrainState
from prefix_jax.train.task import check_task, head_of, load_labelled_splits

Records = Mapping[str, Iterable[Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run that is ready to start.

    Attributes:
        config: as it was given.
        task: what is made of a text, with the labels that were collected.
        mesh: the devices.
        pretrained: the backbone; its weights are frozen, unless `model.method` is None.
        model: backbone and method.
        pipeline: the batch of every step.
        splits: examples by "train", "dev" and "test", where there are any.
        steps: of the whole run.
        schedule: the learning rate by step.
        frozen: the frozen leaves of {"backbone": …, "prefix": …}.
        state: before the first step. The first step consumes it.
        step: the compiled training step.
        warnings: about settings that are probably a mistake.
    """

    config: Config
    task: TaskConfig
    mesh: Mesh
    pretrained: Pretrained
    model: PrefixModel
    pipeline: Pipeline
    splits: Mapping[str, Examples]
    steps: int
    schedule: optax.Schedule
    frozen: Any
    state: TrainState
    step: Step
    warnings: tuple[str, ...] = ()

    def params(self, state: TrainState) -> Params:
        """The whole tree, {"backbone": …, "prefix": …}, at a state."""
        return merge(state.train, self.frozen)


def build_run(
    config: Config, *, pretrained: Pretrained | None = None, records: Records | None = None
) -> Setup:
    """Loads what a run needs and builds its step.

    Args:
        config: the run.
        pretrained: a backbone that is loaded already; its mesh is the run's.
        records: examples from Python, by split, in place of the config's files.

    Raises:
        PrefixJaxError: something in the config, the data or the backbone does not fit.
    """
    # Before the backbone, which takes longer to load than a mistake in the data to find.
    sources = _read(config, records)
    method, sources = tell_tasks_apart(config.data, make_method(config.method), sources)
    check_quantized(config, method is None, pretrained)
    if pretrained is None:
        if config.mesh.auto:
            raise ConfigError("mesh: auto is settled before a run: see prefix_jax.plan.auto.settle")
        mesh = make_mesh(**config.mesh.sizes, devices=None)
        # What trains is float32: the steps of bfloat16 are too wide for small updates.
        dtype = "float32" if (method, config.model.dtype) == (None, "auto") else config.model.dtype
        pretrained = load(config.model.path, dtype=dtype, mesh=mesh, quantize=config.model.quantize)
    if method is None and pretrained.params["embed"]["tokens_VD"].dtype != jnp.float32:
        raise ConfigError(
            "method: full trains the weights themselves, which takes float32: load the backbone "
            "with model.dtype: float32"
        )
    check_task(config, pretrained.backbone.arch, pretrained.source)
    mesh = pretrained.mesh
    backbone = dataclasses.replace(pretrained.backbone, remat=config.model.remat)
    model = PrefixModel(backbone, method)

    task = config.task
    if task.name == "generate":
        splits = load_splits(config, model, pretrained, sources)
    else:
        task, splits = load_labelled_splits(config, model, pretrained, sources)
        head = head_of(task, backbone.arch, len(task.labels or ()))
        model = dataclasses.replace(model, head=head)
    check_memory(config, model, splits["train"], mesh)
    pipeline = Pipeline(
        splits["train"],
        batch_size=config.data.batch_size,
        seed=config.train.seed,
        pack=config.data.pack and model.packs,
        group_by_source=config.data.group_by_source,
        rows_multiple=batch_shards(mesh),
        grad_accum_steps=config.optim.grad_accum_steps,
        part=(jax.process_index(), jax.process_count()),
    )
    steps = config.train.steps
    if steps is None:
        assert config.train.epochs is not None  # as TrainConfig checks
        steps = math.ceil(config.train.epochs * pipeline.steps_per_epoch)
        if steps >= 2**31:
            raise ConfigError(f"train.epochs {config.train.epochs} are {steps} steps: too many")

    params: dict[str, Any] = {"backbone": pretrained.stacked()}
    if method is not None:
        prefix = init_prefix(method, config.init, pretrained, splits["train"], config.train.seed)
        params["prefix"] = jax.device_put(prefix, replicated(mesh))
    if model.head is not None:
        # Another stream than that of the prefix, whatever that draws.
        head_rng = jax.random.fold_in(jax.random.key(config.train.seed), 1)
        weights = model.head.init(head_rng, backbone.arch.d_model)
        params["head"] = jax.device_put(weights, replicated(mesh))
    program = make_program(config, model, params, steps, mesh)
    return Setup(
        config,
        task,
        mesh,
        pretrained,
        model,
        pipeline,
        splits,
        steps,
        program.schedule,
        program.frozen,
        program.state,
        program.step,
        careless(config, sources, steps),
    )


def check_quantized(config: Config, full: bool, pretrained: Pretrained | None = None) -> None:
    """Raises ConfigError if `model.quantize` is not of a backbone that was given, or not of one
    that stays frozen."""
    asked = config.model.quantize
    if pretrained is not None and pretrained.quantize != asked:
        raise ConfigError(
            f"model.quantize is {asked}, and the backbone that was given was loaded with "
            f"quantize={pretrained.quantize!r}: load it as the configuration says"
        )
    if full and asked != "none":
        raise ConfigError(
            f"method: full trains the weights themselves, which integers cannot: leave out "
            f"model.quantize ({asked}), or train a prefix"
        )


def _read(config: Config, records: Records | None) -> Mapping[str, Sequence[Record]]:
    """The records of each split.

    Raises:
        ConfigError: there are none to train on.
        DataError: a source cannot be read, or the first record does not fit the templates.
    """
    data = config.data
    sources: dict[str, Any] = {"train": data.train, "dev": data.dev, "test": data.test}
    sources |= records or {}
    if sources["train"] is None:
        raise ConfigError("data.train: give a file, a TFDS name, or records from Python")
    found = {
        name: read_records(source, tfds_dir=data.tfds_dir)
        for name, source in sources.items()
        if source is not None
    }
    for read in found.values():
        (first,) = prepare_records(read[:1], data.prepare)
        for template in (data.input, data.pair, data.target):
            if template is not None:
                Template(template).render(first)
    return found


def load_splits(
    config: Config,
    model: PrefixModel,
    pretrained: Pretrained,
    sources: Mapping[str, Sequence[Record]],
) -> dict[str, Examples]:
    """The examples of every split.

    Records need `data.references` only in splits of which generated text is measured.
    """
    data = config.data
    model.check_context(data.max_length)
    read = functools.partial(
        load_examples,
        tokenizer=pretrained.tokenizer,
        prepare=data.prepare,
        input=data.input,
        target=data.target,
        messages=data.messages,
        loss=data.loss,
        max_length=model.room if data.max_length is None else data.max_length,
        truncate=data.truncate,
        on_overflow=data.on_overflow,
        tfds_dir=data.tfds_dir,
        encoder_decoder=model.encoder_decoder,
        end_ids=model.backbone.arch.end_ids,
    )
    metrics = config.evaluate.metrics
    measured = {"dev": metrics[:1], "test": metrics}
    return {
        name: read(
            source,
            references=data.references if needs_references(measured.get(name, ())) else None,
        )
        for name, source in sources.items()
    }
