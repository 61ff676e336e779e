"""Names in Prometheus: what OTLP's metrics are called there, in the two ways in which Prometheus may be set up.

The rules are those of ``otlptranslator`` 1.0, which the collector and Prometheus use.
"""

from __future__ import annotations

import re

from esper_otel.schema.metric import Metric

# Words for units (UCUM) that Prometheus knows; what it does not know is appended as it is.
_WORDS = {"ms": "milliseconds", "s": "seconds", "By": "bytes", "%": "percent", "Cel": "celsius"}
_RATIO, _TOTAL = "ratio", "total"


def prometheus_name(metric: Metric, *, suffixes: bool = False) -> str:
    """The metric's name in Prometheus.

    Args:
        metric: any of the catalogue, or a user's own.
        suffixes: whether Prometheus appends units and ``total``, its default; the shipped configurations do not
            (``UnderscoreEscapingWithoutSuffixes``).
    """
    tokens = [token for token in re.split(r"[^A-Za-z0-9:]", metric.name) if token]
    if not suffixes:
        return re.sub(r"[^A-Za-z0-9:_]", "_", metric.name)
    unit = metric.unit
    word = "" if "{" in unit else _WORDS.get(unit, "" if unit == "1" else unit)
    word = "_".join(token for token in re.split(r"[^A-Za-z0-9]", word) if token)
    if word and word not in tokens:
        tokens.append(word)
    if metric.kind == "counter":
        tokens = [token for token in tokens if token != _TOTAL] + [_TOTAL]
    elif unit == "1":
        tokens = [token for token in tokens if token != _RATIO] + [_RATIO]
    name = "_".join(tokens)
    return f"_{name}" if name[:1].isdigit() else name
