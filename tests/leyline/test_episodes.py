"""Episodes: a signal in many steps is one line, whatever is missing, late, corrected or resumed."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.leyline.episodes import QUIET_S, QUIET_STEPS, Episode, Episodes, StepSender
from esper_otel.leyline.risk import Signal

pytestmark = pytest.mark.own_code

NAMES = ("hook_budget", "loss_warning", "cpu_pressure_high")


def signal(name: str, value: float = 60.0, level: str = "HIGH", route: str = "PAUSE") -> Signal:
    return Signal(name, level, 0, f"{name} {value:g}", route, value)


def noted(steps: dict[int, list[Signal]], *, last: int, first: int = 1, step_s: float = 60.0) -> Episodes:
    """Episodes of steps from ``first`` to ``last``, most of which raise nothing."""
    episodes = Episodes()
    for step in range(first, last + 1):
        episodes.note(step, steps.get(step, []), time_s=step * step_s)
    return episodes


def test_a_steady_signal_is_one_line() -> None:
    steps = {step: [signal("cpu_pressure_high", 95 + step % 6)] for step in range(12, 341)}
    assert list(map(str, noted(steps, last=340).all())) == ["cpu_pressure_high, steps 12 to 340, worst 100, goes on"]
    [episode] = noted(steps, last=340 + QUIET_STEPS).all()
    assert str(episode) == "cpu_pressure_high, steps 12 to 340, worst 100"
    assert (episode.times, episode.calm, episode.goes_on) == (329, 0, False)
    assert (episode.worst, episode.worst_step, episode.reason) == (100.0, 17, "cpu_pressure_high 100")


def test_it_ends_only_after_some_steps_without_it() -> None:
    """Until then it may return, and is the same one."""
    again = 3 + QUIET_STEPS
    [episode] = noted({3: [signal("hook_budget")], again: [signal("hook_budget", 70)]}, last=again).all()
    assert str(episode) == f"hook_budget, steps 3 to {again} (2 of {QUIET_STEPS + 1}), worst 70, goes on"
    two = noted({3: [signal("hook_budget")], again + 1: [signal("hook_budget")]}, last=again + 1).all()
    assert [(each.first, each.last, each.goes_on) for each in two] == [(3, 3, False), (again + 1, again + 1, True)]
    assert str(two[0]) == "hook_budget, step 3, worst 60"


def test_a_reading_of_once_a_second_does_not_end_within_a_second() -> None:
    """A step of a millisecond repeats it a thousand times."""
    steps = {step: [signal("cpu_pressure_high", 97.0)] for step in range(1, 20_000) if step // 1000 % 2}
    assert len(noted(steps, last=20_000, step_s=0.001).all()) == 1
    assert len(noted(steps, last=20_000, step_s=QUIET_S).all()) == 10
    after_a_jump_back = noted({1: [signal("cpu_pressure_high")]}, last=1)
    for step in range(2, 2 + QUIET_STEPS):
        after_a_jump_back.note(step, [], time_s=step - 1000.0)
    assert not after_a_jump_back.all()[0].goes_on


def test_changes_are_entering_escalating_and_leaving() -> None:
    """It escalates when the level rises, when the route becomes PAUSE, and when the value doubles."""
    episodes = Episodes()
    given = [
        signal("a", 60, "NOTE", "OPTIMIZER"),
        signal("a", 61, "NOTE", "OPTIMIZER"),
        signal("a", 61, "HIGH", "OPTIMIZER"),
        signal("a", 61, "NOTE", "PAUSE"),
        signal("a", 121),
        signal("a", 122),
        signal("a", 243),
        signal("a", 244),
    ]
    kinds = [[c.kind for c in episodes.note(step, [each], time_s=step)] for step, each in enumerate(given)]
    assert kinds == [["entered"], [], ["escalated"], ["escalated"], [], ["escalated"], [], ["escalated"]]
    [episode] = episodes.all()
    assert (episode.level, episode.route, episode.worst) == ("HIGH", "PAUSE", 244)
    calm = [episodes.note(100 + step, [], time_s=100 + step) for step in range(QUIET_STEPS)]
    assert [change.kind for changes in calm for change in changes] == ["left"]
    assert calm[-1][0].episode == episodes.all()[0]


def test_an_attempt_ends_the_episodes_of_the_one_before_and_of_no_other_rank() -> None:
    episodes = Episodes()
    for rank in (0, 1):
        episodes.note(5, [signal("a")], time_s=5, sender=StepSender(rank, 1))
    changes = episodes.note(3, [signal("a")], time_s=7, sender=StepSender(0, 2))
    assert [(change.kind, change.episode.sender) for change in changes] == [
        ("left", StepSender(0, 1)),
        ("entered", StepSender(0, 2)),
    ]
    episodes.note(6, [signal("a")], time_s=6, sender=StepSender(0, 1))  # a process of the old attempt is still there
    assert [(each.sender, each.goes_on) for each in episodes.all()] == [
        (StepSender(0, 1), False),
        (StepSender(1, 1), True),
        (StepSender(0, 2), True),
    ]
    assert {change.episode.sender for change in episodes.end()} == {StepSender(1, 1), StepSender(0, 2)}
    assert not any(each.goes_on for each in episodes.all())


def test_a_correction_only_adds() -> None:
    """The same step again, with the same time."""
    episodes = Episodes()
    episodes.note(1, [signal("a")], time_s=1)
    for _ in range(30):
        assert not episodes.note(1, [signal("a", 65)], time_s=1)
        assert not episodes.note(1, [], time_s=1)
    [change] = episodes.note(1, [signal("a"), signal("b")], time_s=1)
    assert (change.kind, change.episode.name) == ("entered", "b")
    assert [(each.times, each.worst, each.goes_on) for each in episodes.all()] == [(1, 65, True), (1, 60, True)]
    episodes.note(2, [], time_s=2)
    episodes.note(3, [signal("a")], time_s=3)
    assert (episodes.all()[0].times, episodes.all()[0].calm) == (2, 1)
    episodes.note(2, [signal("a")], time_s=2)
    assert (episodes.all()[0].times, episodes.all()[0].calm) == (3, 0)


def test_step_numbers_that_begin_again_are_new_steps() -> None:
    """As in a loop that counts anew in each epoch."""
    episodes = Episodes()
    for epoch in range(5):
        for step in range(8):
            episodes.note(step, [signal("a")] if epoch == 0 else [], time_s=100.0 * epoch + step)
    assert [(each.first, each.last, each.times, each.goes_on) for each in episodes.all()] == [(0, 7, 8, False)]


@pytest.mark.parametrize("goes_on", [False, True])
def test_memory_is_bounded_and_what_is_dropped_is_counted(*, goes_on: bool) -> None:
    """Those that are over are dropped first."""
    episodes = Episodes(most=10)
    changes = [*episodes.note(0, [signal("for ever")], time_s=0)]
    for number in range(100):
        changes += episodes.note(number + 1, [signal("for ever"), signal(f"n{number}")], time_s=number)
        for step in range(0 if goes_on else QUIET_STEPS):
            episodes.note(1000 * (number + 1) + step, [signal("for ever")], time_s=number)
    assert len(episodes.all()) == 10
    assert episodes.dropped == sum(change.kind == "entered" for change in changes) - 10
    assert [each.name for each in episodes.all()][-1] == "n99"
    assert ("for ever" in {each.name for each in episodes.all()}) is not goes_on


def test_senders_without_number_do_not_fill_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esper_otel.leyline.episodes._MOST_SENDERS", 10)
    episodes = Episodes()
    for rank in range(50):
        episodes.note(1, [signal("a")], time_s=1, sender=StepSender(rank))
    assert [each.sender.rank for each in episodes.all() if each.goes_on] == [*range(40, 50)]
    assert len(episodes._tracks) == 10
    assert len(episodes._attempts) <= 20


# -- a plain oracle ------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """A step as it arrives."""

    sender: StepSender
    step: int
    time_s: float
    values: dict[str, float]


def history_of(chance: random.Random) -> list[Seen]:
    """Steps of two ranks and two attempts, with gaps, of any pace; each sender's in order."""
    found = []
    for attempt in (1, 2):
        for rank in (0, 1):
            step, time_s = chance.randint(0, 5), 1000.0 * attempt
            for _ in range(chance.randint(0, 12)):
                names = chance.choice([(), (), NAMES[:1], NAMES, NAMES[1:]])
                for _ in range(chance.choice([1, 3, QUIET_STEPS - 1, QUIET_STEPS, QUIET_STEPS + 1])):
                    values = {name: float(chance.randint(96, 300)) for name in names}
                    found.append(Seen(StepSender(rank, attempt), step, time_s, values))
                    step += chance.choice([1, 1, 1, 7])
                    time_s += chance.choice([0.01, 2.0])
    chance.shuffle(found)
    return sorted(found, key=lambda each: (each.sender.attempt, each.time_s))


