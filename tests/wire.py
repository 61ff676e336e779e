"""Frames on the wire, for tests: requests as the exporter makes them."""

from __future__ import annotations

from collections.abc import Iterable

from opentelemetry.sdk.resources import Resource

from esper_otel.export.encode import Encoder
from esper_otel.frame import Frame, Run
from esper_otel.schema import METRICS

CATALOGUE = {metric.name: metric for metric in METRICS}


def resource(run: Run, process: str = "") -> Resource:
    attributes: dict[str, str | int] = {
        "esper.run.id": run.run_id,
        "esper.run.attempt": run.attempt,
        "esper.rank": run.rank,
        "esper.world_size": run.world_size,
        "esper.device.compute_capability": run.compute_capability,
    }
    texts = {
        "esper.experiment.name": run.experiment,
        "esper.device.type": run.device_type,
        "esper.device.id": run.device_id,
        "service.instance.id": process,
    }
    return Resource(attributes | {key: text for key, text in texts.items() if text})


def encoder(process: str = "") -> Encoder:
    def fault(what: str, error: Exception) -> None:
        raise AssertionError(what) from error

    return Encoder(CATALOGUE, lambda run: resource(run, process), fault)


def bodies(frames: Iterable[Frame], process: str = "") -> list[bytes]:
    return [request.body for frame in frames for request in encoder(process).requests([frame])]
