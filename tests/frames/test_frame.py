"""Tables of seeds: the number of their columns is a matter of memory and never of meaning."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from frame_examples import append, block_of, frames, histories, make_frame, records_of, rows_in, seed_table
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from rows import plain, rows

from esper_otel.export.encode import Encoder
from esper_otel.export.resource import resource_for
from esper_otel.export.streams import Streams
from esper_otel.frames.frame import NARROW, WIDTH, Frame, SeedTable, alike
from esper_otel.frames.live_seeds import LiveSeeds
from esper_otel.frames.records import RecordWriter, StoredContext, chunks_in, frames_in
from esper_otel.frames.ring import Ring, blocks_of
from esper_otel.gateway.rebuild.history import _is_same
from esper_otel.leyline import packets
from esper_otel.parts.part import part_of
from esper_otel.schema import METRICS

CATALOGUE = {metric.name: metric for metric in METRICS}


def widened(frame: Frame, choices: Sequence[bool]) -> Frame:
    """The same frame, with all columns in the tables that are chosen."""
    seeds, live = (table.wide() if chosen else table for table, chosen in zip(frame[8:10], choices, strict=True))
    return frame._replace(seeds=seeds, live=live)


def noted(history: Sequence[Frame]) -> list[object]:
    """What an exporter says of the ends of series."""
    streams, said = Streams(), []
    for frame in history:
        [block] = blocks_of([frame])
        [ended] = streams.note([block]).values() or [()]
        said.append(sorted((name, *attributes.items()) for name, attributes in ended))
        streams.settled(frame.sequence)
    return [said, sorted((name, *attributes.items()) for name, attributes in streams.all_ended())]


def sent(history: Sequence[Frame]) -> list[bytes]:
    def fail(where: str, error: Exception) -> None:
        raise AssertionError(where) from error

    return [request.body for request in Encoder(CATALOGUE, resource_for).requests(blocks_of(history))]


def spooled(history: Sequence[Frame]) -> list[object]:
    content = b"".join(records_of(RecordWriter(CATALOGUE, resource_for), history))
    return [said for chunk in chunks_in(content, StoredContext()) for said in rows_in(chunk)]


def stored(history: Sequence[Frame]) -> list[object]:
    return [repr(plain(table)) for f in frames_in(block_of(history)) for table in f[8:10]]


def as_rows(history: Sequence[Frame]) -> list[object]:
    ring = Ring(2**20)
    for frame in history:
        append(ring, frame)
    return [repr((frame.values(), dict(frame.seeds.rows()))) for frame in ring.after(0, 1_000)[0]]


def pulled(history: Sequence[Frame]) -> list[object]:
    return [(made.state, made.telemetry, made.names) for made in (packets(f, now_unix_ns=0) for f in history)]


def parts(history: Sequence[Frame]) -> list[object]:
    return [
        sorted(zip(p.shape.streams, map(repr, p.numbers), strict=True))
        for p in (part_of(f, complete=True) for f in history)
    ]


def lived(history: Sequence[Frame]) -> list[object]:
    """What the live seeds become, and what of each step counts."""
    live, said = LiveSeeds(), list[object]()
    for frame in history:
        step = live.step(frame.seeds)
        live.commit(step)
        said.append((repr(plain(step.recorded)), repr(plain(step.live)), repr(step[2:5])))
        if frame.global_step % 3 == 0:
            live.retire(frame.seeds.ids[:1])
    return said


@examples(20)
@given(histories(), st.data())
def test_every_reader_of_tables_says_the_same_of_wide_ones(history: list[Frame], data: st.DataObject) -> None:
    """A step in which one seed has a further field makes the tables of all seeds wide, and nothing else different."""
    retired = st.sampled_from([(), ("a",), ("a", "b")])
    history = [frame._replace(retired=data.draw(retired)) for frame in history]
    other = [widened(frame, data.draw(st.tuples(st.booleans(), st.booleans()))) for frame in history]
    readers: list[Callable[[Sequence[Frame]], Sequence[object]]] = [
        noted,
        sent,
        spooled,
        stored,
        as_rows,
        pulled,
        parts,
    ]
    for reader in (*readers, lived):
        assert reader(other) == reader(history), reader.__name__


@given(frames(), st.tuples(st.booleans(), st.booleans()))
def test_a_correction_is_one_of_values_and_not_of_columns(frame: Frame, choices: tuple[bool, bool]) -> None:
    """A puller gets no new revision of a step for a table that only became wider."""
    assert _is_same(frame, widened(frame, choices))


@given(st.lists(st.dictionaries(st.sampled_from(["a", "b"]), rows), max_size=4))
def test_tables_become_alike_and_stay_what_they_were(given: list[dict[str, dict[str, float]]]) -> None:
    """Those that are alike already are not copied."""
    tables = [seed_table(each) for each in given]
    made = alike(*tables)
    assert len({table.cells.shape[1] for table in made}) <= 1
    assert [repr(plain(table)) for table in made] == [repr(plain(table)) for table in tables]
    if len({table.cells.shape[1] for table in tables}) == 1:
        assert all(one is other for one, other in zip(made, tables, strict=True))


def test_a_series_ends_once_however_wide_its_steps_were() -> None:
    """Also where the step that retires a seed has it once more, with other fields."""
    narrow, wide = {"a": {"alpha": 0.5, "stage": 3.0}}, {"a": {"alpha": 0.5, "learning_rate": 0.25}}
    tables: list[SeedTable] = [seed_table(narrow), seed_table(wide), seed_table(narrow)]
    assert [table.cells.shape[1] for table in tables] == [NARROW, WIDTH, NARROW]
    streams = Streams()
    for number, table in enumerate(tables, 1):
        [block] = blocks_of([make_frame(sequence=number, seeds=table, live=table)])
        streams.note([block])
    again = make_frame(sequence=4, seeds=tables[0], live=tables[0], retired=("a",))
    [block] = blocks_of([again])
    assert [name for name, _ in streams.note([block])[4]] == ["esper.seed.learning_rate"]
    streams.settled(4)
    assert sorted(name for name, _ in streams.all_ended()) == ["kasmina.seed.alpha", "kasmina.seed.stage"]


@given(frames())
def test_the_last_loss_is_the_one_among_all_values(frame: Frame) -> None:
    """NaN and infinities apart; also where a processor or the context has it."""
    expected = frame.values().get("esper.training.loss")
    assert frame.last_loss() == expected or (frame.last_loss() != frame.last_loss() and expected != expected)
