"""Records: what goes into a file comes out of it, and nothing else does, whatever happened to the file."""

from __future__ import annotations

import struct
import zlib

from frame_examples import RUN, histories, make_frame, seed_table, with_recorded
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_otel.export.resource import resource_for
from esper_otel.frames.frame import Frame
from esper_otel.frames.records import RecordWriter, StoredContext, frames_in
from esper_otel.schema import METRICS, Metric

CATALOGUE = {metric.name: metric for metric in METRICS}


def written(frames: list[Frame]) -> bytes:
    writer = RecordWriter(CATALOGUE, resource_for)
    return b"".join(map(writer.record, frames))


def read(content: bytes) -> list[Frame]:
    return list(frames_in(content, StoredContext()))


def said(frame: Frame) -> object:
    """All that an exporter reads of a frame, comparable: doubles by their bits."""
    values = {name: struct.pack("<d", value) for name, value in frame.values().items()}
    return (
        (frame.run, frame.sequence, frame.time_unix_ns, values, frame.retired),
        (frame.seeds.ids, frame.seeds.cells.tobytes(), frame.live.ids),
    )


@settings(deadline=None)
@given(histories())
def test_frames_come_back_bit_for_bit(frames: list[Frame]) -> None:
    """NaN, infinities, absent cells and a device that becomes known on the way."""
    assert list(map(said, read(written(frames)))) == list(map(said, frames))


@settings(deadline=None)
@given(histories(), st.integers(0, 10_000))
def test_a_file_that_was_cut_short_gives_all_that_is_whole(frames: list[Frame], cut: int) -> None:
    """The process was killed, or the disk was full, in the middle of a frame."""
    writer = RecordWriter(CATALOGUE, resource_for)
    records = [writer.record(frame) for frame in frames]
    content = b"".join(records)[:cut]
    ends = [sum(map(len, records[: number + 1])) for number in range(len(records))]
    whole = sum(end <= cut for end in ends)
    stored = StoredContext()
    assert list(map(said, frames_in(content, stored))) == list(map(said, frames[:whole]))
    assert stored.is_torn == (len(content) > ([0, *ends])[whole])


def test_a_file_cut_exactly_before_its_first_frame_is_torn() -> None:
    """The run that the frame refers to is whole, and the frame is missing."""
    whole = written([make_frame()])
    head = whole[: whole.rindex(whole[:4])]
    stored = StoredContext()
    assert list(frames_in(head, stored)) == []
    assert (len(stored.resources), stored.is_torn) == (1, True)


@settings(deadline=None, max_examples=300)
@given(histories(max_size=4), st.data())
def test_a_damaged_file_gives_only_what_was_written(frames: list[Frame], data: st.DataObject) -> None:
    """A wrong number is worse than none; frames whose names or seeds were lost are lost, not renamed."""
    content = bytearray(written(frames))
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
    originals = list(map(repr, map(said, frames)))
    found = [repr(said(frame)) for frame in read(bytes(content))]
    assert [original for original in originals if original in found] == found


def test_what_follows_the_damage_is_read() -> None:
    """One bad sector costs the frames in it."""
    frames = [make_frame(sequence=number, time_unix_ns=number) for number in range(1, 6)]
    writer = RecordWriter(CATALOGUE, resource_for)
    records = [writer.record(frame) for frame in frames]
    damaged = bytearray(records[2])
    damaged[len(damaged) // 2] ^= 1
    assert [frame.sequence for frame in read(b"".join([*records[:2], damaged, *records[3:]]))] == [1, 2, 4, 5]


def test_a_whole_record_that_says_a_run_which_is_not_one_is_skipped() -> None:
    """Found by fuzzing: a number where the run's fields should be stopped the reading of the file."""
    content = b"R" + struct.pack("<I", 9) + b'[5, {}, ""]'
    record = struct.pack("<4sII", b"\xe5\x9e\x0f1", len(content), zlib.crc32(content)) + content
    stored = StoredContext()
    assert [frame.sequence for frame in frames_in(record + written([make_frame(sequence=3)]), stored)] == [3]
    assert stored.skipped == 1


def test_names_and_seed_ids_that_read_alike_stay_apart() -> None:
    """A seed may be called what a metric is called."""
    seeds = seed_table({"loss": {"alpha": 0.5}})
    frame = make_frame(seeds=seeds, live=seeds)
    assert said(read(written([frame]))[0]) == said(frame)


def test_the_users_own_metrics_and_the_resource_come_with_the_frames() -> None:
    """The next start may be another program, on behalf of another run."""
    own = Metric("tokens_per_s", unit="rate", description="Tokens a second.")
    writer = RecordWriter({**CATALOGUE, own.name: own}, resource_for)
    stored = StoredContext()
    list(frames_in(writer.record(with_recorded(make_frame(), {"tokens_per_s": 3.0})), stored))
    assert stored.metrics == {"tokens_per_s": own}
    assert stored.resources[RUN].attributes == resource_for(RUN).attributes
