"""Checks whether rows of a store's tables can have been written by a gateway; others are removed before reading."""

from __future__ import annotations

import json
from typing import Any

from esper_otel.frames.frame import WIDTH
from esper_otel.frames.records import MOST_BYTES
from esper_otel.gateway.items import MOST_ENDS, Origin, Place
from esper_otel.parts.senders import is_valid

_MOST_BODY_BYTES = 64 * 1024 * 1024
_MOST_HOLES, _MOST_UNITS = 1_000, 1_000
_MOST_TEXT = 4_096  # of an id or a name, which --limit text_bytes may allow, and of a unit, which may be escaped


def _whole(column: str, least: int = 0, bits: int = 53) -> str:
    return f"typeof({column}) <> 'integer' OR {column} < {least} OR {column} > {2**bits - 1}"


def _is_text(column: str) -> str:
    return f"typeof({column}) <> 'text' OR length({column}) > {_MOST_TEXT}"


_OF_WRITER = (_whole("run"), _whole("attempt", bits=63), _whole("rank", bits=31), _is_text("writer"))
# For each table, the SQL condition under which a row is damaged. NULL meets each condition.
DAMAGED = {
    "items": " OR ".join(
        (
            *(*_OF_WRITER, _whole("position", 1), _whole("number", 1), _whole("revision", 1, bits=32)),
            *(
                _whole("complete"),
                _whole("received", bits=63),
                "typeof(loss_before) NOT IN ('real', 'integer', 'null')",
            ),
            *(_whole("block"), _whole("place", bits=32), _whole("missed")),
        )
    ),
    "blocks": " OR ".join(
        (
            *(_whole("id"), _whole("run"), _whole("last", 1), _whole("count", 1, bits=32)),
            *("typeof(frames) <> 'blob'", f"length(frames) > {MOST_BYTES}"),
        )
    ),
    "ranks": " OR ".join((_whole("run"), _whole("rank", bits=31), _whole("last"))),
    "ends": " OR ".join((*_OF_WRITER, _is_text("outcome"))),
    "bodies": " OR ".join(
        (
            *(_whole("number", 1), _whole("is_json"), _whole("received", bits=63), _whole("tries"), _is_text("tenant")),
            *("typeof(body) <> 'blob'", f"length(body) > {_MOST_BODY_BYTES}"),
        )
    ),
}


def is_run(row: tuple[Any, ...]) -> bool:
    """Whether a row of ``runs`` is valid: its key, the run's id, the id of its store, the last position, the tenant."""
    key, run_id, life, last, tenant = row
    return (
        type(key) is int
        and all(type(text) is str for text in (run_id, life, tenant))
        and bool(run_id)
        and is_valid(run_id, _MOST_TEXT)
        and life.isalnum()
        and type(last) is int
        and 0 <= last < 2**53
    )


def place_of(run_id: str, row: tuple[Any, ...]) -> Place:
    """Reads a writer's place from a row of ``places`` without its first column, the run.

    Raises:
        ValueError, TypeError, RecursionError: the row is not valid.
    """
    attempt, rank, writer, next_number, lowest, missing, says_step, says_epoch, holes, ends, *about, said_units = row
    bounds = (
        (attempt, 63),
        (rank, 31),
        (next_number, 54),
        (lowest, 54),
        (missing, 54),
    )  # they must not grow past 63 bits
    numbers = [(number, bits) for number, bits in bounds if number is not None]
    host, revision, settings, validation_loss, location, device = about
    texts = (host, revision, settings, location, device)
    if any(type(text) is not str for text in (writer, *texts)) or any(
        type(number) is not int or not 0 <= number < 2**bits for number, bits in numbers
    ):
        raise ValueError("not the place of a writer")
    if type(validation_loss) not in {float, type(None)}:
        raise ValueError("a validation loss that is not a number")
    found = json.loads(holes)
    before = 0
    for first, behind in found:
        if type(first) is not int or type(behind) is not int or not before <= first < behind < 2**54:
            raise ValueError("holes that are not in order")
        before = behind
    if len(found) > _MOST_HOLES or None in (attempt, rank, missing):
        raise ValueError("not the place of a writer")
    to_come = tuple((time, seed, column) for time, seed, column in json.loads(ends))
    if len(to_come) > MOST_ENDS or not all(map(_is_end, to_come)):
        raise ValueError("ends of streams that cannot be")
    units = tuple((name, unit) for name, unit in json.loads(said_units))
    said = [text for pair in units for text in pair]
    if len(units) > _MOST_UNITS or not all(type(text) is str and is_valid(text, _MOST_TEXT) for text in said):
        raise ValueError("units that cannot be")
    origin = Origin(run_id, attempt, rank, writer)
    says = bool(says_step), bool(says_epoch)
    return Place(
        *(origin, next_number, lowest, missing, *says, tuple(map(tuple, found)), to_come),
        host=host,
        revision=revision,
        settings=settings,
        validation_loss=validation_loss,
        location=location,
        device=device,
        units=units,
    )


def _is_end(end: tuple[Any, Any, Any]) -> bool:
    time, seed, column = end
    is_one = type(time) is int and type(seed) is str and type(column) is int
    return is_one and 0 <= time < 2**64 and -1 <= column < WIDTH and is_valid(seed, _MOST_TEXT)
