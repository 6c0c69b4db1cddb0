"""Collectives are parsed from a program in every notation of the compiler."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from prefix_jax import config as configs
from prefix_jax.plan.collectives import collectives
from prefix_jax.plan.hlo import parse
from prefix_jax.plan.plan import plan
from prefix_jax.plan.products import cost
from prefix_jax.plan.roofline import Exchange, seconds_of
from prefix_jax.plan.topology import Topology
from prefix_jax.plan.walk import visits


def parsed(*lines: str, before: str = "") -> list:
    body = "".join(f"  {line}\n" for line in lines)
    text = f"{before}ENTRY %main (a: bf16[64,16]) -> bf16[64,16] {{\n{body}}}\n"
    return collectives(list(visits(parse(text), cost)))


ARGUMENT = "%a = bf16[64,16]{1,0} parameter(0)"
BYTES = 64 * 16 * 2


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['axis_0'=2,'axis_1'=2] {'axis_1'}", [[0, 1], [2, 3]]),
        ("mesh['axis_0'=2,'axis_1'=2] {'axis_0'}", [[0, 2], [1, 3]]),
        (
            "mesh['axis_0'=2,'axis_1'=2], device_ids=([2,2]T(1,0)) {'axis_0'}",
            [[0, 1], [2, 3]],
        ),
    ],
)
def test_parses_groups_in_every_notation(groups: str, expected: list[list[int]]) -> None:
    (collective,) = parsed(
        ARGUMENT,
        f"ROOT %r = bf16[64,16]{{1,0}} all-reduce(%a), channel_id=1, replica_groups={groups}, "
        "use_global_device_ids=true, to_apply=%add",
    )
    np.testing.assert_array_equal(collective.groups, expected)
    assert collective.nbytes == BYTES
    assert collective.sent == BYTES * 2 / 2


@pytest.mark.parametrize(
    ("line", "kind", "sent"),
    [
        ("all-gather(%a), dimensions={0}", "all-gather", 4 * BYTES * 3 / 4),
        ("all-reduce(%a), to_apply=%add", "all-reduce", 2 * BYTES * 3 / 4),
        ("reduce-scatter(%a), to_apply=%add", "reduce-scatter", BYTES * 3 / 4),
        ("all-to-all(%a), dimensions={0}", "all-to-all", BYTES * 3 / 4),
    ],
)
def test_bytes_sent_match_the_best_algorithm(line: str, kind: str, sent: float) -> None:
    call, _, rest = line.partition(",")
    (collective,) = parsed(
        ARGUMENT, f"ROOT %r = bf16[64,16]{{1,0}} {call}, replica_groups={{{{0,1,2,3}}}},{rest}"
    )
    assert (collective.kind, collective.sent, collective.hidden) == (kind, sent, False)


def test_asynchronous_collective_is_hidden_and_counted_once() -> None:
    (collective,) = parsed(
        ARGUMENT,
        "%s = (bf16[64,16]{1,0}, bf16[64,16]{1,0}) collective-permute-start(%a), channel_id=1, "
        "source_target_pairs={{0,0},{1,2},{2,1}}",
        "ROOT %r = bf16[64,16]{1,0} collective-permute-done(%s)",
    )
    assert (collective.kind, collective.hidden, collective.sent, collective.count) == (
        "collective-permute",
        True,
        BYTES,
        1,
    )
    np.testing.assert_array_equal(collective.groups, [[1, 2], [2, 1]])


def test_fusions_with_the_same_channel_are_one_collective() -> None:
    part = """%part.{0} (p: bf16[64,16]) -> bf16[128,16] {{
  %p = bf16[64,16]{{1,0}} parameter(0)
  ROOT %g.{0} = bf16[128,16]{{1,0}} all-gather(%p), channel_id=7, replica_groups={{{{0,1}}}}
}}

