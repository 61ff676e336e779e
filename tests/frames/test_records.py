"""Records: what goes into a file comes out of it, and nothing else does, whatever happened to the file."""

from __future__ import annotations

import gc
import struct
import tracemalloc
import weakref

import numpy as np
import pytest
from frame_examples import (
    RUN,
    block_of,
    frames,
    histories,
    lives,
    make_frame,
    records_of,
    rows_in,
    said_by,
    sealed,
    seed_table,
    taken_apart,
    with_recorded,
)
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from esper_otel.export.resource import resource_for
from esper_otel.frames import records
from esper_otel.frames.frame import ABSENT_BITS, NO_SEEDS, Frame, SeedTable
from esper_otel.frames.records import DamagedRecord, RecordWriter, StoredContext, chunks_in, frames_in
from esper_otel.schema import METRICS, Metric

pytestmark = pytest.mark.lengthy

CATALOGUE = {metric.name: metric for metric in METRICS}


def written(frames: list[Frame]) -> list[bytes]:
    return records_of(RecordWriter(CATALOGUE, resource_for), frames)


def read(content: bytes, stored: StoredContext | None = None) -> list[object]:
    """All that an exporter reads of each row."""
    return [said for chunk in chunks_in(content, stored or StoredContext()) for said in rows_in(chunk)]


@examples(20)
@given(histories() | lives())
def test_steps_come_back_bit_for_bit(frames: list[Frame]) -> None:
    """NaN, infinities, absent cells, and a device that becomes known on the way."""
    assert read(b"".join(written(frames))) == list(map(said_by, frames))


def test_a_last_step_without_the_seeds_of_the_first_comes_back() -> None:
    """Its row ends with the buffer: an array of rows as long as the first one's does not fit."""
    first, last = (make_frame(sequence=number, global_step=number) for number in (1, 2))
    history = [first, last._replace(seeds=NO_SEEDS, live=NO_SEEDS)]
    assert read(b"".join(written(history))) == list(map(said_by, history))


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


@examples(50)
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
    stored = StoredContext()
    chunks = list(chunks_in(b"".join([*records[:2], damaged, *records[3:]]), stored))
    assert [(chunk.first, chunk.last) for chunk in chunks] == [(1, 2), (4, 5)]
    [damage] = stored.damage
    assert str(damage) == f"byte {len(records[0] + records[1])}: these bytes are not a whole record"
    assert damage.content == bytes(damaged)


def test_a_whole_record_that_says_a_run_which_is_not_one_is_skipped() -> None:
    """Found by fuzzing: a number where the run's fields should be stopped the reading of the file."""
    record = sealed([b"R" + struct.pack("<I", 9) + b'[5, {}, ""]'])
    stored, frame = StoredContext(), make_frame(sequence=3)
    assert read(record + b"".join(written([frame])), stored) == [said_by(frame)]
    assert stored.skipped == 1
    assert list(map(str, stored.damage)) == ["byte 0: ValueError: a run has other fields"]


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


# -- blocks of a store: steps with their live seeds ---------------------------------------------------------


def bits(frame: Frame) -> object:
    """All that is in a frame, its doubles bit for bit."""
    tables = [t.ids and (t.ids, t.cells.shape, t.cells.tobytes()) for t in (frame.seeds, frame.live)]
    values = [(*each, *(struct.pack("<d", v) for v in each.values())) for each in (frame.context, *frame[11:])]
    numbers = [struct.pack("<d", number) for number in frame.numbers]
    return (*frame[:5], frame.names, numbers, values, tables, frame.retired)


@examples(20)
@given(st.lists(frames(), max_size=3) | lives(max_size=6), st.data())
def test_a_block_gives_back_each_frame_bit_for_bit(some: list[Frame], data: st.DataObject) -> None:
    """Whatever its number: of a sender that does not number its steps, of a revision, at any time."""
    number = st.sampled_from([0, 0, 1, 7, 2**53])
    some = [frame._replace(sequence=data.draw(number)) for frame in some]
    wide = [SeedTable.wide if data.draw(st.booleans()) else SeedTable._replace for _ in some]
    some = [frame._replace(seeds=widen(frame.seeds)) for frame, widen in zip(some, wide, strict=True)]
    if some:
        assert list(map(bits, frames_in(block_of(some)))) == list(map(bits, some))


