"""From records to batches: source → template → tokens → order → packed rows.

What a step trains on is a pure function of the examples, the options, the seed and the step. There
is no iterator state to store or lose: a killed run that starts again at step s gets the very bytes
that it would have got, on any number of hosts. Grain then only does what it is best at, running
that function in a thread ahead of the device.
"""
