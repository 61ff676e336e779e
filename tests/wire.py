"""Frames on the wire, for tests: requests as the exporter makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from frame_examples import RUN, TIME_UNIX_NS, make_frame
from opentelemetry.sdk.resources import Resource

from esper_otel.export.encode import Encoder
from esper_otel.frames.frame import Frame, Run
from esper_otel.frames.ring import blocks_of
from esper_otel.gateway.receive.request import DecodedRequest, Malformed, PointSender
from esper_otel.schema import METRICS
from esper_otel.varint import field_head

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


def counts_of(run: Run = RUN, time_unix_ns: int = TIME_UNIX_NS, process: str = "") -> bytes:
    """A request with nothing but counts, as a trainer sends it while it takes no steps."""
    made = encoder(process)
    values = {("esper.frames.recorded", ""): 1.0}
    return made.alone(run, made.health_scope(values, start_unix_ns=time_unix_ns, time_unix_ns=time_unix_ns))


def end_of(run: Run = RUN, outcome: str = "RuntimeError") -> bytes:
    """A request that says how a run has ended, and nothing else."""
    made = encoder()
    values = {("esper.run.ended", outcome): 1.0}
    return made.alone(run, made.health_scope(values, start_unix_ns=TIME_UNIX_NS, time_unix_ns=TIME_UNIX_NS))


def as_collector(message: Any) -> bytes:
    """Serializes a message as the collector does: its fields in descending order."""
    parts = []
    for field, value in sorted(message.ListFields(), key=lambda each: -each[0].number):
        for each in value if field.is_repeated else [value]:
            if field.type == field.TYPE_MESSAGE:
                content = as_collector(each)
                parts.append(field_head(field.number, len(content)) + content)
                continue
            alone = type(message)()
            if field.is_repeated:
                getattr(alone, field.name).append(each)
            else:
                setattr(alone, field.name, each)
            parts.append(alone.SerializeToString())
    return b"".join(parts)


def said(decode: Callable[[bytes], DecodedRequest], body: bytes) -> object:
    """What a decoder says, comparable; the word for a request that it refuses."""
    try:
        decoded = decode(body)
    except Malformed:
        return "malformed"
    senders: dict[PointSender, list[tuple[int, str, str, bytes]]] = {}
    for block in decoded.blocks:
        seed, name = np.divmod(block.streams, len(block.names))
        senders.setdefault(block.sender, []).extend(
            (time, block.names[n], block.seeds[s - 1] if s else "", value.tobytes())
            for time, n, s, value in zip(block.times.tolist(), name.tolist(), seed.tolist(), block.values, strict=True)
        )
    # A request may have several blocks of one sender.
    points = {sender: sorted(of_sender, key=lambda point: point[0]) for sender, of_sender in senders.items()}
    units = {(block.sender, *pair) for block in decoded.blocks for pair in block.units}
    return (
        points,
        decoded.markers,
        decoded.ended,
        decoded.points,
        dict(decoded.rejected),
        decoded.metrics,
        {*decoded.cut},
        {*decoded.alive},
        {*decoded.devices},
        units,
    )