@given(st.lists(st.integers(0, 2**64 - 1) | st.just(ABSENT_BITS), min_size=10, max_size=10))
def test_every_double_keeps_its_bits(words: list[int]) -> None:
    """A NaN may have any payload; one of them means that a cell is absent."""
    cells = np.array([words], np.uint64).view(np.float64)
    numbers = tuple(cells[0].tolist())
    seeds = SeedTable(("s",), cells)
    frame = make_frame()._replace(names=tuple("abcdefghij"), numbers=numbers, seeds=seeds, live=seeds)
    for [found] in (frames_in(block_of([frame])), [c.frame(0, seeds) for c in chunks_in(block_of([frame]), _any())]):
        assert struct.pack("<10d", *found.numbers) == struct.pack("<10d", *numbers)
        assert found.seeds.cells.tobytes() == cells.tobytes()


def _any() -> StoredContext:
    return StoredContext()


def test_live_seeds_are_written_once_while_they_stay_the_same() -> None:
    """And not at all where a step recorded every one of them."""
    many = seed_table({f"s{number}": {"alpha": 0.5} for number in range(100)})
    none = make_frame(live=many, seeds=SeedTable((), many.cells[:0]))
    whole = make_frame(live=many, seeds=many)
    assert [content[:1] for content in taken_apart(block_of([none] * 3))] == [*(b"S", b"A", b"R", b"L"), *[b"F"] * 3]
    assert [content[:1] for content in taken_apart(block_of([whole] * 2))] == [*(b"R", b"L", b"S"), *[b"F"] * 2]
    [first, second] = frames_in(block_of([whole, whole]))
    assert first.live.cells is first.seeds.cells
    assert second.live.ids == many.ids


@examples(30)
@given(st.lists(frames(), min_size=1, max_size=2), st.data())
def test_a_block_that_was_changed_is_damaged_or_the_same(some: list[Frame], data: st.DataObject) -> None:
    """Cut short, a bit flipped, bytes left out or added: never another number."""
    content = bytearray(block_of(some))
    place = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "delete"]))
    if kind == "flip":
        content[place] ^= data.draw(st.integers(1, 255))
    elif kind == "insert":
        content[place:place] = data.draw(st.binary(min_size=1, max_size=40))
    else:
        del content[place : None if kind == "cut" else place + data.draw(st.integers(1, 40))]
    try:
        found = frames_in(bytes(content))
    except DamagedRecord:
        return
    originals = list(map(bits, some))
    assert [original for original in originals if original in list(map(bits, found))] == list(map(bits, found))


# -- what a small file may cost ------------------------------------------------------------------------------


def peak(content: bytes) -> int:
    """How much memory is taken at most while a file is read."""
    tracemalloc.start()
    try:
        read(content)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_lengths_and_counts_are_checked_before_memory_is_taken() -> None:
    """A length of 4 GiB, retired ids of 4 GiB, a text of a million parts, steps that never follow each other."""
    long = struct.pack("<4sII", records._MAGIC, 2**32 - 1, 0) + b"F" * 100
    [*_, row] = taken_apart(block_of([make_frame()]))
    retired = sealed([row[:21] + b"\xff\xff\xff\xff" + row[25:]])
    parts = sealed([b"L\x01\0\0\0[" + b"[]," * 600_000 + b"[]]"])
    apart = block_of([make_frame(sequence=number) for number in range(1, 2_000, 2)])
    for content in (long, retired, parts, apart):
        assert peak(content) < 4 * len(content) + 2**20


def test_lengths_that_lie_do_not_make_reading_slow() -> None:
    """Each would have the checksum of nearly the whole file computed: 2.4 TB in all. No clock is needed to notice."""
    content = struct.pack("<4sII", records._MAGIC, 2**20, 0) * 200_000
    stored = StoredContext()
    assert read(content, stored) == []
    assert stored.is_torn
    assert len(stored.damage) <= records._MOST_DAMAGE
