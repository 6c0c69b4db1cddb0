"""YAML with bounds on size, depth and aliases, and without YAML 1.1's surprises."""

from __future__ import annotations

import re
from typing import Any

import yaml

from prefix_jax.errors import PrefixJaxError, reason

# A config has a few hundred nodes; aliases may repeat sections.
MAX_NODES = 100_000
MAX_DEPTH = 100


def parse_yaml(text: str, where: str, error: type[PrefixJaxError]) -> Any:
    """Parses one YAML document with the types of YAML 1.2's core schema.

    Unlike in YAML 1.1, 1e-3 is a number; yes, no, on, off and dates are strings. A key that
    appears twice in a mapping is an error.

    Args:
        text: the document.
        where: the origin of the text, for messages.
        error: the class to raise.

    Raises:
        PrefixJaxError: of class `error`, if the text is malformed, holds a value that its tag
            cannot express, an alias inside its own anchor, more than `MAX_DEPTH` levels, or more
            than `MAX_NODES` values after aliases are expanded.
    """
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_bounds(node)
        return loader.construct_document(node)
    except yaml.YAMLError as failure:
        raise error(f"{where}: not valid YAML: {failure}") from failure
    except RecursionError:
        raise error(f"{where}: YAML nested more than {MAX_DEPTH} levels deep") from None


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the core schema of YAML 1.2, which refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # PyYAML reports it: a key that is a list or a mapping
            if key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"{key.value!r} twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        # "!!int x" and the like: constructors raise what int() and its kin raise.
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as failure:
            kind = node.tag.rpartition(":")[2]
            raise yaml.MarkedYAMLError(
                None, None, f"not a value of type {kind} ({reason(failure)})", node.start_mark
            ) from None

    def construct_core_int(self, node: yaml.ScalarNode) -> int:
        """An integer in decimal, or after 0o or 0x; leading zeros mean nothing."""
        text = self.construct_scalar(node)
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text, base)


def _check_bounds(root: yaml.Node) -> None:
    """Raises YAMLError if the node graph is cyclic, too deep, or too large once expanded."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node, depth: int) -> int:
        if depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                None, None, f"nested more than {MAX_DEPTH} levels deep", node.start_mark
            )
        if isinstance(node, yaml.ScalarNode):
            return 1
        key = id(node)
        if key in open_nodes:
            raise yaml.MarkedYAMLError(
                None, None, "an alias inside its own anchor", node.start_mark
            )
        if key not in sizes:
            open_nodes.add(key)
            children = (
                [child for pair in node.value for child in pair]
                if isinstance(node, yaml.MappingNode)
                else node.value
            )
            sizes[key] = 1 + sum(size(child, depth + 1) for child in children)
            open_nodes.discard(key)
        if sizes[key] > MAX_NODES:
            raise yaml.MarkedYAMLError(
                None, None, f"more than {MAX_NODES:,} values with aliases expanded", node.start_mark
            )
        return sizes[key]

    size(root, 0)


# Plain scalars that are not text in YAML 1.2's core schema: by tag, pattern and first letters.
# YAML 1.1 reads 010 as 8, 1:30 as 90, 1e-3 and 0o17 as text, and yes, no, on and off as booleans.
_CORE_SCHEMA = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)"
        r"|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
)


def add_core_schema(cls: Any) -> None:
    """Makes a PyYAML loader or dumper resolve plain scalars as YAML 1.2 does, too.

    One addition: digits may be grouped by underscores, as in YAML 1.1 and Python.
    """
    for kind, pattern, first in _CORE_SCHEMA:
        cls.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"({pattern})$"), first)


Loader.yaml_implicit_resolvers = {}
add_core_schema(Loader)
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_core_int)