"""
    (collective,) = parsed(
        ARGUMENT,
        "%f = bf16[128,16]{1,0} fusion(%a), kind=kCustom, calls=%part.1",
        "ROOT %h = bf16[128,16]{1,0} fusion(%a), kind=kCustom, calls=%part.2",
        before=part.format(1) + part.format(2),
    )
    assert (collective.kind, collective.hidden, collective.nbytes) == (
        "all-gather",
        True,
        2 * BYTES,
    )


def test_collective_within_one_device_is_ignored() -> None:
    line = "ROOT %r = bf16[64,16]{1,0} all-reduce(%a), replica_groups={{0},{1}}, to_apply=%add"
    assert parsed(ARGUMENT, line) == []


@pytest.mark.parametrize(
    ("topology", "devices", "links"),
    [
        ("v5e:2x4", [0, 1], 1),  # Neighbours.
        ("v5e:2x2", [0, 1, 2, 3], 2),  # A square: both axes.
        ("v5e:16x16", list(range(256)), 4),  # Rings along both.
        ("v5p:2x2x4", list(range(16)), 4),  # One ring of three axes.
    ],
)
def test_time_follows_the_links_between_chips(
    topology: str, devices: list[int], links: int
) -> None:
    chips = Topology.parse(topology)
    group = ",".join(map(str, devices))
    big = "bf16[65536,16384]"
    (collective,) = parsed(
        f"%a = {big}{{1,0}} parameter(0)",
        f"ROOT %r = {big}{{1,0}} all-reduce(%a), replica_groups={{{{{group}}}}}, to_apply=%add",
    )
    at_most = collective.sent / (links * chips.chip.link)
    assert at_most <= seconds_of(collective, chips, chips.devices) < 1.01 * at_most


def test_slices_use_the_data_centre_network() -> None:
    chips = Topology.parse("2*v5e:2x2")
    line = "ROOT %r = bf16[64,16]{1,0} all-reduce(%a), replica_groups={{0,4}}, to_apply=%add"
    (collective,) = parsed(ARGUMENT, line)
    assert seconds_of(collective, chips, chips.devices) > collective.sent / chips.chip.dcn


@pytest.mark.parametrize(
    ("transfer", "target", "kind", "sent"),
    [
        ("ALL_REDUCE", '"{1,2}x{0:3}"', "all-reduce", BYTES),
        ("ALL_REDUCE", '"{1,2,3,4}x{0:3}"', "all-reduce", 2 * BYTES * 3 / 4),
        ("ALL_GATHER", '"{1,2}x{0:3}"', "all-gather", BYTES),
        ("ONE_TO_ONE", "{{100001->200000},{200000->100001}}", "collective-permute", BYTES),
    ],
)
def test_transfers_to_the_host_are_collectives_between_slices(
    transfer: str, target: str, kind: str, sent: float
) -> None:
    chips = Topology.parse("2*v5e:2x2")
    (collective,) = parsed(
        ARGUMENT,
        "%t = token[] after-all()",
        "%s = (bf16[64,16]{1,0}, u32[], token[]) send(%a, %t), channel_id=2, "
        "is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="
        f'"xla_megascale_runtime",_xla_megascale_target={target},'
        f'_xla_megascale_transfer_type="{transfer}"}}',
        "%d = token[] send-done(%s), channel_id=2",
        "%r = (bf16[64,16]{1,0}, u32[], token[]) recv(%t), channel_id=1",
        "ROOT %e = (bf16[64,16]{1,0}, token[]) recv-done(%r), channel_id=1",
    )
    assert (collective.kind, collective.sent, collective.hidden, collective.between_slices) == (
        kind,
        sent,
        True,
        True,
    )
    assert seconds_of(collective, chips, chips.devices) == sent / chips.chip.dcn


def test_gathering_weights_across_slices_costs_network_time(tmp_path: Path) -> None:
    """In the compiled program: half of all weights, forward and backward."""
    model = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 512,
    }
    (tmp_path / "config.json").write_text(json.dumps(model))

    def between_slices(mesh: str) -> Mapping[str, Exchange]:
        values = {
            "model": {"path": str(tmp_path)},
            "data": {"target": "{text}"},
            "train": {"steps": 1},
            "output_dir": "plan",
        }
        planned = plan(configs.parse(values, [mesh]), "2*v5e:1x2", tokens=128)
        assert planned.roofline is not None
        return {k: v for k, v in planned.roofline.exchanges.items() if "between slices" in k}

    weights = 2 * 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    gathered = between_slices("mesh.fsdp=4")["all-gather between slices"]
    assert gathered.sent >= 2 * weights / 4
    assert gathered.seconds == pytest.approx(gathered.sent / Topology.parse("v5e:1x1").chip.dcn)
    # Copies exchange the gradients of the prefix.
    copies = between_slices("mesh.data=4")
    assert set(copies) == {"all-reduce between slices"}
    assert 0 < copies["all-reduce between slices"].sent < weights / 4
