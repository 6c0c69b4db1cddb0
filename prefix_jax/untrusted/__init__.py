"""Readers for files that other people wrote: configs, records, checkpoints, tokenizers, templates.

Every file from outside enters the package through this folder. A reader

- never runs code that comes with a file, and never asks a question on stdin;
- bounds size, depth and time before it parses, so that no file can exhaust memory or hang;
- checks types and ranges, so that nothing downstream computes with nonsense;
- turns every failure into one error of the caller's class, which names the file and the reason.
"""