def oracle(history: list[Seen]) -> list[tuple[object, ...]]:
    """For each sender and name: steps with the signal, split wherever it was absent for long enough."""
    found: list[tuple[object, ...]] = []
    newest = {each.sender.rank: each.sender.attempt for each in history}
    for sender in {each.sender for each in history}:
        steps = [each for each in history if each.sender == sender]
        for name in NAMES:
            groups: list[list[int]] = []  # places of the steps in an episode

            def is_apart(
                place: int, until: int, name: str = name, steps: list[Seen] = steps
            ) -> bool:  # whether a signal at a place is over before another place
                is_sampled = name == "cpu_pressure_high"
                return any(
                    later - place >= QUIET_STEPS
                    and (not is_sampled or steps[later].time_s - steps[place].time_s >= QUIET_S)
                    for later in range(place + 1, until)
                )

            for place, each in enumerate(steps):
                if name in each.values:
                    if groups and not is_apart(groups[-1][-1], place):
                        groups[-1].append(place)
                    else:
                        groups.append([place])
            for group in groups:
                values = [steps[place].values[name] for place in group]
                found.append(
                    (
                        *(sender, name, steps[group[0]].step, steps[group[-1]].step, len(group)),
                        group[-1] - group[0] + 1 - len(group),
                        max(values),
                        steps[group[values.index(max(values))]].step,
                        newest[sender.rank] == sender.attempt and not is_apart(group[-1], len(steps)),
                    )
                )
    return sorted(found, key=str)


