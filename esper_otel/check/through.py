"""Sends a marked run, and checks how it arrives in Prometheus and at the gateway."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import requests

from esper_otel.check.in_gateway import at_gateway, end_at_gateway
from esper_otel.check.in_prometheus import at_prometheus, end_at_prometheus
from esper_otel.check.marked_run import MarkedRun
from esper_otel.check.one_frame import of_outcome
from esper_otel.check.stages import CheckStage, Difference, ReadBack
from esper_otel.errors import ConfigurationError, GatewayError
from esper_otel.export.endpoint import endpoint_from_environment
from esper_otel.export.provider import exporters_from_environment
from esper_otel.export.transport import open_sender
from esper_otel.settings import EsperSettings

__all__ = ["ReadBack", "run_through"]


_UNSEEN = CheckStage(
    "unseen",
    None,
    "a short run does not show limits that depend on the load (queues, rates, memory, numbers of series), samplers "
    "that decide by chance or age, and rules for other names: of your service, run, experiment or own metrics",
)


def run_through(back: ReadBack, *, environ: Mapping[str, str] = os.environ) -> list[CheckStage]:
    """Sends a short run of two ranks to the endpoint, and compares what arrives downstream with what was sent.

    Call it after ``run_check`` has found no fault.

    Args:
        back: where to read the run back.
        environ: the environment with the ``OTEL_*`` variables.

    Raises:
        ConfigurationError: neither a Prometheus nor a gateway is given, or an address cannot be used.
    """
    if back.prometheus is None and back.gateway is None:
        raise ConfigurationError("--through must read the run back: give --prometheus URL, --gateway ADDRESS, or both")
    if back.prometheus is not None and not back.prometheus.startswith(("http://", "https://")):
        raise ConfigurationError(f"--prometheus {back.prometheus}: give a URL, such as http://127.0.0.1:9090")
    protocol = exporters_from_environment(environ, ignored=_known).protocol
    endpoint = endpoint_from_environment(environ, protocol=protocol, ignored=_known)
    sender = open_sender(endpoint, EsperSettings().token_file)
    marked = MarkedRun(sender, endpoint.timeout_s)
    try:
        sent_s = time.monotonic()
        outcome = of_outcome(marked.send(sent_s + back.timeout_s), endpoint)
        if not outcome.ok:
            return [outcome]
        stages = [] if back.gateway is None else [at_gateway(back, marked, sent_s)]
        if back.prometheus is not None:
            has_gateway = bool(stages and stages[0].ok)
            stages.append(at_prometheus(back, marked, sent_s, has_it=has_gateway))
    finally:
        marked.end()
        sender.close()
    ends = [*[end_at_gateway] * (back.gateway is not None), *[end_at_prometheus] * (back.prometheus is not None)]
    checked = [_with_end(stage, partial(end, back, marked)) for stage, end in zip(stages, ends, strict=True)]
    return [*checked, _UNSEEN] if all(stage.ok for stage in checked) else checked


def _with_end(stage: CheckStage, end: Callable[[], Difference | str]) -> CheckStage:
    """Adds what became of the run's end to a stage without a fault."""
    if not stage.ok:
        return stage
    try:
        found = end()
    except (GatewayError, requests.RequestException, ValueError, KeyError) as error:
        found = Difference(f"the run's end cannot be read back: {error}", "see whether it still runs")
    if isinstance(found, Difference):
        return CheckStage(stage.name, False, *found)
    return replace(stage, message=f"{stage.message}; {found}")


def _known(message: str) -> None:
    """Ignores messages about ignored settings, since ``run_check`` has already reported them."""
