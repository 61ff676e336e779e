"""Frames on the wire, for tests: requests as the exporter makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from frame_examples import RUN, TIME_UNIX_NS, make_frame
from opentelemetry.sdk.resources import Resource

from esper_otel.export.encode import Encoder
from esper_otel.frames.frame import Frame, Run
from esper_otel.frames.ring import blocks_of
from esper_otel.gateway.receive.request import DecodedRequest, Malformed
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

    return Encoder(CATALOGUE, lambda run: resource(run, process))


def bodies(frames: Iterable[Frame], process: str = "") -> list[bytes]:
    return [request.body for frame in frames for request in encoder(process).requests(blocks_of([frame]))]


def body_of(*run_ids: str, step: int = 1) -> bytes:
    """A step of each of these runs, in one request."""
    times = {"sequence": step, "global_step": step, "time_unix_ns": TIME_UNIX_NS + step * 10**6}
    return b"".join(bodies(make_frame(run=replace(RUN, run_id=run_id), **times) for run_id in run_ids))


def said(decode: Callable[[bytes], DecodedRequest], body: bytes) -> object:
    """What a decoder says, comparable; the word for a request that it refuses."""
    try:
        decoded = decode(body)
    except Malformed:
        return "malformed"
    blocks = [
        (
            block.sender,
            block.names,
            block.seeds,
            block.streams.tolist(),
            block.times.tolist(),
            block.values.tobytes(),
        )
        for block in decoded.blocks
    ]
    return blocks, decoded.markers, decoded.ended, decoded.points, dict(decoded.rejected)
