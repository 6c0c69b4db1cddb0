"""Readers of untrusted files: configs, records, checkpoints, tokenizers and chat templates.

All files from outside enter the package through this folder. A reader

- never runs code from a file, and never prompts on stdin;
- limits size, depth and time before it parses, so that no file can exhaust memory or hang;
- checks types and ranges, so that later code can rely on them;
- turns every failure into an error of the caller's class that names the file and the reason.
"""
