"""What ``/metrics`` tells, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Metrics:
    """Of one server, apart from those of others in the process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._answers = Counter(
            "penstock_http_requests",
            "Answers by route and status.",
            ("method", "route", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "penstock_http_seconds",
            "Until an answer has been sent.",
            ("method", "route"),
            buckets=SECONDS,
            registry=self._registry,
        )
        ProcessCollector(registry=self._registry)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an answer."""
        method = method if method in ("GET", "HEAD", "POST", "DELETE") else "other"
        self._answers.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def watch(self, gauges: Callable[[], Mapping[str, Mapping[str, float]]]) -> None:
        """Ask for values when they are wanted.

        Args:
            gauges: values by the name of the gauge and of what each counts ("" for one alone).
        """
        self._registry.register(_Asked(gauges))

    def text(self) -> bytes:
        """Return all of it, in Prometheus' text format."""
        return generate_latest(self._registry)


class _Asked(Collector):
    def __init__(self, gauges: Callable[[], Mapping[str, Mapping[str, float]]]) -> None:
        self._gauges = gauges

    def describe(self) -> Iterator[Metric]:
        """Nothing in advance: asking is all there is."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        for name, values in self._gauges().items():
            kinds = [] if list(values) == [""] else ["kind"]
            family = GaugeMetricFamily(f"penstock_{name}", name.replace("_", " "), labels=kinds)
            for kind, value in values.items():
                family.add_metric([kind] if kinds else [], value)
            yield family
