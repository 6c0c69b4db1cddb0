"""The engine: continuous batching of requests that each choose their prefix.

    warm.py       a prefix as arrays to copy into a row
    bank.py       prefixes by name, within byte budgets
    cache.py      the KV cache, whose rows have a prefix, a length and positions of their own
    drafts.py     drafts for speculative decoding
    sampling.py   the next token of every row, each with settings of its own
    programs.py   the compiled programs
    request.py    requests, handles and events
    schedule.py   the queue and the rows, on the host
    core.py       submit, step, cancel

`prefix_jax.Engine` adds what needs a person's input: names, directories, templates.
"""

from prefix_jax.engine.core import DecodingStats, EngineCore
from prefix_jax.engine.request import Event, Handle, Request

__all__ = ["DecodingStats", "EngineCore", "Event", "Handle", "Request"]