def told(episodes: Episodes) -> list[tuple[object, ...]]:
    def of(e: Episode) -> tuple[object, ...]:
        return (e.sender, e.name, e.first, e.last, e.times, e.calm, e.worst, e.worst_step, e.goes_on)

    return sorted(map(of, episodes.all()), key=str)


@given(st.integers(0, 2**32))
def test_episodes_are_those_of_a_plain_oracle(chance: int) -> None:
    history = history_of(random.Random(chance))
    episodes, entered, left = Episodes(most=10_000), 0, 0
    for each in history:
        signals = [signal(name, value) for name, value in each.values.items()]
        changes = episodes.note(each.step, signals, time_s=each.time_s, sender=each.sender)
        entered += sum(change.kind == "entered" for change in changes)
        left += sum(change.kind == "left" for change in changes)
    assert told(episodes) == oracle(history)
    assert entered == len(episodes.all())
    assert entered - left == sum(each.goes_on for each in episodes.all())


@given(st.integers(0, 2**32))
def test_late_and_repeated_steps_are_each_in_one_episode(number: int) -> None:
    """Each step with a signal is in one episode of it, counted once."""
    chance = random.Random(number)
    history = history_of(chance)
    episodes = Episodes(most=10_000)
    late = sorted(enumerate(history), key=lambda pair: (pair[1].sender.attempt, pair[0] + chance.uniform(0, 8)))
    arriving = [each for _, each in late for _ in range(chance.choice([1, 1, 2]))]
    for each in arriving:
        signals = [signal(name, value) for name, value in each.values.items()]
        episodes.note(each.step, signals, time_s=each.time_s, sender=each.sender)
    found = episodes.all()
    for each in history:
        for name, value in each.values.items():
            [mine] = [e for e in found if (e.sender, e.name) == (each.sender, name) and e.first <= each.step <= e.last]
            assert mine.worst >= value
    assert sum(e.times for e in found) == sum(len(each.values) for each in history)
    assert len(found) <= 2 * len(oracle(history))
    assert not any(math.isnan(e.worst) for e in found)
