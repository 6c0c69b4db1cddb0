"""The HTTP server: OpenAI's API, with every prefix as a model id.

    engine_thread.py   runs the engine, and hands its events to coroutines
    models.py          model ids, and the directories that their prefixes come from
    guides.py          JSON schemas as guides of the engine
    protocol.py        the fields of requests
    generation.py      from a request to the engine, and to a stream of deltas
    responses.py       responses in OpenAI's format
    limits.py          API keys, sizes and time-outs, as ASGI middleware
    metrics.py         metrics for Prometheus, with vLLM's names
    app.py             the routes
    server.py          the process: start, signals, shutdown

A coroutine serves each request, all in one thread. A second thread runs the engine; the two
exchange commands and events.
"""
