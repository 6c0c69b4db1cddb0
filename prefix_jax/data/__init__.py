"""The input pipeline: records → (task) → examples → sampler → packed rows.

Records come from files or Python; a task of `prefix_jax.tasks` turns them into examples. The batch
of a step is a pure function of the examples, the options, the seed and the step. There is no
iterator state to save or lose: a run that was killed and resumes at step s gets exactly the same
batches, on any number of hosts. Grain only runs this function in a thread ahead of the device.
"""
