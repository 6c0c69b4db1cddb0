"""Parses YAML 1.2 within limits on size, depth and aliases."""

from __future__ import annotations

import re
from typing import Any

import yaml

from prefix_jax.errors import PrefixJaxError, reason

# Counted after aliases are expanded. A config has a few hundred nodes.
MAX_NODES = 100_000
MAX_DEPTH = 100


def parse_yaml(text: str, where: str, error: type[PrefixJaxError]) -> Any:
    """Parses one YAML document with the types of YAML 1.2's core schema.

    Unlike in YAML 1.1, 1e-3 is a number, and yes, no, on, off and dates are strings. Duplicate
    keys are an error.

    Args:
        text: the document.
        where: the origin of the text, for messages.
        error: the class to raise.

    Raises:
        PrefixJaxError: of class `error`, if the text is malformed, a value does not match its tag,
            an alias refers to a node that contains it, or there are more than `MAX_DEPTH` levels
            or `MAX_NODES` values.
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
    """PyYAML's safe loader with the core schema of YAML 1.2; rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # a list or mapping as a key, which PyYAML reports
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    None, None, f"duplicate key {key.value!r}", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        # For "!!int x" and similar, constructors raise the errors of int(), float() and others.
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as failure:
            kind = node.tag.rpartition(":")[2]
            raise yaml.MarkedYAMLError(
                None, None, f"not a value of type {kind} ({reason(failure)})", node.start_mark
            ) from None

    def construct_core_int(self, node: yaml.ScalarNode) -> int:
        """Parses a decimal, octal (0o) or hexadecimal (0x) integer; ignores leading zeros."""
        text = self.construct_scalar(node)
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text, base)


def _check_bounds(root: yaml.Node) -> None:
    """Raises YAMLError if the node graph is cyclic, too deep, or too large when expanded."""
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


# Tag, pattern and first characters of plain scalars that are not strings in YAML 1.2's core schema.
# YAML 1.1 reads 010 as 8, 1:30 as 90, 1e-3 and 0o17 as strings, and yes, no, on, off as booleans.
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
    """Makes a PyYAML loader or dumper resolve plain scalars with YAML 1.2's core schema.

    In addition, underscores may group digits, as in YAML 1.1 and Python.
    """
    for kind, pattern, first in _CORE_SCHEMA:
        cls.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"({pattern})$"), first)


Loader.yaml_implicit_resolvers = {}
add_core_schema(Loader)
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_core_int)
