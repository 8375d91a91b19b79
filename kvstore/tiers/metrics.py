"""The numbers of a process's tiers, for Prometheus."""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from kvstore.tiers.base import TierStats


class TierCollector(Collector):
    """Asks the tiers whenever Prometheus asks. Add it by `registry.register`.

    Args:
        stats: One TierStats for each tier, best first; called on the thread of whoever asks.
    """

    def __init__(self, stats: Callable[[], Iterable[TierStats]]) -> None:
        self._stats = stats

    def describe(self) -> Iterable[Metric]:
        """The families, empty: registering them asks no tier."""
        return self._families(())

    def collect(self) -> Iterable[Metric]:
        return self._families(tuple(self._stats()))

    def _families(self, tiers: Iterable[TierStats]) -> Iterator[Metric]:
        yield _gauge("blocks", "Blocks held.", {t.tier: t.num_blocks for t in tiers})
        yield _gauge("bytes", "Bytes of blocks held.", {t.tier: t.num_bytes for t in tiers})
        yield _counter("hits", "Blocks asked for and found.", {t.tier: t.hits for t in tiers})
        yield _counter("misses", "Blocks asked for and not found.", {t.tier: t.misses for t in tiers})
        yield _counter("stored", "Blocks taken in.", {t.tier: t.stored for t in tiers})
        yield _counter("evicted", "Blocks that made room for others.", {t.tier: t.evicted for t in tiers})
        yield _counter("dropped", "Blocks not taken in: busy or full.", {t.tier: t.dropped for t in tiers})
        yield _counter("corrupt", "Blocks that failed their checksum.", {t.tier: t.corrupt for t in tiers})
        yield _counter("load_seconds", "Seconds spent reading blocks.", {t.tier: t.load_s for t in tiers})


def _gauge(name: str, documentation: str, values: dict[str, float]) -> Metric:
    family = GaugeMetricFamily(f"pdmesh_kv_tier_{name}", documentation, labels=("tier",))
    for tier, value in values.items():
        family.add_metric((tier,), value)
    return family


def _counter(name: str, documentation: str, values: dict[str, float]) -> Metric:
    family = CounterMetricFamily(f"pdmesh_kv_tier_{name}", documentation, labels=("tier",))
    for tier, value in values.items():
        family.add_metric((tier,), value)
    return family
