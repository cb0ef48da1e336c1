"""Numbers of a server for GET /metrics, in Prometheus' text form."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """One registry a server, so that several live in one process. waiting: says how many requests do."""

    def __init__(self, waiting: Callable[[], float]) -> None:
        registry = self.registry = CollectorRegistry()
        self._requests = Counter("serve_requests", "Messages answered", ["dialect", "status"], registry=registry)
        self._errors = Counter("serve_errors", "Of them, refused or failed", ["dialect"], registry=registry)
        self._seconds = Histogram("serve_request_seconds", "From reading to answering", ["dialect"], registry=registry)
        Gauge("serve_queue", "Requests that wait for a batch", registry=registry).set_function(waiting)
        self.rows = Histogram("serve_batch_rows", "Rows of a batch", buckets=ROWS, registry=registry)
        self.connections = Gauge("serve_connections", "Open WebSocket connections", registry=registry)

    def request(self, dialect: str, status: int, seconds: float) -> None:
        """A message has been answered."""
        self._requests.labels(dialect, status).inc()
        if status >= 400:
            self._errors.labels(dialect).inc()
        self._seconds.labels(dialect).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
