"""Records: what goes into a file comes out of it, and nothing else does, whatever happened to the file."""

from __future__ import annotations

import gc
import struct
import weakref

import pytest
from frame_examples import RUN, histories, lives, make_frame, records_of, rows_in, said_by, seed_table, with_recorded
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_otel.export.resource import resource_for
from esper_otel.frames import records
from esper_otel.frames.frame import Frame
from esper_otel.frames.records import RecordWriter, StoredContext, chunks_in
from esper_otel.schema import METRICS, Metric

pytestmark = pytest.mark.lengthy

CATALOGUE = {metric.name: metric for metric in METRICS}


def written(frames: list[Frame]) -> list[bytes]:
    return records_of(RecordWriter(CATALOGUE, resource_for), frames)


def read(content: bytes, stored: StoredContext | None = None) -> list[object]:
    """All that an exporter reads of each row."""
    return [said for chunk in chunks_in(content, stored or StoredContext()) for said in rows_in(chunk)]


@settings(deadline=None)
@given(histories() | lives())
def test_steps_come_back_bit_for_bit(frames: list[Frame]) -> None:
    """NaN, infinities, absent cells, and a device that becomes known on the way."""
    assert read(b"".join(written(frames))) == list(map(said_by, frames))


def test_many_steps_come_back_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk ends where it is full; a row that is larger than a chunk gets one of its own."""
    monkeypatch.setattr(records, "_CHUNK_BYTES", 2_000)
    large = seed_table({f"s{number}": {"alpha": 0.5} for number in range(100)})
    frames = [make_frame(sequence=number, global_step=number) for number in range(1, 101)]
    frames[50] = frames[50]._replace(seeds=large, live=large)
    chunks = list(chunks_in(b"".join(written(frames)), StoredContext()))
    assert 5 < len(chunks) < 20
    assert [said for chunk in chunks for said in rows_in(chunk)] == list(map(said_by, frames))


def test_what_was_read_is_freed_with_its_last_reader() -> None:
    """No collection of garbage is needed for it."""

    [chunk] = chunks_in(b"".join(written([make_frame()])), StoredContext())
    layout = weakref.ref(chunk.layouts[0])
    gc.disable()
    try:
        del chunk
        assert layout() is None
    finally:
        gc.enable()


@settings(deadline=None)
@given(histories(), st.integers(0, 10_000))
def test_a_file_that_was_cut_short_gives_all_that_is_whole(frames: list[Frame], cut: int) -> None:
    """The process was killed, or the disk was full, in the middle of a step."""
    records = written(frames)
    content = b"".join(records)[:cut]
    ends = [sum(map(len, records[: number + 1])) for number in range(len(records))]
    whole = sum(end <= cut for end in ends)
    stored = StoredContext()
    assert read(content, stored) == list(map(said_by, frames[:whole]))
    assert stored.is_torn == (len(content) > ([0, *ends])[whole])


def test_a_file_cut_exactly_before_its_first_step_is_torn() -> None:
    """The run that the step refers to is whole, and the step is missing."""
    [whole] = written([make_frame()])
    head = whole[: whole.rindex(whole[:4])]
    stored = StoredContext()
    assert read(head, stored) == []
    assert (len(stored.resources), stored.is_torn) == (1, True)


@settings(deadline=None, max_examples=100)
@given(histories(max_size=4), st.data())
def test_a_damaged_file_gives_only_what_was_written(frames: list[Frame], data: st.DataObject) -> None:
    """A wrong number is worse than none; steps whose names or seeds were lost are lost, not renamed."""
    content = bytearray(b"".join(written(frames)))
    for _ in range(data.draw(st.integers(1, 4))):
        if not content:
            return
        place = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["flip", "insert", "delete"]))
        if kind == "flip":
            content[place] ^= data.draw(st.integers(1, 255))
        elif kind == "insert":
            content[place:place] = data.draw(st.binary(max_size=40))
        else:
            del content[place : place + data.draw(st.integers(1, 40))]
    originals = list(map(said_by, frames))
    found = read(bytes(content))
    assert [original for original in originals if original in found] == found


def test_what_follows_the_damage_is_read() -> None:
    """One bad sector costs the steps in it."""
    frames = [make_frame(sequence=number, time_unix_ns=number) for number in range(1, 6)]
    records = written(frames)
    damaged = bytearray(records[2])
    damaged[len(damaged) // 2] ^= 1
    chunks = list(chunks_in(b"".join([*records[:2], damaged, *records[3:]]), StoredContext()))
    assert [(chunk.first, chunk.last) for chunk in chunks] == [(1, 2), (4, 5)]


def test_a_whole_record_that_says_a_run_which_is_not_one_is_skipped() -> None:
    """Found by fuzzing: a number where the run's fields should be stopped the reading of the file."""
    record = records._record(b"R" + struct.pack("<I", 9) + b'[5, {}, ""]')
    stored, frame = StoredContext(), make_frame(sequence=3)
    assert read(record + b"".join(written([frame])), stored) == [said_by(frame)]
    assert stored.skipped == 1


def test_values_come_back_with_where_they_are_from() -> None:
    """Of several of one name, the one that counts is the same."""
    frame = make_frame(
        recorded={"loss": 3.0, "esper.steps.backwards": 1.0},
        derived={"loss": 1.0, "lr": 1.0},
        context={"loss": 2.0, "validation_loss": 2.0},
        probed={"gpu_utilisation": 0.5, "lr": 4.0},
    )
    [chunk] = chunks_in(b"".join(written([frame])), StoredContext())
    assert rows_in(chunk) == [said_by(frame)]
    view = chunk.frame(0, frame.live)
    assert (view.derived, view.context, view.probed) == (frame.derived, frame.context, frame.probed)
    assert view.recorded == frame.recorded


def test_names_and_seed_ids_that_read_alike_stay_apart() -> None:
    """A seed may be called what a metric is called."""
    seeds = seed_table({"loss": {"alpha": 0.5}})
    frame = make_frame(seeds=seeds, live=seeds)
    assert read(b"".join(written([frame]))) == [said_by(frame)]


def test_the_users_own_metrics_and_the_resource_come_with_the_steps() -> None:
    """The next start may be another program, on behalf of another run."""
    own = Metric("tokens_per_s", unit="rate", description="Tokens a second.")
    writer = RecordWriter({**CATALOGUE, own.name: own}, resource_for)
    stored = StoredContext()
    read(b"".join(records_of(writer, [with_recorded(make_frame(), {"tokens_per_s": 3.0})])), stored)
    assert stored.metrics == {"tokens_per_s": own}
    assert stored.resources[RUN].attributes == resource_for(RUN).attributes
