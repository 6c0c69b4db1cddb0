"""Metrics for Prometheus, under vLLM's names, so that its dashboards work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from prefix_jax.api.engine import Engine
from prefix_jax.engine import Event

_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_PER_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5)
_REQUEST = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)


class Metrics:
    """The metrics of a server.

    Args:
        engine: the engine.
    """

    def __init__(self, engine: Engine):
        disable_created_metrics()
        self.registry = CollectorRegistry()
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "num_requests_running": ("Continuations with a row.", lambda: engine.running),
            "num_requests_waiting": ("Continuations without a row.", lambda: engine.waiting),
            "kv_cache_usage_perc": ("Used share of the KV cache.", lambda: engine.cache_usage),
        }
        for name, (text, value) in gauges.items():
            Gauge(f"vllm:{name}", text, registry=self.registry).set_function(value)
        self.registry.register(_Drafts(engine))
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._generated = self._counter("generation_tokens", "Generated tokens.")
        self._success = self._counter(
            "request_success", "Requests that were answered.", ("finished_reason",)
        )
        self._rejected = self._counter("admission_rejections", "Requests refused as too many.")
        self._first = self._histogram(
            "time_to_first_token_seconds", "Until the first token of a request.", _FIRST_TOKEN
        )
        self._between = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a continuation.", _PER_TOKEN
        )
        self._whole = self._histogram("e2e_request_latency_seconds", "Of whole requests.", _REQUEST)
        self._queue = self._histogram(
            "request_queue_time_seconds", "Until a request gets a row.", _REQUEST
        )
        self._request_prompt = self._histogram(
            "request_prompt_tokens", "Tokens of the prompts of a request.", _TOKENS
        )
        self._request_generated = self._histogram(
            "request_generation_tokens", "Generated tokens of a request.", _TOKENS
        )

    def text(self) -> bytes:
        """All metrics in Prometheus' format."""
        return generate_latest(self.registry)

    def rejected(self, model: str) -> None:
        """Records a request that was refused because too many are waiting."""
        self._rejected.labels(model_name=model).inc()

    def start(self, model: str, prompt_tokens: int) -> Timing:
        """Starts the clock of a request."""
        return Timing(self, model, prompt_tokens)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"vllm:{name}", text, ("model_name", *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"vllm:{name}", text, ("model_name",), registry=self.registry, buckets=buckets
        )


class _Drafts(Collector):
    """Counts of speculative decoding, which the engine keeps."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Reads the counts."""
        stats = self._engine.stats
        yield CounterMetricFamily(
            "vllm:spec_decode_num_draft_tokens", "Drafted tokens.", stats.drafted_tokens
        )
        yield CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens",
            "Drafted tokens that became part of a text.",
            stats.accepted_tokens,
        )


class Timing:
    """Times one request.

    Args:
        metrics: receive the results.
        model: its model id.
        prompt_tokens: the number of its prompts' tokens.
    """

    def __init__(self, metrics: Metrics, model: str, prompt_tokens: int):
        self._metrics, self._model, self._prompt_tokens = metrics, model, prompt_tokens
        self._start = time.monotonic()
        self._queued = False
        # When the last tokens of each continuation arrived.
        self._last: dict[tuple[int, int], float] = {}
        self._generated = 0
        self._finish: str | None = None

    def event(self, index: int, event: Event) -> None:
        """Records new tokens of a request's prompt number `index`."""
        m, now = self._metrics, time.monotonic()
        if not self._queued and event.handle.admitted is not None:
            self._queued = True
            waited = max(0.0, event.handle.admitted - self._start)
            m._queue.labels(self._model).observe(waited)
        if not self._last:
            m._first.labels(self._model).observe(now - self._start)
        key = index, event.sample
        if key in self._last and event.ids:
            # Tokens of one burst arrive together.
            each = (now - self._last[key]) / len(event.ids)
            for _ in event.ids:
                m._between.labels(self._model).observe(each)
        self._last[key] = now
        self._generated += len(event.ids)
        m._generated.labels(self._model).inc(len(event.ids))
        self._finish = event.finish or self._finish

    def end(self, answered: bool) -> None:
        """Records the end of the request."""
        m = self._metrics
        m._prompt.labels(self._model).inc(self._prompt_tokens)
        if not answered:
            return
        reason = "length" if self._finish == "length" else "stop"
        m._success.labels(self._model, reason).inc()
        m._whole.labels(self._model).observe(time.monotonic() - self._start)
        m._request_prompt.labels(self._model).observe(self._prompt_tokens)
        m._request_generated.labels(self._model).observe(self._generated)
