"""Selectors: how a metric is asked for, on a Prometheus with our configuration or with its own defaults."""

from __future__ import annotations

from dataclasses import dataclass

from esper_otel.schema import CHECK_PATTERN, METRICS, Metric
from esper_otel.schema.prometheus import prometheus_name

CATALOGUE: dict[str, Metric] = {metric.name: metric for metric in METRICS}
BY_KEY: dict[str, Metric] = {metric.key or metric.name: metric for metric in METRICS}


@dataclass(frozen=True, slots=True)
class Naming:
    """One way in which Prometheus is set up.

    Attributes:
        folder: where what is rendered for it goes, below ``prometheus`` and ``grafana``.
        suffixes: whether Prometheus appends units to names.
        has_labels: whether series have ``run_id`` and ``rank``; else both are read from ``instance``.
    """

    folder: str
    suffixes: bool
    has_labels: bool

    def name(self, metric: str) -> str:
        """The metric's name."""
        return prometheus_name(CATALOGUE[metric], suffixes=self.suffixes)

    @property
    def runs(self) -> str:
        """The matcher that leaves out what ``esper-otel check`` sends."""
        return f'run_id!~"{CHECK_PATTERN}"' if self.has_labels else f'instance!~"{CHECK_PATTERN}/[0-9]+"'

    def select(
        self, metric: str, matchers: str = "", over: str = "", function: str = "", *, offset: str = "", first: str = ""
    ) -> str:
        """Series with ``run_id`` and ``rank``.

        Args:
            metric: of the catalogue.
            matchers: of labels, such as ``run_id="digits-7"``; on ``instance`` when series have no run.
            over: a range, such as ``5m``.
            function: what is applied to the range, such as ``max_over_time``.
            offset: how long before, such as ``5m``.
            first: the function's first argument, if the range is its second.
        """
        text = self.name(metric) + (f"{{{matchers}}}" if matchers else "") + (f"[{over}]" if over else "")
        text += f" offset {offset}" if offset else ""
        return self.labelled(f"{function}({f'{first}, ' if first else ''}{text})" if function else text)

    def labelled(self, expression: str) -> str:
        """An instant expression, with ``run_id`` and ``rank``."""
        if self.has_labels:
            return expression
        with_run = f'label_replace({expression}, "run_id", "$1", "instance", "(.*)/[^/]*")'
        return f'label_replace({with_run}, "rank", "$1", "instance", ".*/([^/]*)")'


OURS = Naming("", suffixes=False, has_labels=True)
STOCK = Naming("stock", suffixes=True, has_labels=False)
