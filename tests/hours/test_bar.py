"""The bar: from any timeline of steps, phases and restarts, parts that are right and add up to the wall time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from esper_otel.gateway.hours.answer import hours_message
from esper_otel.gateway.hours.file import AttemptRank
from esper_otel.gateway.turns import finished
from esper_otel.hours.account import Account, PhaseTimes, StepTimes
from esper_otel.hours.bar import Bar, PhaseInfo, RunHours, bar_of_rank, bar_of_run
from esper_otel.hours.output import bar_lines
from esper_otel.hours.whole import account_of as account_said
from esper_otel.hours.whole import account_text, joined_account
from esper_otel.pull.messages import HoursResponse
from esper_otel.pull.views import merged_hours, run_hours

pytestmark = pytest.mark.own_code

_MS = 1_000_000
START_UNIX_NS = 1_800_000_000 * 10**9


class Cycle(NamedTuple):
    """A step with what came before it; in milliseconds."""

    waited: int
    hooks: int
    rest: int
    inside: int  # a checkpoint inside the step
    phase: str  # before the step
    phase_ms: int
    nested_ms: int  # a checkpoint inside that phase
    nothing_ms: int  # before the step, in no phase


class Attempt(NamedTuple):
    idle_ms: int  # since the attempt before
    start_up_ms: int
    back: int  # how many steps are done again
    cycles: list[Cycle]


TIME = st.integers(0, 2_000)
CYCLES = st.builds(
    Cycle,
    TIME,
    TIME,
    TIME,
    st.sampled_from([0, 0, 300]),
    st.sampled_from(["evaluation", "data"]),
    *[st.sampled_from([0, 0, 0, 700])] * 2,
    st.sampled_from([0, 0, 90]),
)
ATTEMPTS = st.lists(
    st.builds(Attempt, TIME, st.integers(1, 5_000), st.integers(0, 5), st.lists(CYCLES, min_size=1, max_size=12)),
    min_size=1,
    max_size=3,
)


def account_of(steps: Iterable[StepTimes], phases: Iterable[PhaseTimes] = ()) -> Account:
    account = Account()
    for step in steps:
        account.add_step(step)
    for phase in phases:
        account.add_phase(phase)
    return account


class Timeline:
    """What a trainer sends of such attempts, and what is true."""

    def __init__(self, attempts: list[Attempt]) -> None:
        self.now_ms = 0
        self.truth = Counter[str]()
        self.highest = 0
        self.sent: list[tuple[list[StepTimes], list[PhaseTimes]]] = []
        self.accounts = [self._account(attempt, is_first=not place) for place, attempt in enumerate(attempts)]

    def _spend(self, part: str, milliseconds: int) -> None:
        self.truth[part] += milliseconds
        self.now_ms += milliseconds

    def _end(self, name: str, length: int, own: int, step: int | None = None) -> None:
        self.totals[name] += own
        self.insides[name] += own if step is not None else 0
        ended = START_UNIX_NS + self.now_ms * _MS
        number = len(self.phases) + 1
        self.phases.append(PhaseTimes(name, ended, self.totals[name], self.insides[name], length, own, number, step))

    def _account(self, attempt: Attempt, *, is_first: bool) -> Account:
        self.totals, self.insides = Counter[str](), Counter[str]()
        self.phases: list[PhaseTimes] = []
        steps: list[StepTimes] = []
        self._spend("between_attempts", 0 if is_first else attempt.idle_ms)
        self._spend("start_up", attempt.start_up_ms)
        begun_ms, own_ms = self.now_ms - attempt.start_up_ms, attempt.start_up_ms
        reached, step = self.highest, max(self.highest - attempt.back, 0)
        for each in attempt.cycles:
            step += 1
            self._spend("unknown" if steps else "start_up", each.nothing_ms)
            own_ms += each.nothing_ms
            if each.phase_ms:
                self._spend(each.phase, each.phase_ms)
                if each.nested_ms:
                    self._spend("checkpoint", each.nested_ms)
                    self._end("checkpoint", each.nested_ms, each.nested_ms)
                self._end(each.phase, each.phase_ms + each.nested_ms, each.phase_ms)
            if not steps:  # it lasts until the first step, with the phases in it
                self._end("start_up", self.now_ms - begun_ms, own_ms)
            is_again = step <= reached
            self._spend("redone" if is_again else "input_wait", each.waited)
            opened = START_UNIX_NS + self.now_ms * _MS
            self._spend("redone" if is_again else "hooks", each.hooks)
            self._spend("redone" if is_again else "productive", each.rest)
            if each.inside:
                self._spend("checkpoint", each.inside)
                self._end("checkpoint", each.inside, each.inside, step)
            latency = each.hooks + each.rest + each.inside
            steps.append(StepTimes(step, opened, float(each.waited), float(latency), float(each.hooks)))
            self.highest = max(self.highest, step)
        self.sent.append((steps, self.phases))
        return account_of(steps, self.phases)


def assert_true(timeline: Timeline, parts: dict[str, float], wall_ms: float) -> None:
    assert wall_ms == pytest.approx(timeline.now_ms, rel=0.01)
    assert sum(parts.values()) == pytest.approx(wall_ms, rel=1e-6, abs=1e-3)
    for part in {*parts, *timeline.truth}:
        assert parts.get(part, 0.0) == pytest.approx(timeline.truth[part], rel=0.02, abs=1e-3), part


@given(ATTEMPTS)
def test_each_part_is_right_and_all_add_up_to_the_wall_time(attempts: list[Attempt]) -> None:
    """Over attempts that were killed and resumed further back."""
    timeline = Timeline(attempts)
    bar = bar_of_rank(timeline.accounts)
    assert_true(timeline, dict(bar.parts), bar.wall_ms)
    assert bar.attempts == len(attempts)


@given(ATTEMPTS)
def test_phases_may_come_again_and_in_any_order(attempts: list[Attempt]) -> None:
    timeline = Timeline(attempts)
    for account, once in zip(timeline.accounts, Timeline(attempts).accounts, strict=True):
        for phase in reversed(timeline.phases if account is timeline.accounts[-1] else []):
            account.add_phase(phase)
        assert account == once


@given(ATTEMPTS)
def test_an_account_is_the_same_after_it_was_stored(attempts: list[Attempt]) -> None:
    for account in Timeline(attempts).accounts:
        said = json.loads(json.dumps(account.as_json()))
        assert Account.from_json(said).as_json() == account.as_json()


def test_steps_done_again_are_known_to_a_few_percent_in_a_long_run() -> None:
    """Only some sums are kept of a hundred thousand steps."""
    first = account_of(StepTimes(step, START_UNIX_NS + step * 10 * _MS, 1.0, 9.0, 1.0) for step in range(100_000))
    again = account_of(
        StepTimes(step, START_UNIX_NS + (step + 10_000) * 10 * _MS, 1.0, 9.0, 1.0) for step in range(93_210, 200_000)
    )
    assert len(again.knots) < 500
    parts = bar_of_rank([first, again]).parts
    assert parts["redone"] == pytest.approx((100_000 - 93_210) * 10.0, rel=0.001)
    assert parts["between_attempts"] == pytest.approx(3_210 * 10.0, abs=20.0)


def test_steps_without_durations_take_what_is_left() -> None:
    """Without enrichment there is no step latency: the time between two steps is the best estimate."""
    steps = [StepTimes(step, START_UNIX_NS + step * 100 * _MS, 0.0, None, 20.0) for step in range(11)]
    phase = PhaseTimes("evaluation", START_UNIX_NS + 640 * _MS, 30.0, 0.0, 30.0, 30.0, 1, None)
    parts = bar_of_rank([account_of(steps, [phase])]).parts
    assert parts["evaluation"] == 30.0
    assert sum(parts.values()) == pytest.approx(1_000.0)
    assert parts["hooks"] == pytest.approx(220.0)
    assert parts["productive"] == pytest.approx(750.0)


def test_steps_that_a_trainer_has_measured_end_at_their_time() -> None:
    """``record_step`` stamps a step when it is over. The end of start-up tells the two apart."""
    start_up = PhaseTimes("start_up", START_UNIX_NS + 500 * _MS, 500.0, 0.0, 500.0, 500.0, 1, None)
    ended = [StepTimes(step, START_UNIX_NS + (500 + step * 1_000) * _MS, 100.0, 900.0, 0.0) for step in (1, 2)]
    opened = [StepTimes(step, START_UNIX_NS + (-400 + step * 1_000) * _MS, 100.0, 900.0, 0.0) for step in (1, 2)]
    for steps in (ended, opened):
        bar = bar_of_rank([account_of(steps, [start_up])])
        assert bar.wall_ms == 2_500.0
        assert dict(bar.parts) == {"productive": 1_800.0, "input_wait": 200.0, "start_up": 500.0}


def test_a_run_is_the_mean_of_its_ranks() -> None:
    def rank(start_ms: int, waited: float, latency: float) -> Account:
        return account_of([StepTimes(1, START_UNIX_NS + start_ms * _MS, waited, latency, 0.0)])

    bars = [bar_of_rank([rank(200, 200.0, 800.0)]), bar_of_rank([rank(400, 200.0, 600.0)])]
    run = bar_of_run(bars)
    assert run.wall_ms == 1_000.0
    assert dict(run.parts) == {"productive": 700.0, "input_wait": 200.0, "unknown": 100.0}
    assert bar_of_run([]).parts == bar_of_rank([Account()]).parts == {}


def test_very_many_names_of_phases_become_one_part() -> None:
    """A page has a line for each part, and anybody may send phases."""
    start = StepTimes(1, START_UNIX_NS, 0.0, 1_000.0, 0.0)
    phases = [PhaseTimes(f"p{n}", START_UNIX_NS + 10**9, float(n), 0.0, 1.0, 1.0, n, None) for n in range(1, 201)]
    bar = bar_of_rank([account_of([start], phases)])
    assert len(bar.parts) == 96 + 1
    assert {"p200", "p105", "other"} <= bar.parts.keys()
    assert sum(bar.parts.values()) == pytest.approx(bar.wall_ms)
    account = account_of([start], [phase._replace(name=f"p{n}") for n, phase in enumerate(2 * phases)])
    told = account_said(account_text(account))
    assert len(told.phases) == 256 + 1
    assert sum(total for total, _ in told.phases.values()) == sum(total for total, _ in account.phases.values())


def test_the_text_has_each_part_with_its_share() -> None:
    bar = bar_of_rank([account_of([StepTimes(1, START_UNIX_NS, 250.0, 3_750.0, 0.0)])])
    assert [line.split() for line in bar_lines(bar)] == [
        ["4.0", "s", "in", "1", "attempt,", "93.8%", "productive"],
        ["productive", "93.8%", "3.8", "s", "#" * 28],
        ["input", "wait", "6.2%", "250", "ms", "#" * 2],
    ]


@given(ATTEMPTS, st.data())
def test_an_attempt_that_moved_between_gateways_is_as_if_it_had_not(
    attempts: list[Attempt], data: st.DataObject
) -> None:
    """It may have gone back, or sent to both for a while; a whole attempt may be at one of them."""
    # No two steps have the same time.
    assume(all(each.hooks + each.rest for attempt in attempts for each in attempt.cycles))
    timeline = Timeline(attempts)
    joined = []
    for steps, phases in timeline.sent:
        first, last = sorted(data.draw(st.tuples(*[st.integers(0, len(steps))] * 2)))
        both = data.draw(st.integers(0, last - first))
        at_one = steps[:first] + steps[last:] if data.draw(st.booleans()) else steps[: first + both]
        at_other = steps[first:last] if steps[last:] == at_one[first:] else steps[first:]
        halves = account_of(at_other, phases[::2]), account_of(at_one, phases[1::2])
        joined.append(joined_account([account_said(account_text(half)) for half in halves]))
    bar, whole = bar_of_rank(joined), bar_of_rank(timeline.accounts)
    assert (bar.start_unix_ns, bar.end_unix_ns, bar.attempts) == (
        whole.start_unix_ns,
        whole.end_unix_ns,
        whole.attempts,
    )
    assert of_phases(bar) == pytest.approx(of_phases(whole), abs=1e-2)
    if not any(attempt.back for attempt in attempts[1:]):  # otherwise what was done again is an estimate
        assert {**dict.fromkeys(whole.parts, 0.0), **bar.parts} == pytest.approx(
            {**dict.fromkeys(bar.parts, 0.0), **whole.parts}, abs=1e-2
        )


def of_phases(bar: Bar) -> dict[str, float]:
    """The parts, with all that is steps as one."""
    steps = {"productive", "input_wait", "hooks", "redone"}
    found = {part: ms for part, ms in bar.parts.items() if part not in steps and ms > 1e-2}
    return {**found, "steps": sum(ms for part, ms in bar.parts.items() if part in steps)}


def test_what_is_told_of_an_account_is_bounded() -> None:
    account = account_of(StepTimes(step, START_UNIX_NS + step * 10 * _MS, 1.0, 9.0, 1.0) for step in range(100_000))
    for step in range(0, 40_000, 10):
        account.add_phase(PhaseTimes("log", START_UNIX_NS + step * 10 * _MS + 1, 1.0, 1.0, 1.0, 1.0, step + 1, step))
    text = account_text(account)
    assert len(text) < 30_000
    again = account_said(text)
    assert again.sums == account.sums
    assert again.up_to(50_000).total == pytest.approx(account.up_to(50_000).total, rel=0.01)
    assert again.inside_up_to(40_000) == pytest.approx(account.inside_up_to(40_000))
    assert again.inside_up_to(20_000) == pytest.approx(account.inside_up_to(20_000), rel=0.02)


def test_of_several_gateways_each_rank_has_all_of_its_attempts() -> None:
    """Senders may have changed from one gateway to the other; one of an older version tells no accounts."""

    def answer(rank: int, attempts: dict[int, int], *phases: PhaseInfo, is_old: bool = False) -> HoursResponse:
        known = {
            AttemptRank(rank, attempt): account_of(
                StepTimes(step, START_UNIX_NS + (attempt * 1_000 + step * 10) * _MS, 0.0, 10.0, 0.0)
                for step in range(steps)
            )
            for attempt, steps in attempts.items()
        }
        bar = bar_of_rank([*known.values()])
        return finished(hours_message(RunHours(bar, {rank: bar}, phases), {} if is_old else known))

    one, other = (PhaseInfo("checkpoint", 0, 1, 0, end, 1.0, end, None) for end in (5, 7))
    first, second, mate = answer(0, {1: 3}, one), answer(0, {2: 9}, other, one), answer(1, {1: 5}, is_old=True)
    found = merged_hours([first, mate, second])
    whole = run_hours(answer(0, {1: 3, 2: 9}))
    assert found.ranks == {0: whole.run, 1: run_hours(mate).run}
    assert found.ranks[0].attempts == 2
    assert found.run == bar_of_run(found.ranks.values())
    assert found.phases == (one, other)
    assert merged_hours([first]) == run_hours(first)
    for text in ("[" * 100_000, "7", '{"steps": 1e400}', account_text(Account())[:-1] + ', "starts": []}'):
        first.accounts.add(rank=0, attempt=7, account=text)  # a gateway may tell anything
    assert merged_hours([first, mate, second]).run == found.run
