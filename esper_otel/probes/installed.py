"""Probes of other packages, found by their entry points in the group ``esper_otel.probes``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points

from esper_otel.log import logger
from esper_otel.probes.probe import Probe
from esper_otel.schema import METRICS, Metric

GROUP = "esper_otel.probes"


def installed_probes(device: Callable[[], str | None], *, found: Iterable[EntryPoint] | None = None) -> list[Probe]:
    """Returns a probe for each entry point. What cannot be used is left out, with a warning.

    An entry point names a function that takes ``device`` (see ``host_and_device_probes``) and returns a ``Probe``.

    Args:
        device: returns the training device's name, or None while it is unknown.
        found: the entry points; by default those of all installed packages.
    """
    probes: list[Probe] = []
    declared = {metric.name for metric in METRICS}
    for entry in entry_points(group=GROUP) if found is None else found:
        try:
            probe = entry.load()(device)
            own = _checked(probe, declared)
        except Exception as error:  # noqa: BLE001 - somebody else's package must not end training
            logger.warning(
                "the probe %s (%s) is left out: %s: %s", entry.name, entry.value, type(error).__name__, error
            )
            continue
        declared |= own
        probes.append(probe)
    return probes


def _checked(probe: Probe, declared: set[str]) -> set[str]:
    """Returns the names of the metrics that a probe declares.

    Raises:
        TypeError, ValueError: it is not a probe, or gives metrics that cannot be recorded.
    """
    for name in ("sample", "close"):
        if not callable(getattr(probe, name, None)):
            raise TypeError(f"it has no method {name}()")
    gives: object = probe.gives
    if not isinstance(gives, tuple) or not gives or not all(isinstance(each, str | Metric) for each in gives):
        raise TypeError("its attribute gives is not a tuple of names and esper_otel.Metric")
    known = {metric.name for metric in METRICS if metric.level == "step"}
    if unknown := [each for each in gives if isinstance(each, str) and each not in known]:
        raise ValueError(f"{unknown[0]!r} is not a step metric of the catalogue: declare it as an esper_otel.Metric")
    own = {each.name: each for each in gives if isinstance(each, Metric)}
    for name, metric in own.items():
        if name in declared or name.startswith("esper."):
            raise ValueError(f"metric name {name!r} is taken")
        if (metric.level, metric.kind) != ("step", "gauge"):
            raise ValueError(f"metric {name!r} is not a gauge of a step")
    return set(own)
