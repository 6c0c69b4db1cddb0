"""A run's program reuses the memory of its state, and only that."""

import jax
import numpy as np
from decoders import batch_of, decoder, examples, weights

from prefix_jax import config
from prefix_jax.mesh import make_mesh, place_rows
from prefix_jax.methods.prefix import PrefixTuning
from prefix_jax.model import PrefixModel
from prefix_jax.train.program import Program, make_program

BACKBONE, METHOD = decoder("llama"), PrefixTuning(4)
MESH = make_mesh(1, 1, 1, jax.devices()[:1])
RUN = config.parse(
    {
        "model": {"path": "tiny"},
        "data": {"target": "{text}"},
        "train": {"steps": 2},
        "output_dir": "run",
    }
)


def program() -> Program:
    params = {
        "backbone": weights(BACKBONE),
        "prefix": METHOD.init(jax.random.key(0), BACKBONE.geometry, None),
    }
    return make_program(RUN, PrefixModel(BACKBONE, METHOD), jax.device_put(params), 2, MESH)


def test_a_step_writes_the_new_state_over_the_old_and_leaves_the_backbone_alone():
    made = program()
    frozen = jax.tree.map(np.array, made.frozen)
    with jax.set_mesh(MESH):
        batch = place_rows(batch_of(examples(4)), MESH, leading=1)
        compiled = made.step.lower(made.state, made.frozen, batch).compile()
        after, _ = made.step(made.state, made.frozen, batch)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(made.state))
    assert compiled.memory_analysis().alias_size_in_bytes == held
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(made.state))
    jax.tree.map(np.testing.assert_array_equal, frozen, made.frozen)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))
