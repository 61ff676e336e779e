"""Checks the directory of ``ESPER_EXPORT_FILE``: whether a run can write there, for how long, and what it writes."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from esper_otel.check.stages import CheckStage
from esper_otel.errors import ConfigurationError
from esper_otel.export.encode import Encoder
from esper_otel.export.file_sender import FileSender
from esper_otel.export.resource import resource_for
from esper_otel.export.transport import Result
from esper_otel.frames.frame import Frame, Run
from esper_otel.frames.ring import blocks_of
from esper_otel.schema import METRICS, new_check_id
from esper_otel.send.lines import lines_of

_WRITE_S = 5.0
_LEAST_ROOM_S = 60.0
_GIB = 1024**3

NOT_THROUGH = CheckStage(
    "through",
    False,
    "nothing is sent from here: neither the way from the files to the endpoint nor what arrives there can be checked",
    "where esper-otel send will run, and without ESPER_EXPORT_FILE: esper-otel check --through",
)


def in_folder(directory: Path, samples_per_s: float) -> Iterator[CheckStage]:
    """Yields what is found of the directory, up to the first fault. Nothing is left in it, and it is not made.

    Args:
        directory: where the files would be.
        samples_per_s: how many samples a run has in a second.
    """
    path = directory.absolute()
    yield CheckStage(
        "settings",
        True,
        f"every step is written to files in {path} and nothing is sent: OTEL_EXPORTER_OTLP_* are for esper-otel send",
    )
    fix = "correct ESPER_EXPORT_FILE, or the rights there"
    existing = path
    try:
        existing = next(each for each in (path, *path.parents) if each.exists())
        folder = tempfile.mkdtemp(prefix=".esper-otel-check-", dir=existing)
    except OSError as error:
        yield CheckStage("directory", False, f"{existing}: {error.strerror or error}", fix)
        return
    try:
        yield from _written(path, existing, Path(folder), samples_per_s)
    except (ConfigurationError, OSError) as error:
        yield CheckStage("directory", False, f"{path}: {getattr(error, 'strerror', None) or error}", fix)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _written(path: Path, existing: Path, folder: Path, samples_per_s: float) -> Iterator[CheckStage]:
    """Writes a step as a run would, and reads it back as ``esper-otel send`` would."""
    body, points = _step()
    sender = FileSender(folder)
    try:
        outcome = sender.send(body, _WRITE_S)
    finally:
        sender.close()
    if outcome.result is not Result.DELIVERED:
        yield CheckStage("directory", False, outcome.reason, "make room, or give another directory")
        return
    [file] = folder.iterdir()
    made = "can be written" if existing == path else f"does not exist yet and can be made in {existing}"
    yield CheckStage("directory", True, f"{path} {made}")
    bytes_per_s = samples_per_s * file.stat().st_size / points
    free_bytes = shutil.disk_usage(folder).free
    lasts_s = free_bytes / bytes_per_s
    room = f"{free_bytes / _GIB:.1f} GiB are free: for {lasts_s / 3600:,.1f} hours of one rank that records everything"
    yield CheckStage("room", lasts_s >= _LEAST_ROOM_S, room, "make room, or give another directory")
    if lasts_s < _LEAST_ROOM_S:
        return
    back = [ExportMetricsServiceRequest.FromString(line.body or b"") for line in lines_of(file, 0)]
    is_same = back == [ExportMetricsServiceRequest.FromString(body)]  # the order of the bytes says nothing
    how = "as it was" if is_same else "otherwise"
    message = f"a step that was written reads back {how}; deliver the files with esper-otel send {path}"
    yield CheckStage("format", is_same, message)


def _step() -> tuple[bytes, int]:
    """Returns a request with a step that has every metric of a step, and how many points it has."""
    now_ns = time.time_ns()
    names = tuple(sorted(metric.name for metric in METRICS if metric.level == "step" and metric.kind == "gauge"))
    run = Run(new_check_id(), now_ns // 1_000_000, device_type="cpu")
    frame = Frame(run, 1, 1, 0, now_ns, names, (0.123456789,) * len(names), {})
    [request] = Encoder({metric.name: metric for metric in METRICS}, resource_for).requests(blocks_of([frame]))
    return request.body, request.points
