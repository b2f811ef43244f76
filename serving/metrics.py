"""What `GET /metrics` shows: one object per app with a registry of its own, so two apps in one process do not mix.

Counters and histograms are fed by the gateway; the engine's gauges are read from its latest stats when scraped. The
composition root hands `Metrics.observe_freed` to the engine client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from prometheus_client import Metric

    from moderation.policy import Direction
    from serving.engine.requests import EngineStats

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_TOKEN_BUCKETS = (0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5.0, 10.0, 30.0, 60.0)
_BETWEEN_TOKEN_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.5, 1.0, 5.0)
_REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_MODERATION_BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 2.0)
_FREED_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Metrics:
    """All metrics of one app. Names end in their unit."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self.registry = registry
        self._requests = Counter("causerie_requests", "Answered requests", ["endpoint", "status"], registry=registry)
        self._request_seconds = Histogram(
            "causerie_request_seconds",
            "From the request's arrival to the last byte of its answer",
            ["endpoint"],
            buckets=_REQUEST_BUCKETS,
            registry=registry,
        )
        self._prompt_tokens = Counter("causerie_prompt_tokens", "Prompt tokens accepted", registry=registry)
        self._generated_tokens = Counter("causerie_generated_tokens", "Tokens generated", registry=registry)
        self._first_token = Histogram(
            "causerie_time_to_first_token_seconds",
            "From the request's arrival to its first token",
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self._between_tokens = Histogram(
            "causerie_inter_token_seconds",
            "Between the tokens of one choice",
            buckets=_BETWEEN_TOKEN_BUCKETS,
            registry=registry,
        )
        self._flagged = Counter(
            "causerie_flagged", "Requests and choices that moderation flagged", ["direction"], registry=registry
        )
        self._moderation_failures = Counter(
            "causerie_moderation_failures", "Times that there was no verdict", ["direction"], registry=registry
        )
        self._moderation_seconds = Histogram(
            "causerie_moderation_seconds",
            "One judgement: of a request's input, or of one window of output",
            ["direction"],
            buckets=_MODERATION_BUCKETS,
            registry=registry,
        )
        for direction in ("input", "output"):  # so that they show as 0
            self._flagged.labels(direction)
            self._moderation_failures.labels(direction)
        self._disconnects = Counter(
            "causerie_disconnects", "Requests whose client left before the end", registry=registry
        )
        self._cancels = Counter("causerie_cancels", "Requests ended by a cancel call", registry=registry)
        self._freed = Histogram(
            "causerie_cancel_to_freed_seconds",
            "From a disconnect or a cancel call to the request's cache blocks being free again",
            buckets=_FREED_BUCKETS,
            registry=registry,
        )

    def watch_engine(self, engine_stats: Callable[[], EngineStats | None]) -> None:
        """Once per object: the gauges come from `engine_stats` at every scrape."""
        self.registry.register(_EngineCollector(engine_stats))

    def request_finished(self, endpoint: str, status: int, seconds: float) -> None:
        self._requests.labels(endpoint, str(status)).inc()
        self._request_seconds.labels(endpoint).observe(seconds)

    def prompt_accepted(self, num_tokens: int) -> None:
        self._prompt_tokens.inc(num_tokens)

    def observe_first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def tokens_generated(self, num_tokens: int) -> None:
        self._generated_tokens.inc(num_tokens)

    def observe_between_tokens(self, seconds: float) -> None:
        self._between_tokens.observe(seconds)

    def flagged(self, direction: Direction) -> None:
        self._flagged.labels(direction).inc()

    def moderation_failed(self, direction: Direction) -> None:
        self._moderation_failures.labels(direction).inc()

    def observe_moderation(self, direction: Direction, seconds: float) -> None:
        self._moderation_seconds.labels(direction).observe(seconds)

    def disconnected(self) -> None:
        self._disconnects.inc()

    def cancelled(self) -> None:
        self._cancels.inc()

    def observe_freed(self, seconds: float) -> None:
        self._freed.observe(seconds)

    def render(self) -> bytes:
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """The engine's latest stats; nothing while there is no engine."""

    def __init__(self, engine_stats: Callable[[], EngineStats | None]) -> None:
        self._engine_stats = engine_stats

    def collect(self) -> Iterator[Metric]:
        stats = self._engine_stats()
        if stats is None:
            return
        num_used = stats.num_total_blocks - stats.num_free_blocks
        yield GaugeMetricFamily("causerie_sequences_running", "Sequences in the batch", stats.num_running)
        yield GaugeMetricFamily("causerie_sequences_waiting", "Sequences in the queue", stats.num_waiting)
        yield GaugeMetricFamily("causerie_kv_blocks_used", "Cache blocks in use", num_used)
        yield GaugeMetricFamily(
            "causerie_kv_blocks_idle",
            "Cache blocks not in use that hold the beginning of a prompt",
            stats.num_idle_blocks,
        )
        yield GaugeMetricFamily("causerie_kv_blocks_total", "Cache blocks there are", stats.num_total_blocks)
        yield CounterMetricFamily(
            "causerie_prompt_tokens_reused", "Prompt tokens found in the cache", value=stats.num_reused_tokens
        )
        yield CounterMetricFamily(
            "causerie_preemptions", "Sequences that gave their cache to older ones", value=stats.num_preemptions
        )
        yield CounterMetricFamily(
            "causerie_engine_steps", "Engine steps since its process started", value=stats.num_steps
        )
