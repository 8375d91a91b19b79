"""The numbers of a process's tiers, for Prometheus."""

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from kvstore.tiers.base import TierStats


class TierCollector(Collector):
    """Asks the tiers whenever Prometheus asks. Add it by `registry.register`.

    Args:
        stats: What each tier says, by its name ("host", "disk"); called on the thread of whoever asks.
    """

    def __init__(self, stats: Callable[[], Mapping[str, TierStats]]) -> None:
        self._stats = stats

    def describe(self) -> Iterable[Metric]:
        """The families, empty: registering them asks no tier."""
        return _families({})

    def collect(self) -> Iterable[Metric]:
        return _families(self._stats())


def _families(tiers: Mapping[str, TierStats]) -> Iterator[Metric]:
    def counter(name: str, documentation: str, value: Callable[[TierStats], float]) -> Metric:
        return _filled(CounterMetricFamily(f"pdmesh_kv_tier_{name}", documentation, labels=("tier",)), tiers, value)

    def gauge(name: str, documentation: str, value: Callable[[TierStats], float]) -> Metric:
        return _filled(GaugeMetricFamily(f"pdmesh_kv_tier_{name}", documentation, labels=("tier",)), tiers, value)

    yield gauge("capacity_blocks", "Blocks that it has room for.", lambda tier: tier.num_slots)
    yield gauge("blocks", "Blocks held.", lambda tier: tier.num_blocks)
    yield gauge("bytes", "Bytes of blocks held.", lambda tier: tier.num_bytes)
    yield counter("hits", "Blocks asked for and given.", lambda tier: tier.num_hits)
    yield counter("misses", "Blocks asked for and not held.", lambda tier: tier.num_misses)
    yield counter("stored", "Blocks that came in.", lambda tier: tier.num_stored)
    yield counter("evicted", "Blocks that made room and lie further below.", lambda tier: tier.num_evicted)
    yield counter("dropped", "Blocks lost for want of room.", lambda tier: tier.num_dropped)
    yield counter("corrupt", "Blocks that failed their checksum.", lambda tier: tier.num_corrupt)
    yield counter("read_seconds", "Seconds spent in reading.", lambda tier: tier.read_s)
    yield counter("write_seconds", "Seconds spent in writing.", lambda tier: tier.write_s)


def _filled(
    family: CounterMetricFamily | GaugeMetricFamily,
    tiers: Mapping[str, TierStats],
    value: Callable[[TierStats], float],
) -> Metric:
    for name, tier in tiers.items():
        family.add_metric((name,), value(tier))
    return family
