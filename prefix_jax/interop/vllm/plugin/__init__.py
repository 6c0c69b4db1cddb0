"""Serves stored prefixes from vLLM, one model id each.

`prefix-jax export RUN DIR/NAME --to vllm` copies this package to `DIR/prefix_vllm`, where vLLM
finds it with `PYTHONPATH=DIR`. It imports nothing from prefix_jax, and neither JAX nor any package
that vLLM does not have.

    stored.py      the prefixes of a directory: their cards, digests and arrays
    scheduling.py  decides which slots a request loads
    connector.py   writes a prefix's keys and values into the KV cache of a request
    models.py      ASGI middleware that makes every prefix a model id of the HTTP server
"""
