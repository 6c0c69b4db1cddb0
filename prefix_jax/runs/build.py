"""Builds a run from its config: loads data and backbone, and compiles nothing yet."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from prefix_jax.backbones.loading.pretrained import Pretrained, architecture_of, load
from prefix_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from prefix_jax.data.batch import Examples
from prefix_jax.data.pipeline import Pipeline
from prefix_jax.data.source import Record, read_records
from prefix_jax.errors import ConfigError
from prefix_jax.evaluate.evaluator import Evaluator, needs_references
from prefix_jax.mesh import batch_shards, make_mesh
from prefix_jax.methods import make_method, name_of
from prefix_jax.model import PrefixModel
from prefix_jax.nn.quantized import QTensor
from prefix_jax.runs.card import CardMaker
from prefix_jax.runs.config_warnings import config_warnings
from prefix_jax.runs.memory import check_memory
from prefix_jax.runs.mixture import split_mixture
from prefix_jax.tasks import Reader, Task, check_task, make_task
from prefix_jax.train.init import init_params
from prefix_jax.train.partition import check_trainable
from prefix_jax.train.program import Program, make_program

Records = Mapping[str, Iterable[Mapping[str, Any]]]

_MAX_LABELS = 20  # labels that are printed


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is ready to start.

    Attributes:
        pretrained: the backbone. Its weights are frozen, unless `model.method` is None.
        model: backbone, method and task, with the labels that were found in the data.
        splits: the examples of "train", and of "dev" and "test" if there are any.
        pipeline: the batch of every step.
        program: the training step, its initial state and the number of steps.
        evaluator: measures prefixes.
        make_card: makes the card of a trained prefix.
        warnings: probable mistakes in the config, and examples that did not fit.
        summary: lines that describe the run.
    """

    pretrained: Pretrained
    model: PrefixModel
    splits: Mapping[str, Examples]
    pipeline: Pipeline
    program: Program
    evaluator: Evaluator
    make_card: CardMaker
    warnings: Sequence[str] = ()
    summary: Sequence[str] = ()

    @property
    def mesh(self) -> Mesh:
        return self.pretrained.mesh


def build_run(
    config: Config, *, pretrained: Pretrained | None = None, records: Records | None = None
) -> Run:
    """Loads the data and the backbone of a run, and builds its training step.

    Args:
        config: the run.
        pretrained: a loaded backbone, whose mesh the run then uses; None loads `config.model`.
        records: records by split ("train", "dev", "test"), instead of the config's files.

    Raises:
        PrefixJaxError: the config, the data and the backbone do not fit together.
    """
    data, seed = config.data, config.train.seed
    # Mistakes are found before the backbone is loaded, which takes longer.
    task = make_task(data, config.task)
    sources = _read(data, task, records)
    method, sources = split_mixture(data, make_method(config.method), sources)
    arch = architecture_of(config.model.path) if pretrained is None else pretrained.backbone.arch
    check_task(task, arch, method, config.evaluate, config.optim.head_learning_rate)
    full = method is None
    check_trainable(full, config.model.quantize)
    if pretrained is None:
        pretrained = _load(config.model, config.mesh, full)
    _check_loaded(pretrained, config.model.quantize, full)
    mesh = pretrained.mesh
    backbone = dataclasses.replace(pretrained.backbone, remat=config.model.remat)
    model = PrefixModel(backbone, method, task.collect(sources["train"]))
    model.check_context(task.max_length)
    reader = model.reader(pretrained.tokenizer)
    splits = _examples(model.task, config.evaluate.metrics, reader, sources)
    check_memory(
        model,
        splits["train"],
        mesh,
        batch_size=data.batch_size,
        grad_accum_steps=config.optim.grad_accum_steps,
        shared_sources=data.group_by_source,
        optimizer=config.optim.name,
    )
    pipeline = Pipeline(
        splits["train"],
        batch_size=data.batch_size,
        seed=seed,
        pack=data.pack and model.packs,
        group_by_source=data.group_by_source,
        rows_multiple=batch_shards(mesh),
        grad_accum_steps=config.optim.grad_accum_steps,
        part=(jax.process_index(), jax.process_count()),
    )
    steps = _steps(config.train.steps, config.train.epochs, pipeline.steps_per_epoch)

    params = init_params(model, pretrained, config.init, splits["train"], seed)
    program = make_program(
        model,
        params,
        config.optim,
        steps=steps,
        mesh=mesh,
        reduction=data.reduction,
        seed=seed,
    )
    evaluator = Evaluator(model, reader, mesh, config.evaluate, config.decode)
    evaluator.check(splits.get("dev", ()), config.evaluate.metrics[:1])
    evaluator.check(splits.get("test", ()), config.evaluate.metrics)
    return Run(
        pretrained,
        model,
        splits,
        pipeline,
        program,
        evaluator,
        CardMaker(pretrained, model, config.method, config.init, data.dataset, config.decode),
        (
            *config_warnings(data, config.optim, task, sources, steps),
            *_examples_that_did_not_fit(splits),
        ),
        (*_summary(pretrained, model, program, splits, data), *_labels(model.task)),
    )


