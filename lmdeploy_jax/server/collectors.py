"""Counters and histograms for every piece of every stream.

prometheus_client's own take a lock for each value, and a histogram walks its buckets in Python: several
microseconds, thousands of times a second. Each of these has one thread that writes.
"""

from __future__ import annotations

import collections
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

import numpy as np
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


class Counter(Collector):
    """A number that grows."""

    def __init__(self, name: str, about: str, labels: Mapping[str, str]) -> None:
        self.value = 0
        self._name, self._about, self._labels = name, about, labels

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._about, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), self.value)
        yield family


class ExpertLoad(Collector):
    """How many tokens each expert of each layer had, of answers that tell."""

    def __init__(self, name: str, about: str, labels: Mapping[str, str]) -> None:
        self._name, self._about, self._labels = name, about, labels
        self._counts: list[collections.Counter[int]] = []

    def observe(self, routes: np.ndarray) -> None:
        """Count int32 [tokens, layers, k]; -1 is no expert."""
        self._counts += [collections.Counter() for _ in range(routes.shape[1] - len(self._counts))]
        for counts, layer in zip(self._counts, routes.swapaxes(0, 1), strict=True):
            counts.update(layer[layer >= 0].tolist())

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._about, labels=[*self._labels, "layer", "expert"])
        for layer, counts in enumerate(self._counts):
            for expert in sorted(counts):
                family.add_metric([*self._labels.values(), str(layer), str(expert)], counts[expert])
        yield family


class Histogram(Collector):
    """How many values there were up to each of the ascending bounds."""

    def __init__(self, name: str, about: str, labels: Mapping[str, str], bounds: Iterable[float]) -> None:
        self._name, self._about, self._labels = name, about, labels
        self._bounds = list(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._about, labels=list(self._labels))
        names = [*map(str, self._bounds), "+Inf"]
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        family.add_metric(list(self._labels.values()), buckets, self._sum)
        yield family
