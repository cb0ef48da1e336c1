"""Numbers of a server for GET /metrics, in Prometheus' text form."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """One registry a server, so that several live in one process."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self._requests = Counter("serve_requests", "Messages answered", ["dialect", "status"], registry=registry)
        self._errors = Counter("serve_errors", "Of them, refused or failed", ["dialect"], registry=registry)
        self._seconds = Histogram(
            "serve_request_seconds", "From reading to answering", ["dialect"], buckets=SECONDS, registry=registry
        )
        self._waiting = Gauge("serve_queue", "Requests that wait for a batch", registry=registry)
        self.rows = Histogram("serve_batch_rows", "Rows of a batch", buckets=ROWS, registry=registry)
        self.connections = Gauge("serve_connections", "Open WebSocket connections", registry=registry)

    def request(self, dialect: str, status: int, seconds: float, waiting: int) -> None:
        """A message has been answered."""
        self._requests.labels(dialect, status).inc()
        if status >= 400:
            self._errors.labels(dialect).inc()
        self._seconds.labels(dialect).observe(seconds)
        self._waiting.set(waiting)

    def text(self) -> bytes:
        return generate_latest(self.registry)
