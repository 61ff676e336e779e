"""A shard in a simulated log: wherever a member dies, the next one makes what has not been made, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from frame_examples import RUN, TIME_UNIX_NS, make_frame, seed_table
from log_requests import body as event_body
from wire import counts_of, encoder, end_of

from esper_otel import StaleCursor
from esper_otel.frames.frame import Frame
from esper_otel.frames.records import RecordWriter
from esper_otel.frames.ring import blocks_of
from esper_otel.gateway.items import Item, Origin, Place, RunState
from esper_otel.gateway.kafka.cursors import PullSelection, Stand, cursor_stands, cursor_text
from esper_otel.gateway.kafka.entries import Record, entries_of
from esper_otel.gateway.kafka.shard import Commit, RequestRecord, Shard
from esper_otel.gateway.kafka.topic_records import (
    FrameBatch,
    FrameWithLoss,
    UnknownForm,
    block_bytes,
    block_of,
    key_of,
    merged_state,
    state_bytes,
    state_of,
)
from esper_otel.gateway.limits import Limits
from esper_otel.schema import Stage
from esper_otel.schema.events import EVENT_SCOPE

pytestmark = pytest.mark.own_code

STEPS, RANKS = 24, 3


class Log:
    """What the topics have of one partition, and the member that works on it."""

    def __init__(self, requests: list[bytes]) -> None:
        self.requests = requests
        self.frames: list[tuple[bytes, bytes]] = []
        self.states: dict[bytes, bytes] = {}
        self.committed: Commit | None = None
        self.now_s = 0.0
        self.begin()

    def begin(self) -> None:
        """A member takes the partition over."""
        self.shard = Shard(0, limits=Limits(), hold_s=2.0, linger_s=0.05)
        self.read, first, _ = self.committed or Commit(0, 0)
        blocks = [block_of(*record) for record in self.frames[first:]]
        states = [state_of(*record) for record in self.states.items()]
        self.shard.restore(states, blocks, (first, len(self.frames)), self.now_s)

    def work(self, count: int, *, of_all: bool, dies: bool, waits_s: float = 0.01) -> None:
        """Takes some records; if it dies before the end of the transaction, nothing of it is there."""
        self.now_s += waits_s
        some = range(self.read, min(self.read + count, len(self.requests)))
        records = [RequestRecord(offset, TIME_UNIX_NS + offset, b"", self.requests[offset]) for offset in some]
        assert not self.shard.take(records, self.now_s)
        self.read += len(records)
        blocks = [(key_of(block.origin), block_bytes(block)) for block in self.shard.release(self.now_s)]
        states = {key_of(each.state.origin): state_bytes(each) for each in self.shard.states(of_all=of_all)}
        committed = self.shard.committed()
        if dies:
            self.begin()
            return
        self.frames += blocks
        self.states |= states
        self.committed = committed or self.committed
        self.shard.end = len(self.frames)

    def items(self) -> list[Item]:
        """All frames, in order."""
        return [released.item for record in self.frames for released in block_of(*record).frames]


def written(frames: Sequence[Frame]) -> list[bytes]:
    """All of the frames, bit for bit."""
    writer = RecordWriter()
    return [writer.frame(frame) for frame in frames]


def step_of(rank: int, step: int) -> Frame:
    seeds = seed_table({"seed-1": {"stage": Stage.TRAINING, "alpha": step / 100}}) if step % 3 else seed_table({})
    run = replace(RUN, rank=rank)
    times = {"sequence": step, "global_step": step, "time_unix_ns": TIME_UNIX_NS + step * 10**6}
    return make_frame(run=run, **times, recorded={"loss": rank * 1e6 + step}, seeds=seeds, live=seeds)


def requests(seed: int) -> list[bytes]:
    """Those of all ranks: some late, some twice."""
    chance = random.Random(seed)
    encoders = [encoder(f"process-{rank}") for rank in range(RANKS)]
    made = []
    for step in range(1, STEPS + 1):
        for rank in range(RANKS):
            body = b"".join(each.body for each in encoders[rank].requests(blocks_of([step_of(rank, step)])))
            at = step * RANKS + rank
            made.append((at + chance.choice((0, 0, 0, 4)), body))
            if chance.random() < 0.1:
                made.append((at + 3, body))
    return [body for _, body in sorted(made, key=lambda each: each[0])]


@pytest.mark.parametrize("seed", range(12))
def test_every_step_is_there_once_whenever_members_die(seed: int) -> None:
    """Compared with a member that does not die: the same frames, with the same numbers, in order for each rank."""
    log, calm = Log(requests(seed)), Log(requests(seed))
    chance = random.Random(seed)
    while calm.read < len(calm.requests):
        calm.work(4, of_all=False, dies=False)
    calm.work(0, of_all=True, dies=False, waits_s=5)
    deaths = 0
    while log.read < len(log.requests):
        dies = chance.random() < 0.3
        log.work(chance.randint(0, 6), of_all=chance.random() < 0.3, dies=dies)
        deaths += dies
        if chance.random() < 0.2:  # between two transactions
            log.begin()
    log.work(0, of_all=True, dies=False, waits_s=5)
    assert deaths
    for rank in range(RANKS):
        frames, expected = ([item.frame for item in each.items() if item.origin.rank == rank] for each in (log, calm))
        assert [frame.sequence for frame in frames] == [*range(1, STEPS + 1)]
        assert written(frames) == written(expected)
    numbers = [number for record in log.frames for number in _numbers(block_of(*record))]
    assert numbers == [*range(1, STEPS * RANKS + 1)]
    assert {state_of(*record).state.missing for record in log.states.items()} == {0}
    assert {state_of(*record).counts.writer for record in log.states.items()} == {STEPS}


def _numbers(block: FrameBatch) -> range:
    return range(block.of_run, block.of_run + len(block.frames))


def test_a_poisoned_record_costs_no_other() -> None:
    log = Log(requests(1)[:6])
    good = [RequestRecord(offset, 1, b"", body) for offset, body in enumerate(log.requests)]
    bad = RequestRecord(6, 1, b"key", b"\x0a\xff\xff")
    poisoned = log.shard.take([*good[:3], bad, *good[3:]], 1.0)
    assert [each.record for each in poisoned] == [bad]
    assert "Malformed" in poisoned[0].reason
    assert sum(len(block.frames) for block in log.shard.release(9.0)) == len({*log.requests})
    committed = Commit(5, 3, (6,))
    assert Commit.of(5, committed.metadata) == committed
    assert Commit.of(5, "by another program") is None
    next_one = Log(log.requests).shard
    next_one.buried = [6]
    assert next_one.take([bad], 1.0) == []


def test_records_say_what_they_are() -> None:
    """Each byte that is missing, and a newer version, is noticed."""
    origin = Origin("run", 2, 3, "writer")
    place = Place(
        origin,
        8,
        1,
        2,
        says_step=True,
        says_epoch=False,
        holes=((3, 5),),
        ends=((9, "seed", 1),),
        host="h",
        validation_loss=0.5,
        device="d",
        units=(("my.speed", "m/s"),),
    )
    frame = step_of(1, 7)
    block = FrameBatch(
        [
            FrameWithLoss(Item(origin, frame, 2, True, 11), 0.5),
            FrameWithLoss(Item(origin, frame, 1, False, 12, 3), None),
        ],
        4,
        5,
        place,
    )
    value = block_bytes(block)
    assert block_bytes(block_of(key_of(origin), value)) == value
    assert [each.item[2:] for each in block_of(key_of(origin), value).frames] == [(2, True, 11, 0), (1, False, 12, 3)]
    assert block_of(key_of(origin), value).place == place
    for length in range(len(value)):
        with pytest.raises(UnknownForm):
            block_of(key_of(origin), value[:length])
    with pytest.raises(UnknownForm, match="a newer esper-otel has written it"):
        block_of(key_of(origin), b"\x02" + value[1:])
    with pytest.raises(UnknownForm, match="not the key of a writer"):
        block_of(b'["run"]', value)


def test_a_writer_without_steps_is_known_to_live_after_a_takeover() -> None:
    """Its counts are records of their own; the servers hear of them, and the next member remembers."""
    run = replace(RUN, rank=0)
    body = b"".join(each.body for each in encoder("process-0").requests(blocks_of([step_of(0, 1)])))
    log = Log([body, *[counts_of(run, process="process-0")] * 2])
    log.work(1, of_all=True, dies=False)
    for at in (1, 2):
        log.work(1, of_all=True, dies=False)
        [state] = [state_of(*record).state for record in log.states.items()]
        assert (state.last_received_unix_ns, state.step_received_unix_ns) == (TIME_UNIX_NS + at, TIME_UNIX_NS)
        log.begin()


def test_a_run_that_failed_before_its_first_step_is_known_until_it_is_old() -> None:
    """To the next member, too; it has no frame whose age could be asked for."""
    log = Log([end_of()])
    log.work(1, of_all=False, dies=False)
    [state] = [state_of(*record).state for record in log.states.items()]
    assert (state.origin[:3], state.ended) == ((RUN.run_id, RUN.attempt, RUN.rank), "RuntimeError")
    for _ in range(2):
        log.work(0, of_all=True, dies=False)
        assert not log.shard.idle(TIME_UNIX_NS)
        log.begin()
    log.now_s += 1e6
    log.work(0, of_all=True, dies=False)
    assert log.shard.idle(TIME_UNIX_NS + 1) == [state.origin]
    assert not log.shard.writers


def test_a_rank_that_comes_back_after_it_was_forgotten_is_not_passed_over() -> None:
    """Its frames are counted anew; a puller that has had more of them before gets all of those to come."""
    enc = encoder("process-0")
    log = Log([b"".join(each.body for each in enc.requests(blocks_of([step_of(0, step)]))) for step in (1, 2, 3, 4)])
    log.work(3, of_all=True, dies=False)
    assert log.shard.idle(2**63)
    log.states.clear()
    log.shard = Shard(0, limits=Limits(), hold_s=2.0, linger_s=0.05)
    log.work(1, of_all=True, dies=False)
    log.work(0, of_all=True, dies=False, waits_s=5)
    key, value = log.frames[-1]
    record = Record(0, 9, 1, key, value)
    for rank in (None, 0):
        [entry] = entries_of(record, Stand(9, 0, 3), rank)
        assert (entry.frame.item.frame.global_step, entry.gap, entry.after) == (4, 0, Stand(10, 0, 1))


def test_counts_go_on_after_a_takeover() -> None:
    origin = Origin("run", 0, 0)
    before = RunState(origin, 1, "", 3, 9, 0, 0, differing=2, too_late=1, incomplete=4, first_time_unix_ns=5)
    after = merged_state(RunState(origin, 1, "", 8, 12, 0, 0, too_late=1, incomplete=1, first_time_unix_ns=7), before)
    assert (after.first_step, after.last_step, after.first_time_unix_ns) == (3, 12, 5)
    assert (after.differing, after.too_late, after.incomplete) == (2, 2, 4)


def test_cursors_name_topics_ranks_and_places() -> None:
    stands = {3: Stand(17, 2, 40), 11: Stand(0, 0, 0)}
    for wanted in (PullSelection(), PullSelection(5), PullSelection(None, 1, 4)):
        text = cursor_text("Abc9", wanted, stands)
        assert cursor_stands(text, "Abc9", wanted) == stands
        assert cursor_stands("", "Abc9", wanted) == {}
        with pytest.raises(StaleCursor, match="earlier topics"):
            cursor_stands(text, "Other", wanted)
        with pytest.raises(StaleCursor, match="this cursor came from pulling"):
            cursor_stands(text, "Abc9", PullSelection(6))
    for wrong in ("693e60af::50", "k1-Abc9::3.1", "k1-Abc9::3.1.2.3,,", "x" * 300_000):
        with pytest.raises(StaleCursor, match="was not issued by this gateway"):
            cursor_stands(wrong, "Abc9", PullSelection())


def test_events_in_the_topic_are_not_lost_without_a_word() -> None:
    """They have a topic of their own: such a record is put aside with the reason. A step that names them is a step."""
    bodies = [*encoder().requests(blocks_of([make_frame(run=replace(RUN, experiment=EVENT_SCOPE))]))]
    shard = Shard(0, limits=Limits(), hold_s=2.0, linger_s=0.05)
    values = [event_body("run", 1), *(each.body for each in bodies)]
    records = [RequestRecord(offset, TIME_UNIX_NS, b"", value) for offset, value in enumerate(values)]
    [bad] = shard.take(records, 0.0)
    assert bad.record.offset == 0
    assert "they belong in the topic of events" in bad.reason
    assert sum(len(batch.frames) for batch in shard.release(10.0)) == 1
