"""``ESPER_ON_MISTAKE=warn``: a mistake in recording is logged and counted, and everything else is recorded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import esper_otel
from esper_otel import EsperSettings, MistakeError, Step, Telemetry
from esper_otel.frames.frame import is_absent

pytestmark = pytest.mark.own_code

Mistake = Callable[[Any, Any], object]
IN_A_STEP: dict[str, Mistake] = {
    "an unknown metric": lambda _, now: now.put(acuracy=0.5),
    "a metric with a dot": lambda _, now: now.put({"esper.epoch": 3}),
    "a vector": lambda _, now: now.put(accuracy=np.zeros(3)),
    "text": lambda _, now: now.put(accuracy="high"),
    "no mapping": lambda _, now: now.put(0.5),
    "gradients of nothing": lambda _, now: now.gradients("model"),
    "a seed without an id": lambda _, now: now.seed("", alpha=0.5),
    "a seed that is a number": lambda _, now: now.seed(3, alpha=0.5),
    "an unknown field": lambda _, now: now.seed("a", alfa=0.5),
    "an unknown stage": lambda _, now: now.seed("a", stage=99),
    "the kernel of no seed": lambda _, now: now.kernel(3),
    "columns of another length": lambda telemetry, _: telemetry.seeds(["a"], alpha=[1.0, 2.0]),
    "the same seed twice": lambda telemetry, _: telemetry.seeds(["a", "a"], alpha=[1.0, 2.0]),
    "one string for seeds": lambda telemetry, _: telemetry.seeds("a", alpha=[1.0]),
    "retiring no seed": lambda telemetry, _: telemetry.retire_seed(3),
    "a whole step in a step": lambda telemetry, _: telemetry.record_step({"loss": 9.0}, epoch=0),
    "an empty validation": lambda telemetry, _: telemetry.validation(),
    "an unknown result": lambda telemetry, _: telemetry.validation(perplexity=3.0),
    "a result that is a list": lambda telemetry, _: telemetry.validation(loss=[0.5]),
}


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    settings = EsperSettings(on_mistake="warn", probe_period_s=3600)
    with esper_otel.start(run_id="spared", settings=settings, export_steps=False) as telemetry:
        yield telemetry


def recorded(telemetry: Telemetry) -> list[dict[str, float]]:
    return [dict(frame.recorded) for frame in telemetry._recorder.publisher.ring.after(0, 200)[0]]


def test_a_mistake_costs_its_value_and_not_the_step(telemetry: Telemetry, caplog: pytest.LogCaptureFixture) -> None:
    """By default it raises; with warn it is logged once, with its place, and counted each time."""
    with esper_otel.start(export_steps=False) as strict, strict.step(epoch=0) as now:
        for mistake in IN_A_STEP.values():
            with pytest.raises(MistakeError):
                mistake(strict, now)
    for count, (name, mistake) in enumerate(IN_A_STEP.items(), 1):
        caplog.clear()
        for _ in range(3):
            with telemetry.step(epoch=1) as now:
                mistake(telemetry, now)
                now.put(loss=float(count))
        assert telemetry.health()["mistakes"] == 3 * count, name
        assert [step["loss"] for step in recorded(telemetry)[-3:]] == [count] * 3, name
        assert len(caplog.messages) == 1, name
        assert re.match(rf"mistake: {re.escape(__file__)}:\d+: \w+: ", caplog.messages[0]), name


def test_the_rest_of_the_same_call_is_recorded(telemetry: Telemetry) -> None:
    """Of a call with one wrong value, all others."""
    torch = pytest.importorskip("torch")
    wrong: Any = telemetry
    with wrong.step(epoch=0, samples=4) as now:
        now.put({"acuracy": 1.0, "loss": 0.5}, accuracy=[1, 2], gradient_norm=2.0)
        now.seed("a", stage=99, alpha=0.5)
        weight = torch.nn.Parameter(torch.ones(1))
        weight.grad = torch.tensor([3.0])
        now.gradients(iter([weight]), sources=5)
        wrong.seeds(["b", "c"], alpha=[0.1, 0.2], alfa=[1, 2])
        wrong.validation(loss=0.75, accuracy="high")
    telemetry.record_step({"loss": 0.25, "lr": 0.1}, epoch=1)
    [first, second] = telemetry._recorder.publisher.ring.after(0, 100)[0]
    assert (first.recorded["loss"], first.recorded["gradient_norm"], "accuracy" in first.recorded) == (0.5, 3.0, False)
    assert first.context["esper.validation.loss"] == 0.75
    alphas = dict(zip(first.live.ids, first.live.cells[:, 1].tolist(), strict=True))
    assert alphas == {"a": 0.5, "b": 0.1, "c": 0.2}
    assert is_absent(first.live.cells[:, 0]).all()
    assert (second.recorded["loss"], second.epoch, telemetry.health()["mistakes"]) == (0.25, 1, 7)


def test_wrong_numbers_of_a_step(telemetry: Telemetry) -> None:
    """Steps keep their count: a wrong epoch is that of the step before."""
    wrong: Any = telemetry
    with wrong.step(epoch=2):
        pass
    with wrong.step(epoch="3", samples=-1, global_step=2.5, stage=3) as now:
        now.put(loss=0.5)
    wrong.record_step({"loss": 0.25}, epoch=None, samples="many")
    wrong.record_step([0.25], epoch=4)
    wrong.record_step({"loss": 0.125})
    frames = telemetry._recorder.publisher.ring.after(0, 100)[0]
    assert [(frame.global_step, frame.epoch) for frame in frames] == [(1, 2), (2, 2), (3, 2), (4, 4), (5, 4)]
    assert [frame.recorded.get("loss") for frame in frames] == [None, 0.5, 0.25, None, 0.125]


def test_a_step_inside_a_step_or_after_the_end_runs_its_block(telemetry: Telemetry) -> None:
    """The outer step is recorded as if the inner one were not there."""
    ran = []
    with telemetry.step(epoch=0) as outer:
        with telemetry.step(epoch=1) as inner:
            inner.put(loss=9.0)
            inner.seed("a", alpha=1.0)
            ran.append("inner")
        outer.put(loss=0.5)
    outer.put(loss=9.0)
    assert [step["loss"] for step in recorded(telemetry)] == [0.5]
    telemetry.close()
    with telemetry.step(epoch=0) as after:
        after.put(loss=9.0)
        ran.append("after")
    telemetry.record_step({"loss": 9.0}, epoch=0)
    telemetry.validation(loss=9.0)
    assert (ran, len(recorded(telemetry)), telemetry.health()["mistakes"]) == (["inner", "after"], 1, 5)


def test_the_users_own_exceptions_are_untouched(telemetry: Telemetry) -> None:
    """They leave the block as without us, and the step counts as failed."""
    error = KeyError("mine")
    with pytest.raises(KeyError) as raised, telemetry.step(epoch=0) as now:  # noqa: PT012 - that is the test
        now.put(los=0.5)
        with telemetry.step(epoch=0), now.kernel(3):  # type: ignore[arg-type]
            raise error
    assert raised.value is error
    assert (telemetry.health()["failed"], telemetry.health()["mistakes"]) == (1, 3)
    with pytest.raises(esper_otel.WrongState):
        now.state()  # returns what the program needs
    telemetry.close(timeout="long")  # type: ignore[call-arg]
    assert telemetry.health()["mistakes"] == 4


def test_what_is_counted_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    """At the end, and as a metric; a program that makes up names does not fill the log."""
    with esper_otel.start(settings=EsperSettings(on_mistake="warn"), export_steps=False) as telemetry:
        for number in range(150):
            telemetry.record_step({f"loss_{number}": 1.0}, epoch=0)
        counts = telemetry._wiring.counts()  # type: ignore[attr-defined]
    assert counts["esper.mistakes", ""] == 150
    assert caplog.text.count("mistake: ") == 100
    assert "further kinds of mistakes are only counted" in caplog.text
    assert caplog.messages[-1].endswith("frames recorded 150, mistakes left out 150")


def test_by_default_no_call_passes_through_anything_of_ours() -> None:
    """So that sparing costs nothing where nobody asked for it."""
    with esper_otel.start(export_steps=False) as telemetry, telemetry.step(epoch=0) as now:
        assert (type(telemetry), type(now), telemetry.mistakes) == (Telemetry, Step, None)
    assert "esper.mistakes" not in {name for name, _ in telemetry._wiring.counts()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("on_mistake", ["raise", "warn"])
def test_a_watched_loop(on_mistake: Any) -> None:
    """``put`` and ``validation`` of the loader."""
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = [torch.ones(4, 2)] * 3
    settings = EsperSettings(on_mistake=on_mistake)
    with esper_otel.watch(model, optimizer, data, settings=settings, export_steps=False) as loader:
        face: Any = loader
        mistakes: list[Callable[[], object]] = [
            lambda: face.put(val_loss=1.0),
            lambda: face.put(accuracy="high"),
            lambda: face.validation(acc=0.5),
            lambda: face.put(3, 4),
            lambda: face.validation(0.5),
        ]
        for batch in loader:
            loss = model(batch).mean()
            for mistake in mistakes:
                if on_mistake == "warn":
                    mistake()
                else:
                    with pytest.raises((MistakeError, TypeError)):
                        mistake()
            loader.put(loss=loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        telemetry = loader.telemetry
    assert len([step["loss"] for step in recorded(telemetry)]) == 3
    assert telemetry.health()["mistakes"] == (15 if on_mistake == "warn" else 0)


def test_a_callback_knows_its_names_before_the_first_step() -> None:
    """A result that does not exist would otherwise show after the first epoch."""
    pytest.importorskip("transformers")
    from esper_otel.integrations import transformers

    with pytest.raises(esper_otel.UnknownMetric, match="unknown validation result 'acc': did you mean 'accuracy'"):
        transformers.EsperCallback(validation={"acc": "eval_acc"})
