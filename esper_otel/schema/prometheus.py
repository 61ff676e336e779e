"""Names of metrics in Prometheus, for both of its settings for metrics received over OTLP.

The rules are those of ``otlptranslator`` 1.0, which the collector and Prometheus use.
"""

from __future__ import annotations

import re

from esper_otel.schema.metric import Metric

# Words that Prometheus uses for units (UCUM); other units are appended unchanged.
_WORDS = {"ms": "milliseconds", "s": "seconds", "By": "bytes", "%": "percent", "Cel": "celsius"}
_RATIO, _TOTAL = "ratio", "total"


def prometheus_name(metric: Metric, *, suffixes: bool = False) -> str:
    """Returns the metric's name in Prometheus.

    Args:
        metric: a metric of the catalogue or of the user.
        suffixes: whether Prometheus appends units and ``total``, as by default. The configurations shipped with this
            package turn that off (``UnderscoreEscapingWithoutSuffixes``).
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
