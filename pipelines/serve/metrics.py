"""What a server counts, for Prometheus by way of Ray. Documents are never in a label.

Sums of Ray's histograms are sums of buckets' middles: mean times come from the counters of seconds.
"""

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0]

_COUNTERS = {
    "requests": ("Requests by route, status and type of error.", ("route", "status", "type")),
    "tokens_in": ("Source tokens of answered documents, special ones included.", ()),
    "tokens_out": ("Tokens written.", ()),
    "windows": ("Windows read.", ()),
    "truncated": ("Documents that were cut.", ()),
    "documents": ("Documents answered.", ()),
    "request_seconds": ("Seconds from the first byte of requests to their end.", ("route",)),
    "retries": ("Documents asked again because a replica died.", ()),
    "rejected": ("Documents that a replica had no room for.", ()),
    "queue_seconds": ("Seconds that documents waited for the engine.", ()),
}
_HISTOGRAMS = {
    "latency": ("Seconds of a request.", ("route",)),
    "first_token": ("Seconds to the first token of a stream.", ()),
    "queue_time": ("Seconds that a document waits for the engine.", ()),
}
_GAUGES = {
    "queued_tokens": "Tokens of the documents that a replica holds.",
    "waiting_documents": "Documents that wait in an engine.",
    "running_documents": "Documents that an engine computes now.",
    "batch_tokens": "Source tokens of these.",
    "tokens_per_s": "What a replica was measured to read.",
}


class Metrics:
    """The series of one process, all named `longhaul_...` with the model's name as a label."""

    def __init__(self, model: str) -> None:
        self._model = {"model": model}
        self._counters = {
            name: Counter(f"longhaul_{name}", said, ("model", *labels))
            for name, (said, labels) in _COUNTERS.items()
        }
        self._histograms = {
            name: Histogram(f"longhaul_{name}", said, _SECONDS, ("model", *labels))
            for name, (said, labels) in _HISTOGRAMS.items()
        }
        self._gauges = {
            name: Gauge(f"longhaul_{name}", said, ("model",)) for name, said in _GAUGES.items()
        }

    def count(self, name: str, value: float = 1, **labels: Any) -> None:
        """Add to a counter; 0 changes nothing."""
        if value:
            self._counters[name].inc(value, self._labels(labels))

    def observe(self, name: str, seconds: float, **labels: Any) -> None:
        """Note how long something took."""
        self._histograms[name].observe(seconds, self._labels(labels))

    def show(self, values: Mapping[str, float]) -> None:
        """Set gauges."""
        for name, value in values.items():
            self._gauges[name].set(value, self._model)

    def _labels(self, labels: Mapping[str, Any]) -> dict[str, str]:
        return self._model | {name: str(value) for name, value in labels.items()}
