"""Through: a marked step on its way to Prometheus and to the gateway, and what became of it there."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from esper_otel.check import Stage
from esper_otel.client import TamiyoClient
from esper_otel.errors import ConfigurationError, GatewayError, UnknownRun
from esper_otel.leyline.packets import Packets
from esper_otel.schema import METRICS, new_check_id
from esper_otel.schema import Stage as SeedStage
from esper_otel.schema.prometheus import prometheus_name
from esper_otel.session import start
from esper_otel.settings import EsperSettings

_BY_NAME = {metric.name: metric for metric in METRICS}
_SEED = "esper-check"
_LOSS, _NAN, _MISSING, _ALPHA = "loss", "gradient_norm", "accuracy", "kasmina.seed.alpha"
_LATENCY = "step_latency_ms"
_AGAIN_S = 0.2
_REQUEST_S = 5.0


@dataclass(frozen=True, slots=True)
class Back:
    """Where a step is read back, and for how long it is waited for.

    Attributes:
        prometheus: its address, such as ``http://127.0.0.1:9090``; None: not asked.
        gateway: the gateway's, such as ``127.0.0.1:4327``; None: not asked.
        token_file: file with the gateway's bearer token.
        ca_file: PEM file of the authority of the gateway's certificate.
        timeout_s: how long a step may take.
    """

    prometheus: str | None
    gateway: str | None
    token_file: Path | None = None
    ca_file: Path | None = None
    timeout_s: float = 30.0


def run_through(back: Back) -> list[Stage]:
    """Sends a step with a NaN and a missing value to the endpoint of the environment, and looks for it.

    Raises:
        ConfigurationError: nobody to ask, or an address that cannot be used.
    """
    if back.prometheus is None and back.gateway is None:
        raise ConfigurationError("--through needs somebody to ask: give --prometheus URL, --gateway ADDRESS, or both")
    if back.prometheus is not None and not back.prometheus.startswith(("http://", "https://")):
        raise ConfigurationError(f"--prometheus {back.prometheus}: give a URL, such as http://127.0.0.1:9090")
    run_id = new_check_id()
    # The same risks as at a gateway that was told nothing else: its packets are compared with these.
    settings = EsperSettings(export_every_s=0, risk_thresholds={}, probe_period_s=3600)
    with start(run_id=run_id, rank=0, world_size=1, settings=settings) as telemetry:
        sent_s = time.monotonic()
        with telemetry.step(epoch=0) as now:
            now.put({_LOSS: 1 / 3, _NAN: math.nan})
            now.seed(_SEED, stage=SeedStage.TRAINING, alpha=0.1)
        (packets,) = telemetry.pull().packets
        time_ms = packets.state.timestamp_ns // 10**6
        at_gateway = None if back.gateway is None else _at_gateway(back, packets, sent_s)
        has_gateway = at_gateway is not None and at_gateway.ok is True
        at_prometheus = (
            None if back.prometheus is None else _at_prometheus(back, run_id, time_ms, sent_s, has_it=has_gateway)
        )
    return [stage for stage in (at_gateway, at_prometheus) if stage is not None]


# -- the gateway -----------------------------------------------------------------------------------------


def _at_gateway(back: Back, mine: Packets, sent_s: float) -> Stage:
    where = f"gateway {back.gateway}"
    deadline_s = sent_s + back.timeout_s
    found: Packets | None = None
    try:
        with TamiyoClient(
            back.gateway or "", token_file=back.token_file, ca_file=back.ca_file, timeout_s=_REQUEST_S
        ) as client:
            while found is None and time.monotonic() < deadline_s:
                try:
                    found = next(iter(client.pull(mine.run_id, wait_s=1)), None)
                except UnknownRun:
                    time.sleep(_AGAIN_S)
    except GatewayError as error:
        return Stage(where, False, str(error), "see whether it runs, and whether a token or TLS is wanted")
    if found is None:
        return Stage(
            where,
            False,
            f"nothing of run {mine.run_id} has come within {back.timeout_s:g} s, though the endpoint took it",
            "see the log of what stands between, a collector's exporter otlp_grpc/esper for instance",
        )
    delay_s = time.monotonic() - sent_s
    if not found.complete:
        return Stage(where, False, "the step came without some of its points", "a processor on the way filters metrics")
    changed = _changed(dict(mine.state.training_metrics), dict(found.state.training_metrics))
    if changed:
        return Stage(where, False, changed, "a processor on the way changes values")
    if found.names != mine.names:
        odd = ", ".join(sorted(found.names ^ mine.names))
        return Stage(
            where, False, f"not the metrics that were recorded: {odd}", "a processor on the way renames metrics"
        )
    return Stage(where, True, f"the step came whole after {delay_s:.2f} s, NaN as NaN, what is missing missing")


def _changed(mine: Mapping[str, float], found: Mapping[str, float]) -> str:
    """What is not as it was sent, in words; empty when all is."""
    for name in sorted(mine.keys() | found.keys()):
        if name not in found:
            return f"{name} was lost on the way"
        if name not in mine:
            return f"{name} was not recorded, and came as {found[name]:g}"
        if found[name] != mine[name]:
            return f"{name} was {mine[name]:g} and came as {found[name]:g}"
    return ""


# -- Prometheus ------------------------------------------------------------------------------------------


def _at_prometheus(back: Back, run_id: str, time_ms: int, sent_s: float, *, has_it: bool) -> Stage:
    where = f"Prometheus {back.prometheus}"
    deadline_s = sent_s + back.timeout_s
    found: list[Any] = []
    try:
        while not _is_whole(found) and time.monotonic() < deadline_s:
            if found:
                time.sleep(_AGAIN_S)
            found = _series(back.prometheus or "", run_id)
            if not found:
                time.sleep(_AGAIN_S)
    except (requests.RequestException, ValueError, KeyError) as error:
        return Stage(where, False, f"it cannot be asked: {error}", "give the address of Prometheus' own page")
    delay_s = time.monotonic() - sent_s
    if not found:
        between = "the collector and Prometheus" if has_it else "the endpoint and Prometheus"
        return Stage(
            where,
            False,
            f"nothing of run {run_id} has come within {back.timeout_s:g} s; look between {between}",
            "Prometheus must be started with --web.enable-otlp-receiver, or scrape the collector; their logs say more",
        )
    return _judged(where, time_ms, found, delay_s)


def _series(address: str, run_id: str) -> list[Any]:
    """Every series of the run with its samples, whichever label tells it."""
    for selector in (f'{{run_id="{run_id}"}}', f'{{instance="{run_id}/0"}}'):
        answer = requests.get(
            f"{address.rstrip('/')}/api/v1/query", params={"query": f"{selector}[10m]"}, timeout=_REQUEST_S
        )
        answer.raise_for_status()
        found: list[Any] = answer.json()["data"]["result"]
        if found:
            return found
    return []


def _is_whole(found: list[Any]) -> bool:
    """Whether the last of what was sent in one request is there."""
    names = {series["metric"]["__name__"] for series in found}
    return all(any(part in name for name in names) for part in (_LOSS, _NAN, "alpha"))


def _judged(where: str, time_ms: int, found: list[Any], delay_s: float) -> Stage:
    values = {
        series["metric"]["__name__"]: (round(series["values"][0][0] * 1000), float(series["values"][0][1]))
        for series in found
    }
    has_suffixes = prometheus_name(_BY_NAME[_LATENCY], suffixes=True) in values
    fault = next(_faults({name: value for name, (_, value) in values.items()}, has_suffixes=has_suffixes), None)
    if fault is not None:
        return Stage(where, False, *fault)
    labels = next(series["metric"] for series in found if series["metric"]["__name__"] == _LOSS)
    message = f"{len(values)} metrics came after {delay_s:.2f} s, NaN as NaN, what is missing missing"
    message += "; names with units, as rules and dashboards of `stock` expect" if has_suffixes else "; names as ours"
    message += ", labels run_id and rank" if {"run_id", "rank"} <= labels.keys() else ", the run only in instance"
    if values[_LOSS][0] != time_ms:
        message += "; scraped: the newest value at the time of the scrape, not every step"
    return Stage(where, True, message)


def _faults(values: Mapping[str, float], *, has_suffixes: bool) -> Iterator[tuple[str, str]]:
    """What is not as it was sent, and what may have done it; each only when those before it are not so."""
    latency, alpha, missing, nan = (
        prometheus_name(_BY_NAME[name], suffixes=has_suffixes) for name in (_LATENCY, _ALPHA, _MISSING, _NAN)
    )
    if _LOSS not in values:
        yield f"there is no {_LOSS}; there are {', '.join(sorted(values))}", "it was renamed or filtered on the way"
    if latency not in values:
        near = ", ".join(name for name in sorted(values) if "latency" in name) or "nothing like it"
        yield f"{_LATENCY} was renamed on the way: there is {near}", "see the translation of names there"
    if values[_LOSS] != 1 / 3:
        yield f"{_LOSS} was {1 / 3!r} and came as {values[_LOSS]!r}", "a processor on the way changes values"
    if nan not in values:
        yield f"{_NAN} was NaN and was lost on the way", "something there takes no NaN"
    if not math.isnan(values[nan]):
        yield f"{_NAN} was NaN and came as {values[nan]:g}", "something there replaces NaN"
    if missing in values:
        yield f"{_MISSING} was not recorded, and came as {values[missing]:g}", "something there fills gaps"
    if alpha not in values:
        yield f"{_ALPHA} of seed {_SEED} was lost on the way", "a filter, or a limit of series"
