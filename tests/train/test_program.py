"""The program reuses the memory of its state, and nothing else."""

import jax
import numpy as np
from decoders import batch_of, decoder, examples, weights

from prefix_jax.config import OptimConfig
from prefix_jax.mesh import make_mesh, place_rows
from prefix_jax.methods.prefix import PrefixTuning
from prefix_jax.model import PrefixModel
from prefix_jax.train.program import Program, make_program

BACKBONE, METHOD = decoder("llama"), PrefixTuning(4)
MESH = make_mesh(1, 1, 1, jax.devices()[:1])


def program() -> Program:
    params = {
        "backbone": weights(BACKBONE),
        "prefix": METHOD.init(jax.random.key(0), BACKBONE.geometry, None),
    }
    return make_program(
        PrefixModel(BACKBONE, METHOD), jax.device_put(params), OptimConfig(), steps=2, mesh=MESH
    )


def test_step_reuses_the_memory_of_the_state_but_not_of_the_backbone():
    built = program()
    frozen = jax.tree.map(np.array, built.frozen)
    with jax.set_mesh(MESH):
        batch = place_rows(batch_of(examples(4)), MESH, leading=1)
        compiled = built.step.lower(built.state, built.frozen, batch).compile()
        after, _ = built.step(built.state, built.frozen, batch)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(built.state))
    assert compiled.memory_analysis().alias_size_in_bytes == held
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(built.state))
    jax.tree.map(np.testing.assert_array_equal, frozen, built.frozen)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))
