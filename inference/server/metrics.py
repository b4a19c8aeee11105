"""What Prometheus may ask at /metrics, in a registry of the server's own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "quern_requests", "Answers by the part of the server and status.", ["endpoint", "status"], registry=registry
        )
        self.disconnects = Counter(
            "quern_disconnects", "Clients that left before their answer was whole.", registry=registry
        )
        self.prompt_tokens = Counter("quern_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.generated_tokens = Counter("quern_generated_tokens", "Tokens written.", registry=registry)
        self.proposed_tokens = Counter(
            "quern_proposed_tokens", "Tokens looked up in prompt and text, and checked.", registry=registry
        )
        self.accepted_tokens = Counter("quern_accepted_tokens", "Those of them that were right.", registry=registry)
        self.request_seconds = _histogram(
            "request", "From the first byte of a request to the last of its answer.", registry
        )
        self.time_to_first_token = _histogram("time_to_first_token", "From a request to its first token.", registry)
        self.time_per_token = _histogram("time_per_token", "From one token of a sequence to the next.", registry)
        self._running = Gauge("quern_running_sequences", "Sequences that are being written.", registry=registry)
        self._waiting = Gauge("quern_waiting_sequences", "Sequences that wait for a slot.", registry=registry)

    def watch(self, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Where to ask for the gauges."""
        self._running.set_function(running)
        self._waiting.set_function(waiting)

    def page(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)


def _histogram(name: str, help_text: str, registry: CollectorRegistry) -> Histogram:
    return Histogram(f"quern_{name}_seconds", help_text, buckets=_SECONDS, registry=registry)
