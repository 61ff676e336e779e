"""The command ``esper-otel pull``: prints the packets of a run as they arrive."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from esper_otel.errors import ConfigurationError, GatewayUnavailable, StaleCursor, UnknownRun
from esper_otel.hours.bar import RunHours
from esper_otel.hours.output import hours_as_json, hours_lines
from esper_otel.leyline.packets import Packets, Page
from esper_otel.local_ports import gateway_here
from esper_otel.pull.client import TamiyoClient
from esper_otel.pull.event_infos import EventInfo, EventPage
from esper_otel.pull.infos import RunInfo
from esper_otel.pull.messages import step_message
from esper_otel.pull.views import RunRanks
from esper_otel.text import printable
from esper_otel.varint import varint

_WAIT_S = 5.0
_AGAIN_S = 1.0
_AWAY_S = 3.0
_MOST = 1000
_MOST_LINE = 100_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``esper-otel pull``."""
    parser.add_argument("run_id", nargs="?", metavar="RUN", help="the run; without it, known runs are listed")
    parser.add_argument(
        "--target",
        metavar="ADDRESS",
        help="the gateway, or several with commas between them (127.0.0.1:4327; if nobody listens there, "
        "127.0.0.1:4317, where esper-otel ui listens)",
    )
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="file with the bearer token")
    parser.add_argument(
        "--ca-file", type=Path, metavar="FILE", help="authority of the gateway's certificate, PEM; enables TLS"
    )
    parser.add_argument("--cert-file", type=Path, metavar="FILE", help="the puller's own certificate, for mutual TLS")
    parser.add_argument("--key-file", type=Path, metavar="FILE", help="key of that certificate")
    parser.add_argument("--rank", type=rank_number, metavar="N", help="one rank only (all)")
    parser.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="part I of N, from 0 on, of a run on Kafka that controllers share",
    )
    parser.add_argument("--cursor", metavar="TEXT", help="start after this cursor (at the oldest step stored)")
    parser.add_argument("--follow", action="store_true", help="wait for further steps, until Ctrl-C")
    parser.add_argument("--ranks", action="store_true", help="compare the run's ranks, instead of printing packets")
    parser.add_argument(
        "--hours", action="store_true", help="print where the hours of the run went, instead of packets"
    )
    parser.add_argument(
        "--events", action="store_true", help="print the run's events as JSON lines, instead of packets"
    )
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="one JSON object per line")
    shape.add_argument(
        "--binary", action="store_true", help="esper.gateway.v1.Step messages, each preceded by its length as a varint"
    )


def main(options: argparse.Namespace) -> int:
    """Prints the stored steps, and with --follow also new ones; the last cursor is written to standard error.

    Raises:
        ConfigurationError: options contradict each other, or there is no such rank.
    """
    if options.hours:
        _check_alone(options, "hours", ("follow", "binary", "ranks", "events", "shard", "cursor"))
    if options.events:
        _check_alone(options, "events", ("binary", "ranks", "shard"))
    with TamiyoClient(
        options.target or gateway_here(),
        token_file=options.token_file,
        ca_file=options.ca_file,
        certificate_file=options.cert_file,
        key_file=options.key_file,
        timeout_s=_AWAY_S,
    ) as client:
        if options.run_id is None:
            _write_runs(client.runs(), as_json=options.json)
            return 0
        if options.ranks:
            _write_ranks(client.ranks(options.run_id), as_json=options.json)
            return 0
        if options.hours:
            _write_hours(_of_rank(client.hours(options.run_id), options.rank), as_json=options.json)
            return 0
        write: Callable[[Any], None]
        write = _write_json if options.json else _write_binary if options.binary else _write_text
        cursor = options.cursor or ""
        interrupt = _Interrupt()
        try:
            while True:
                interrupt.check()
                cursor, count = _print_page(client, options, cursor, _write_event if options.events else write)
                if not count and not options.follow:
                    return 0
        finally:
            if cursor:
                _say(f"cursor {cursor}")


def _check_alone(options: argparse.Namespace, what: str, others: Sequence[str]) -> None:
    """Refuses options that mean nothing with another one."""
    if options.run_id is None:
        raise ConfigurationError(f"--{what} needs a RUN")
    for name in others:
        if getattr(options, name):
            raise ConfigurationError(f"--{what} cannot be combined with --{name}")


def _of_rank(hours: RunHours, rank: int | None) -> RunHours:
    """Returns the hours of one rank alone; all if it is None."""
    if rank is None:
        return hours
    if rank not in hours.ranks:
        known = ", ".join(map(str, hours.ranks))
        raise ConfigurationError(f"the run has no rank {rank}; it has {known}")
    bar = hours.ranks[rank]
    return RunHours(bar, {rank: bar}, tuple(phase for phase in hours.phases if phase.rank == rank))


