"""The input pipeline: source → template → tokens → order → packed rows.

The batch of a step is a pure function of the examples, the options, the seed and the step. There
is no iterator state to save or lose: a run that was killed and resumes at step s gets exactly the
same batches, on any number of hosts. Grain only runs this function in a thread ahead of the
device.
"""
