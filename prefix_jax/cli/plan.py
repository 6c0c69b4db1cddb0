r"""Show the memory and time of a run on a TPU, and what limits it, without a TPU.

  prefix-jax plan configs/quickstart.yaml --topology v5e:1x1
  prefix-jax plan --model llama-3-8b --topology v5e:2x4 --tokens 2048 \
      data.batch_size=16 mesh=auto model.remat=full

Compiles the training step ahead of time with the TPU compiler, which works on
any machine after pip install "prefix_jax[tpu]". It reads neither weights nor
data; the model is a directory with a config.json, or a preset (--model). A step
has data.batch_size rows of --tokens tokens each. Packing puts the same number
of examples into fewer rows.

If the step does not fit, the command tries config changes that may help and
exits with 1.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefix_jax.errors import ConfigError

if TYPE_CHECKING:
    from prefix_jax.config import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the config, the topology and the batch shape."""
    parser.add_argument(
        "settings",
        metavar="[CONFIG] key.path=value",
        nargs="*",
        default=[],
        help="a YAML file (not needed with --model), and changes to it: data.batch_size=16",
    )
    parser.add_argument(
        "--topology", required=True, help="v5e:4x4, v5p:2x2x1, v5e:1x1 for one chip, 2*v5e:4x4, …"
    )
    parser.add_argument(
        "--slices", type=int, metavar="N", help="number of slices, connected by the network"
    )
    parser.add_argument(
        "--model", metavar="NAME", help="a preset such as llama-3-8b, instead of model.path"
    )
    parser.add_argument(
        "--for",
        dest="job",
        choices=("train", "decode"),
        default="train",
        help="a training step (the default), or a decoding step of one token per row",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="T",
        help="tokens per row (default: data.max_length, else 2,048 or the model's maximum)",
    )
    parser.add_argument(
        "--targets", type=int, metavar="M", help="target tokens per row (default: all)"
    )
    parser.add_argument(
        "--max-batch",
        action="store_true",
        help="also find the largest batch that fits; needs a few compilations",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Compiles the step and prints the plan."""
    import jax

    # Compilation needs no device; keep this machine's accelerators free for other processes.
    jax.config.update("jax_platforms", "cpu")
    from prefix_jax.plan import report
    from prefix_jax.plan.abstract import AbstractRun
    from prefix_jax.plan.auto import choose_mesh
    from prefix_jax.plan.batch import largest_batch
    from prefix_jax.plan.plan import Plan, compile_step
    from prefix_jax.plan.remedies import Remedy, remedies
    from prefix_jax.plan.topology import Topology
    from prefix_jax.terminal.console import make_console

    config = config_of(args)
    topology = Topology.parse(args.topology, args.slices)
    run = AbstractRun.of(config, args.job)
    shape = run.batch_shape(args.tokens, args.targets)
    console = make_console(highlight=False, soft_wrap=True)
    answer: dict[str, Any] = {}
    with make_console(stderr=True).status(f"compiling for {topology}") as status:

        def show(plan: Plan) -> None:
            status.update(f"compiling for {topology}; so far: {report.line(plan)}")

        def show_remedy(remedy: Remedy) -> None:
            show(remedy.plan)

        if config.mesh.auto:
            choice = choose_mesh(run, shape, topology, show)
            plan = choice.best
            answer["meshes"] = [report.as_json(each) for each in choice.compiled]
        else:
            choice = None
            plan = compile_step(run, shape, topology, topology.mesh(config.mesh.sizes))
            show(plan)
        answer["plan"] = report.as_json(plan)
        mesh = topology.mesh(plan.mesh)
        largest = None
        if args.max_batch:
            largest = largest_batch(run, shape, topology, mesh, show, known=plan)
            answer["largest"] = report.largest_as_json(largest)
        helpful = () if plan.fits else remedies(plan, run, shape, topology, show_remedy)
        if not plan.fits:
            answer["remedies"] = {each.settings: report.as_json(each.plan) for each in helpful}
    if args.json:
        print(json.dumps(answer, indent=2))
        return 0 if plan.fits else 1
    console.print(report.table(plan))
    if choice is not None:
        console.print(report.compared(choice))
    if not plan.fits:
        console.print(report.advice(helpful), markup=False)
    if largest is not None:
        console.print(report.largest_line(largest), markup=False)
    return 0 if plan.fits else 1


def config_of(args: argparse.Namespace) -> Config:
    """Builds the config that the arguments describe.

    Raises:
        ConfigError: the arguments name no model, two models, or a config that is invalid.
    """
    from prefix_jax import config as configs
    from prefix_jax.plan.presets import PREFIX

    settings = list(args.settings)
    path = settings.pop(0) if settings and "=" not in settings[0] else None
    named = [setting for setting in settings if setting.startswith("model.path=")]
    if args.model is not None:
        if named:
            raise ConfigError(f"--model {args.model} and {named[-1]} name two models; give one")
        settings.append(f"model.path={PREFIX}{args.model.removeprefix(PREFIX)}")
    elif path is None and not named:
        raise ConfigError("no model given; give a config, --model PRESET or model.path=…")
    if path is not None:
        if not Path(path).is_file() and not path.endswith((".yaml", ".yml")):
            raise ConfigError(
                f"no config {path}; to name a model, write --model PRESET or model.path={path}"
            )
        return configs.load(path, settings)
    # Required by the schema, but irrelevant to a plan.
    values = {"data": {"target": "{text}"}, "train": {"steps": 1}, "output_dir": "plan"}
    return configs.parse(values, settings)