class _Interrupt:
    """Remembers Ctrl-C: if it arrives in a callback, such as gRPC's, Python only prints the exception and goes on."""

    def __init__(self) -> None:
        self._has_come = False
        signal.signal(signal.SIGINT, self)

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        self._has_come = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raises KeyboardInterrupt if Ctrl-C was pressed."""
        if self._has_come:
            raise KeyboardInterrupt


def _print_page(
    client: TamiyoClient, options: argparse.Namespace, cursor: str, write: Callable[[Any], None]
) -> tuple[str, int]:
    """Prints a page; returns the cursor to continue from, and the number of steps or events."""
    what = "events" if options.events else "steps"
    try:
        page = _pulled(client, options, cursor)
    except StaleCursor as error:
        if not options.follow or cursor == options.cursor:
            raise
        _say(f"{error}; continuing with the oldest of the {what} that are stored")
        return "", 0
    except (GatewayUnavailable, UnknownRun) as error:
        if not options.follow:
            raise
        _say(f"{error}; retrying")
        time.sleep(_AGAIN_S)
        return cursor, 0
    if page.gap:
        _say(f"{page.gap} {what} before the next one were dropped, or have not arrived")
    for each in page:
        write(each)
    sys.stdout.flush()
    return page.cursor, len(page)


def _pulled(client: TamiyoClient, options: argparse.Namespace, cursor: str) -> Page | EventPage:
    """Returns the next page of what is asked for."""
    run_id, rank, wait_s = options.run_id, options.rank, _WAIT_S if options.follow else 0.0
    if options.events:
        return client.events(run_id, cursor, rank=rank, max_events=_MOST, wait_s=wait_s)
    return client.pull(run_id, cursor, rank=rank, shard=options.shard, max_packets=_MOST, wait_s=wait_s)


def _say(message: str) -> None:
    sys.stderr.write(f"esper-otel: {printable(message, _MOST_LINE)}\n")
    sys.stderr.flush()


def _write_line(text: str) -> None:
    """Prints a line. Texts from senders are made printable, so that they cannot start a line or move the cursor."""
    sys.stdout.write(printable(text, _MOST_LINE) + "\n")


def _write_text(packets: Packets) -> None:
    state = packets.state
    marks = [f"seeds {len(state.seed_states)}", f"rank {packets.rank}", f"attempt {packets.attempt}"]
    marks += [f"writer {packets.writer}"] if packets.writer else []
    marks += [f"revision {packets.revision}"] if packets.revision > 1 else []
    marks += [] if packets.complete else ["incomplete"]
    marks += [event.description for packet in packets.telemetry for event in packet.events]
    loss = f"{state.training_loss:.6g}" if "loss" in packets.names else "none"
    _write_line(f"step {packets.step}  loss {loss}  {'  '.join(marks)}")


def _write_json(packets: Packets) -> None:
    sys.stdout.write(json.dumps(as_json(packets), allow_nan=False) + "\n")


def _write_event(event: EventInfo) -> None:
    sys.stdout.write(json.dumps(asdict(event), allow_nan=False) + "\n")


def _write_binary(packets: Packets) -> None:
    content = step_message(packets).SerializeToString()
    sys.stdout.buffer.write(varint(len(content)) + content)


def _write_runs(runs: list[RunInfo], *, as_json: bool) -> None:
    for run in runs:
        said = {name: getattr(run, name) for name in RunInfo.__slots__}
        if as_json:
            sys.stdout.write(json.dumps(said) + "\n")
            continue
        steps = "none" if run.last_step is None else f"{run.first_step} to {run.last_step}"
        marks = [f"rank {run.rank} of {run.world_size}", f"steps {steps}", f"stored {run.stored}"]
        marks += [f"ended {run.ended}"] if run.ended else []
        marks += [f"the whole run ended {run.run_ended}"] if run.run_ended and run.run_ended != run.ended else []
        marks += ["resumed"] if run.resumed else []
        counts = ("missing", "unseen", "incomplete", "differing", "too_late")
        marks += [f"{name.replace('_', ' ')} {said[name]}" for name in counts if said[name]]
        marks += [f"writer {run.writer}"] if run.writer else []
        _write_line(f"{run.run_id}  attempt {run.attempt}  {'  '.join(marks)}")
    if not runs:
        _say("there are no runs yet")


def _write_ranks(found: RunRanks, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(asdict(found)) + "\n")
        return
    _write_line(f"steps {found.first_step} to {found.last_step}, {len(found.ranks)} of {found.world_size} ranks")
    for row in found.ranks:
        named = (("step", row.step_latency_ms), ("input wait", row.input_wait_ms), ("cycle", row.cycle_ms))
        times = [f"{name} {_in_ms(value)}" for name, value in named]
        is_slowest = row.rank == found.slowest_rank
        mark = f"  <- the slowest, by {found.slowest_by}" if is_slowest else ""
        _write_line(f"rank {row.rank}  {'  '.join(times)}{mark}")
    spreads = f"step {_in_ms(found.step_latency_spread_ms)}, input wait {_in_ms(found.input_wait_spread_ms)}"
    _write_line(f"spread over the ranks: {spreads}")


def _write_hours(found: RunHours, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(hours_as_json(found)) + "\n")
        return
    for line in hours_lines(found):
        _write_line(line)


def _in_ms(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f} ms"


def as_json(packets: Packets) -> dict[str, Any]:
    """Returns a step for a JSON line. Every number in packets is finite, so that JSON can represent it."""
    return {
        "run_id": packets.run_id,
        "attempt": packets.attempt,
        "rank": packets.rank,
        "writer": packets.writer,
        "step": packets.step,
        "revision": packets.revision,
        "complete": packets.complete,
        "age_s": packets.age_s,
        "names": sorted(packets.names),
        "state": _as_dict(packets.state),
        "telemetry": [_as_dict(packet) for packet in packets.telemetry],
    }


def _as_dict(packet: Message) -> dict[str, Any]:
    return MessageToDict(packet, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part, such as 0/4")
    return int(part), int(parts)


def rank_number(text: str) -> int:
    """Reads a rank from the command line."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)