def _read(data: DataConfig, task: Task, records: Records | None) -> Mapping[str, Sequence[Record]]:
    """Reads the records of each split.

    Raises:
        ConfigError: there is no training split.
        DataError: a source cannot be read, or its first record does not fit the templates.
    """
    sources: dict[str, Any] = {"train": data.train, "dev": data.dev, "test": data.test}
    sources |= records or {}
    if sources["train"] is None:
        raise ConfigError("data.train: give a file, a TFDS name, or records from Python")
    splits = {
        name: read_records(source, tfds_dir=data.tfds_dir)
        for name, source in sources.items()
        if source is not None
    }
    for split in splits.values():
        task.probe(split[0])
    return splits


def _load(model: ModelConfig, mesh: MeshConfig, full: bool) -> Pretrained:
    """Loads the backbone onto the mesh."""
    if mesh.auto:
        raise ConfigError("mesh: auto is settled before a run: see prefix_jax.plan.auto.settle")
    devices = make_mesh(**mesh.sizes, devices=None)
    # Trained weights must be float32: bfloat16 is too coarse for small updates.
    dtype = "float32" if full and model.dtype == "auto" else model.dtype
    return load(model.path, dtype=dtype, mesh=devices, quantize=model.quantize)


def _check_loaded(pretrained: Pretrained, quantize: str, full: bool) -> None:
    """Raises ConfigError if a backbone was loaded with other settings than the run needs."""
    if pretrained.quantize != quantize:
        raise ConfigError(
            f"model.quantize is {quantize}, but the given backbone was loaded with "
            f"quantize={pretrained.quantize!r}; load it with quantize={quantize!r}"
        )
    if full and pretrained.params["embed"]["tokens_VD"].dtype != jnp.float32:
        raise ConfigError(
            "method: full trains the weights themselves, which requires float32; load the backbone "
            "with model.dtype: float32"
        )


def _examples(
    task: Task, metrics: Sequence[str], reader: Reader, sources: Mapping[str, Sequence[Record]]
) -> dict[str, Examples]:
    """Tokenizes every split.

    Records need `data.references` only in splits whose generated text is scored.
    """
    scored = {"dev": metrics[:1], "test": metrics}
    return {
        name: (task if needs_references(scored.get(name, ())) else task.unscored()).examples(
            records, reader
        )
        for name, records in sources.items()
    }


def _steps(steps: int | None, epochs: float | None, steps_per_epoch: int) -> int:
    """The number of optimizer steps of the whole run."""
    if steps is not None:
        return steps
    assert epochs is not None  # checked by TrainConfig
    steps = math.ceil(epochs * steps_per_epoch)
    if steps >= 2**31:
        raise ConfigError(f"train.epochs: {epochs} epochs are {steps} steps; use fewer than 2**31")
    return steps


def _summary(
    pretrained: Pretrained,
    model: PrefixModel,
    program: Program,
    splits: Mapping[str, Examples],
    data: DataConfig,
) -> Iterator[str]:
    """Describes what trains, on what and for how long."""
    trained = sum(leaf.size for leaf in jax.tree.leaves(program.state.train))
    frozen = sum(
        leaf.size
        for leaf in jax.tree.leaves(program.frozen, is_leaf=lambda x: isinstance(x, QTensor))
    )
    quantize = pretrained.quantize
    yield (
        f"{pretrained.source}: {frozen:,} parameters frozen"
        f"{'' if quantize == 'none' else f' in {quantize}'}, {trained:,} trained "
        f"({name_of(model.method)}{' and head' * (model.head is not None)}); "
        f"{len(splits['train']):,} training examples, {program.steps} steps of {data.batch_size}"
    )
    if data.pack and not model.packs:
        yield (
            "data.pack has no effect: with soft tokens in an encoder, every example needs its own "
            "row, because the encoder mixes them with the text"
        )


def _labels(task: Task) -> Iterator[str]:
    if labels := getattr(task, "labels", None) or ():
        more = f", … ({len(labels)} in all)" if len(labels) > _MAX_LABELS else ""
        yield f"labels: {', '.join(map(repr, labels[:_MAX_LABELS]))}{more}"


def _examples_that_did_not_fit(splits: Mapping[str, Examples]) -> Iterator[str]:
    for name, examples in splits.items():
        total = len(examples) + len(examples.dropped)
        for verb, origins in (("truncated", examples.truncated), ("dropped", examples.dropped)):
            if origins:
                yield (
                    f"{name}: {len(origins)} of {total} examples were {verb} (first: "
                    f"{origins[0]}); see data.max_length"
                )
