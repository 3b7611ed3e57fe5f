"""What Prometheus scrapes: requests, interventions, how far the gate opened, times, and whether protection is armed."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

GATE = (-8.0, -4.0, -2.0, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Upper ends of the opening's buckets: at 0 and below the gate never opened, at 1 it was fully open."""
SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


def counted_requests(registry: CollectorRegistry) -> Counter:
    """What has come through the door; labels: route, status."""
    return Counter("safegene_requests", "Requests by route and HTTP status.", ["route", "status"], registry=registry)


class Metrics:
    """The figures of one server, in a registry of their own."""

    def __init__(
        self, *, armed: Callable[[], float], waiting: Callable[[], float], running: Callable[[], float]
    ) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = counted_requests(registry)
        self.interventions = Counter("safegene_interventions", "Answers in which the gate opened.", registry=registry)
        self.gate = Histogram(
            "safegene_gate_opening", "Highest (s - tau) / w of prompt and answer; above 0 the adapter acted.",
            buckets=GATE, registry=registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "safegene_first_token_seconds", "Until the first token, waiting included.", buckets=SECONDS, registry=registry
        )  # fmt: skip
        self.whole = Histogram(
            "safegene_answer_seconds", "Until the answer's end, waiting included.", buckets=SECONDS, registry=registry
        )
        Gauge("safegene_armed", "1 while answers are protected.", registry=registry).set_function(armed)
        Gauge("safegene_waiting", "Requests that wait for a batch.", registry=registry).set_function(waiting)
        Gauge("safegene_running", "Requests that are being answered.", registry=registry).set_function(running)

    def answered(self, highest: float | None, first_token: float | None, seconds: float) -> None:
        """Count one answer. `highest`: (s − τ) / w, None where the gate was not read."""
        if highest is not None:
            self.gate.observe(highest)
            if highest > 0:
                self.interventions.inc()
        if first_token is not None:
            self.first_token.observe(first_token)
        self.whole.observe(seconds)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
