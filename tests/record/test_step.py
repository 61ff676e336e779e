"""Recording a step: what is kept, what is absent, what is a mistake."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import esper_otel
from esper_otel import EsperSettings, Stage, Telemetry
from esper_otel.errors import InvalidName, InvalidValue, UnknownMetric, WrongState
from esper_otel.schema import METRICS, SEED_METRICS, STEP_METRICS

torch = pytest.importorskip("torch")


@pytest.fixture
def telemetry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Telemetry]:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    with esper_otel.start(run_id="run") as telemetry:
        yield telemetry


def metrics(telemetry: Telemetry) -> dict[str, float]:
    """The training metrics of the newest packet."""
    return dict(list(telemetry.pull())[-1].state.training_metrics)


PLAIN_NUMBERS = [0.5, 2, True, np.float32(0.5), np.float64(0.5), np.int64(3), np.array(0.5), torch.tensor(0.5)]


@pytest.mark.parametrize("value", [*PLAIN_NUMBERS, torch.tensor(0.5, requires_grad=True), torch.tensor(3)], ids=repr)
def test_any_single_number_can_be_put(telemetry: Telemetry, value: Any) -> None:
    """Trainers have floats, NumPy scalars and 0-d tensors; all of them are one number."""
    with telemetry.step(epoch=0) as now:
        now.put(loss=value)
    assert metrics(telemetry)["loss"] == float(value.detach() if isinstance(value, torch.Tensor) else value)


@pytest.mark.parametrize(
    "value",
    ["0.5", [0.5], (0.5,), {}, object(), 1j, b"1", torch.zeros(3), torch.zeros(1), np.zeros(1), torch.tensor(1j)],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_one_number_is_a_mistake_and_says_which_metric(telemetry: Telemetry, value: Any) -> None:
    """Found at the first step, not in the curves."""
    with pytest.raises(InvalidValue, match="loss"), telemetry.step(epoch=0) as now:
        now.put(loss=value)
    with pytest.raises(InvalidValue, match="loss"):
        telemetry.record_step({"loss": value}, epoch=0)
    with pytest.raises(InvalidValue, match="alpha"), telemetry.step(epoch=0) as now:
        now.seed("a", alpha=value)


def test_none_means_unknown(telemetry: Telemetry) -> None:
    """What a helper could not compute stays absent; it is neither 0 nor NaN."""
    with telemetry.step(epoch=0) as now:
        now.put(loss=None, grad_conflict_rate=esper_otel.gradient_conflict_rate([torch.ones(2)]))
        now.seed("a", alpha=None, stage=3)
    [packets] = telemetry.pull()
    assert {"loss", "grad_conflict_rate", "kasmina.seed.alpha"}.isdisjoint(packets.names)


def test_an_unknown_name_is_a_mistake_that_names_the_nearest(telemetry: Telemetry) -> None:
    """A typo must not become a metric that nobody sees."""
    with telemetry.step(epoch=0) as now:
        with pytest.raises(UnknownMetric, match="'gradient_norm'"):
            now.put(gradient_nrom=1.0)
        with pytest.raises(UnknownMetric, match=r"'kasmina.apply_ms'"):
            now.put({"kasmina.apply": 1.0})
        with pytest.raises(UnknownMetric, match="'alpha'"):
            now.seed("a", alfa=1.0)  # type: ignore[call-arg] # the mistake under test
    with pytest.raises(UnknownMetric, match="'loss'"):
        telemetry.record_step({"los": 1.0}, epoch=0)
    with pytest.raises(UnknownMetric, match="'alpha'"):
        telemetry.seeds(["a"], alfa=[1.0])


@pytest.mark.parametrize("name", ["esper.seeds", "esper.frame.points", "kasmina.seed.alpha", "esper.steps"])
def test_what_is_ours_to_count_cannot_be_put(telemetry: Telemetry, name: str) -> None:
    """One source for each value."""
    with pytest.raises(UnknownMetric), telemetry.step(epoch=0) as now:
        now.put({name: 1.0})


def test_the_learning_rate_is_put_under_its_packet_key(telemetry: Telemetry) -> None:
    """Tamiyo looks for optimizer_lr; over OTLP it is esper.optimizer.lr."""
    with telemetry.step(epoch=0) as now:
        now.put(optimizer_lr=0.1)
    assert metrics(telemetry)["optimizer_lr"] == pytest.approx(0.1)


@given(st.sampled_from([math.nan, math.inf, -math.inf, 10**400, -(10**400)]))
def test_what_is_not_finite_is_kept_and_counted_and_never_in_a_packet(value: float) -> None:
    """A NaN loss is the most important value of a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_METRICS_EXPORTER", "none")
        with esper_otel.start(run_id="run") as telemetry:
            with telemetry.step(epoch=0) as now:
                now.put(loss=value)
            [packets] = telemetry.pull()
            assert "loss" in packets.names
            assert "loss" not in packets.state.training_metrics
            assert [event.level for event in packets.telemetry[-1].events] == [
                esper_otel.leyline.TelemetryLevel.Value("TELEMETRY_LEVEL_CRITICAL")
            ]
            assert telemetry.health()["nonfinite"] == 1


def test_values_out_of_range_are_kept_counted_and_explained(
    telemetry: Telemetry, caplog: pytest.LogCaptureFixture
) -> None:
    """An accuracy given as a percentage is data: no exception, but nobody should have to guess."""
    for _ in range(3):
        telemetry.record_step({"accuracy": 97.0, "hook_latency_ms": -1.0, "loss": -5.0}, epoch=0)
    assert metrics(telemetry)["accuracy"] == 97.0
    assert telemetry.health()["out_of_range"] == 6
    [line] = [record.getMessage() for record in caplog.records if "accuracy" in record.getMessage()]
    assert "not a percentage" in line


def test_a_later_change_of_a_tensor_does_not_change_what_was_put(telemetry: Telemetry) -> None:
    """Optimizers and accumulators work in place."""
    loss = torch.tensor(1.0)
    with telemetry.step(epoch=0) as now:
        now.put(loss=loss)
        loss += 1.0
    assert metrics(telemetry)["loss"] == 1.0


@pytest.mark.parametrize("values", [{"loss": 1.0}, {"loss": 1.0, "gradient_norm": 1.0}], ids=["odd", "as most are"])
def test_numbers_of_steps_begin_at_one_and_go_on_from_the_highest(
    telemetry: Telemetry, values: dict[str, float]
) -> None:
    """A number that goes back is data: kept, counted, and its packet has an id of its own."""
    for given_step in (None, 10, 12, None, 13, 5, None, 2**63):
        telemetry.record_step(values, epoch=0, global_step=given_step)
    for wrong in (-1, 2**64, 1.5, "14"):
        with pytest.raises(InvalidValue, match="global_step"):
            telemetry.record_step(values, epoch=0, global_step=wrong)  # type: ignore[arg-type] # the mistake
    page = telemetry.pull()
    assert [packets.step for packets in page] == [1, 10, 12, 13, 13, 5, 14, 2**63]
    assert len({packets.state.packet_id for packets in page}) == 8


@pytest.mark.parametrize("wrong", [-1, 1.5, "1", None, 2**64])
def test_an_epoch_or_number_that_cannot_be_is_a_mistake(telemetry: Telemetry, wrong: Any) -> None:
    """Counters in a trainer are whole."""
    with pytest.raises(InvalidValue, match="epoch"):
        telemetry.step(epoch=wrong)
    with pytest.raises(InvalidValue, match="epoch"):
        telemetry.record_step({}, epoch=wrong)
    if wrong is not None:
        with pytest.raises(InvalidValue, match="global_step"):
            telemetry.step(epoch=0, global_step=wrong)
        with pytest.raises(InvalidValue, match="samples"):
            telemetry.step(epoch=0, samples=wrong)


def test_a_step_that_raises_is_published_as_far_as_it_got(telemetry: Telemetry) -> None:
    """The last step before a crash is the one that people look for."""
    telemetry.record_step({"loss": 1.0}, epoch=0)

    def step_that_raises() -> None:
        with telemetry.step(epoch=0) as now:
            now.put(loss=2.0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        step_that_raises()
    telemetry.record_step({"loss": 4.0}, epoch=0)
    first, failed, after = telemetry.pull()
    assert failed.state.training_metrics["loss"] == 2.0
    assert "loss_ewma" not in failed.names
    assert "esper.step.failed" in failed.names
    assert after.state.training_metrics["loss_delta"] == 3.0
    assert telemetry.health()["failed"] == 1
    assert first.state.packet_id != failed.state.packet_id


def test_one_step_at_a_time(telemetry: Telemetry) -> None:
    """Two open steps would take each other's values."""
    with telemetry.step(epoch=0) as now:
        with pytest.raises(WrongState, match="still open"), telemetry.step(epoch=0):
            pass
        with pytest.raises(WrongState, match="record_step"):
            telemetry.record_step({}, epoch=0)
    for late in (lambda: now.put(loss=1.0), lambda: now.seed("a"), now.state):
        with pytest.raises(WrongState, match="outside its step"):
            late()
    assert telemetry.health()["recorded"] == 1


def test_a_closed_session_records_nothing(telemetry: Telemetry) -> None:
    """A step after close() would be lost silently."""
    telemetry.close()
    with pytest.raises(WrongState, match="closed"):
        telemetry.step(epoch=0)


@pytest.mark.parametrize("seed_id", ["", "a\nb", "x" * 10_000])
def test_a_seed_id_that_cannot_be_is_a_mistake(telemetry: Telemetry, seed_id: str) -> None:
    """Ids become attributes, labels and packet ids."""
    with pytest.raises(InvalidName), telemetry.step(epoch=0) as now:
        now.seed(seed_id, alpha=0.1)
    with pytest.raises(InvalidName):
        telemetry.retire_seed(seed_id)


@pytest.mark.parametrize("stage", [12, -1, 3.5, "BLENDING"])
def test_a_stage_that_leyline_does_not_have_is_a_mistake(telemetry: Telemetry, stage: Any) -> None:
    """A made-up stage would be steered by."""
    with pytest.raises(InvalidValue, match="stage"), telemetry.step(epoch=0) as now:
        now.seed("a", stage=stage)


def test_a_retired_seed_is_in_no_later_packet(telemetry: Telemetry) -> None:
    """A seed lives until it is retired; the step in which that happens still has it."""
    with telemetry.step(epoch=0) as now:
        now.seed("a", stage=Stage.TRAINING)
        now.seed("b", stage=Stage.CULLED)
        telemetry.retire_seed("b")
    with telemetry.step(epoch=0) as now:
        now.seed("b", alpha=0.5)  # the id is taken by a new seed
        assert [s.seed_id for s in now.state().seed_states] == ["a", "b"]
    telemetry.retire_seed("a")
    telemetry.retire_seed("never seen")
    telemetry.record_step({}, epoch=0)
    lives = [{s.seed_id: s.stage for s in packets.state.seed_states} for packets in telemetry.pull()]
    assert lives == [{"a": 3, "b": 8}, {"a": 3, "b": 0}, {"b": 0}]


def test_a_seed_retired_and_recorded_again_in_one_step_begins_a_new_life(telemetry: Telemetry) -> None:
    """Kasmina may recycle an id at once."""
    with telemetry.step(epoch=0) as now:
        now.seed("a", stage=Stage.FOSSILIZED, risk_score=0.9)
    with telemetry.step(epoch=0) as now:
        telemetry.retire_seed("a")
        now.seed("a", stage=Stage.DORMANT)
    telemetry.record_step({}, epoch=0)
    last = list(telemetry.pull())[-1]
    [state] = last.state.seed_states
    assert (state.stage, state.risk_score) == (1, 0.0)


def test_columns_go_to_the_open_step_or_to_the_next(telemetry: Telemetry) -> None:
    """Trainers that measure everything themselves have arrays."""
    telemetry.seeds(["a", "b"], alpha=[0.1, math.nan])
    telemetry.record_step({}, epoch=0)
    with telemetry.step(epoch=0) as now:
        now.seed("a", alpha=0.3)
        telemetry.seeds(["b", "a"], risk_score=torch.tensor([0.5, 0.7]))
    first, second = telemetry.pull()
    assert [len(packet.metrics) for packet in first.telemetry[:2]] == [1, 0]
    scores = {s.seed_id: (s.metrics["alpha"], s.risk_score) for s in second.state.seed_states}
    assert list(scores["a"]) == pytest.approx([0.3, 0.7])
    assert scores["b"][1] == 0.5


def test_now_state_is_the_step_so_far_with_the_latencies_of_the_step_before(telemetry: Telemetry) -> None:
    """Tamiyo's latency rules could otherwise never fire."""
    with telemetry.step(epoch=3, samples=10) as now:
        now.put(loss=1.0)
        assert "hook_latency_ms" not in now.state().training_metrics
        with now.hook(), now.tamiyo():
            pass
        with now.finalize():
            pass
    [before] = telemetry.pull()
    with telemetry.step(epoch=3, samples=10) as now:
        now.put(loss=3.0)
        with now.hook():
            state: Any = now.state()
            again: Any = now.state()
    assert again == state
    late = ("hook_latency_ms", "tamiyo_latency_ms", "step_latency_ms", "kasmina.finalize_ms", "samples_per_s")
    for name in late:
        assert state.training_metrics[name] == before.state.training_metrics[name]
    assert state.training_metrics["loss_delta"] == 2.0
    assert (state.packet_id, state.global_step, state.current_epoch) == ("run-step-2", 2, 3)
    [after] = telemetry.pull()
    assert after.state.training_metrics["hook_latency_ms"] != before.state.training_metrics["hook_latency_ms"]
    assert after.state.training_metrics["loss_delta"] == 2.0


def test_scopes_add_up_and_lie_inside_each_other(telemetry: Telemetry) -> None:
    """step = hook + finalize + rest; tamiyo and apply lie inside the hook."""
    with telemetry.step(epoch=0) as now:
        for _ in range(2):
            with now.hook():
                with now.tamiyo():
                    sum(range(20_000))
                with now.apply():
                    sum(range(20_000))
        with now.finalize():
            sum(range(20_000))
        with now.kernel("a"):
            sum(range(20_000))
    [packets] = telemetry.pull()
    ms = packets.state.training_metrics
    assert 0 < ms["tamiyo_latency_ms"] + ms["kasmina.apply_ms"] <= ms["hook_latency_ms"]
    assert ms["hook_latency_ms"] + ms["kasmina.finalize_ms"] <= ms["step_latency_ms"]
    [kernel] = packets.telemetry[0].metrics
    assert kernel.name == "kasmina.seed.last_kernel_latency_ms"
    assert 0 < kernel.value < ms["step_latency_ms"]


def test_the_cycle_is_the_wait_for_input_and_the_step(telemetry: Telemetry) -> None:
    """samples_per_s is what a user computes from the two."""
    loader = [1, 2, 3]
    assert len(telemetry.batches(loader)) == 3
    for _ in telemetry.batches(loader):
        with telemetry.step(epoch=0, samples=32):
            sum(range(1000))
    for packets in telemetry.pull():
        ms = packets.state.training_metrics
        cycle_s = (ms["input_wait_ms"] + ms["step_latency_ms"]) / 1e3
        assert ms["samples_per_s"] == pytest.approx(32 / cycle_s, rel=1e-4)


def test_a_derived_value_that_is_given_stands_and_the_state_advances_all_the_same(telemetry: Telemetry) -> None:
    """A trainer may know better; its own value must not stop ours from going on."""
    telemetry.record_step({"loss": 1.0}, epoch=0)
    telemetry.record_step({"loss": 2.0, "loss_delta": 99.0}, epoch=0)
    telemetry.record_step({"loss": 4.0}, epoch=0)
    assert [p.state.training_metrics.get("loss_delta") for p in telemetry.pull()] == [None, 99.0, 2.0]


def test_the_loss_fields_of_a_packet_repeat_the_last_finite_loss(telemetry: Telemetry) -> None:
    """Tamiyo subtracts them unguarded: 2.3, missing, 2.3 must not read as a spike."""
    for loss in (2.3, None, math.nan, 2.4):
        telemetry.record_step({"loss": loss}, epoch=0)
    page = telemetry.pull()
    assert [round(p.state.validation_loss, 4) for p in page] == [2.3, 2.3, 2.3, 2.4]
    assert ["loss" in p.state.training_metrics for p in page] == [True, False, False, True]


def test_validation_stays_until_the_next_one(telemetry: Telemetry) -> None:
    """Field 3 and a key of every packet that follows."""
    telemetry.record_step({"loss": 1.0}, epoch=0)
    telemetry.validation(loss=0.7, accuracy=torch.tensor(0.8))
    for _ in range(2):
        telemetry.record_step({"loss": 1.0}, epoch=1)
    found = [(p.state.validation_accuracy, p.state.training_metrics.get("validation_loss")) for p in telemetry.pull()]
    known = (pytest.approx(0.8), pytest.approx(0.7))
    assert found == [(0.0, None), known, known]
    with pytest.raises(InvalidValue, match="loss= or accuracy="):
        telemetry.validation()


_KINDS = st.sampled_from([float, int, bool, np.float64, np.float32, np.array, torch.tensor])


@given(st.lists(st.tuples(_KINDS, _KINDS, st.integers(-(2**60), 2**60)), min_size=1, max_size=12), st.booleans())
def test_a_number_means_the_same_whichever_kind_the_steps_before_had(
    steps: list[tuple[Any, Any, int]], has_own: bool
) -> None:
    """Like a float of its value, also for what is derived from it."""
    processors = [Doubled()] if has_own else []
    with (
        esper_otel.start(run_id="run", export_steps=False, processors=processors) as telemetry,
        esper_otel.start(run_id="run", export_steps=False, processors=processors) as plainly,
    ):
        for of_loss, of_norm, number in steps:
            given = {"loss": of_loss(number), "gradient_norm": of_norm(abs(number) % 100), "accuracy": 0.5}
            telemetry.record_step(given, epoch=0)
            plainly.record_step({name: float(value) for name, value in given.items()}, epoch=0)
        found, expected = (each._recorder.publisher.ring.after(0, 100)[0] for each in (telemetry, plainly))
        for one, other in zip(found, expected, strict=True):
            assert (one.numbers, one.derived) == (other.numbers, other.derived)
        assert telemetry.state_dict() == plainly.state_dict()


@pytest.mark.parametrize("wrong", ["1.0", [1.0], 1j, object(), np.ones(2), {}])
def test_what_is_no_number_is_refused_after_steps_with_numbers_too(telemetry: Telemetry, wrong: Any) -> None:
    """The first look at a step is only whether its sum is a float."""
    for _ in range(3):
        telemetry.record_step({"loss": 1.0, "accuracy": 0.5}, epoch=0)
        with pytest.raises(InvalidValue, match="accuracy"):
            telemetry.record_step({"loss": 1.0, "accuracy": wrong}, epoch=0)


@given(
    st.lists(st.sets(st.sampled_from(["loss", "gradient_norm", "input_wait_ms", "grad_var", "accuracy"])), max_size=12)
)
def test_with_the_flag_off_gated_names_are_left_out_whichever_come_with_them(steps: list[set[str]]) -> None:
    """Whatever the names of the step before were, and in a call as in a scope."""
    gated = {"input_wait_ms", "grad_var"}
    settings = EsperSettings(tolaria_step_enrichment_enabled=False)
    with esper_otel.start(settings=settings, export_steps=False) as telemetry:
        for number, names in enumerate(steps):
            values = {name: number + place / 8 for place, name in enumerate(sorted(names))}
            if number % 2:
                telemetry.record_step(values, epoch=0)
            else:
                with telemetry.step(epoch=0) as now:
                    now.put(values)
        frames, _ = telemetry._recorder.publisher.ring.after(0, 100)
    for number, (names, frame) in enumerate(zip(steps, frames, strict=True)):
        values = {name: number + place / 8 for place, name in enumerate(sorted(names))}
        kept = {name: value for name, value in frame.recorded.items() if not name.startswith("esper.")}
        assert kept == {name: value for name, value in values.items() if name not in gated}
        assert not frame.derived


def test_with_the_flag_off_exactly_the_gated_metrics_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request: core metrics and seeds stay; no gated metric, no probe, no deriving."""
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    everything = {metric.name: 0.5 for metric in STEP_METRICS}
    with esper_otel.start(settings=EsperSettings(tolaria_step_enrichment_enabled=False)) as telemetry:
        telemetry.seeds(["a"], **{metric.field: [1.0] for metric in SEED_METRICS})
        telemetry.record_step(everything, epoch=0)
        with telemetry.step(epoch=0, samples=1) as now:
            now.put({**everything, "loss_ewma": torch.tensor(0.5)})
        for packets in telemetry.pull():
            assert {m.name for m in STEP_METRICS if not m.gated} <= packets.names
            assert packets.names.isdisjoint({m.name for m in METRICS if m.gated})
        absent = telemetry.absent()
        assert {m.name for m in STEP_METRICS if m.gated} <= absent.keys()
        assert "tolaria_step_enrichment_enabled" in absent["loss_ewma"]


def test_gradients_give_the_norm_and_the_conflict_rate(telemetry: Telemetry) -> None:
    """One L2 norm over all parameters; the share of pairs that pull against each other."""
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    with telemetry.step(epoch=0) as now:
        now.gradients(model, sources={"a": [torch.ones(2)], "b": [-torch.ones(2)], "c": [torch.ones(2)]})
    found = metrics(telemetry)
    assert found["gradient_norm"] == 5.0
    assert found["grad_conflict_rate"] == pytest.approx(2 / 3)


class Doubled:
    """A user's processor."""

    needs = ("loss_ewma",)
    gives = (esper_otel.Metric("loss_doubled", unit="loss", description="Twice the average."),)

    def initial(self) -> tuple[float, ...]:
        return ()

    def advance(self, state: tuple[float, ...], given: Any) -> tuple[float, ...]:
        return (given["loss_ewma"],) if "loss_ewma" in given else state

    def readings(self, state: tuple[float, ...]) -> dict[str, float]:
        return {"loss_doubled": 2 * state[0]}


class Broken(Doubled):
    def advance(self, state: tuple[float, ...], given: Any) -> tuple[float, ...]:
        raise RuntimeError("a bug of the user's")


def test_a_users_metrics_and_processors_travel_like_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three lines: needs and gives, the fold, start(processors=...)."""
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    own = esper_otel.Metric("tokens_per_s", unit="rate", description="Tokens per second.")
    with esper_otel.start(metrics=[own], processors=[Doubled()]) as telemetry:
        with telemetry.step(epoch=0) as now:
            now.put(loss=2.0, tokens_per_s=7.0)
        found = metrics(telemetry)
        assert (found["loss_doubled"], found["tokens_per_s"]) == (4.0, 7.0)


def test_a_users_processor_that_raises_costs_its_metric_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Telemetry never harms training."""
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    with esper_otel.start(processors=[Broken()]) as telemetry:
        telemetry.record_step({"loss": 2.0}, epoch=0)
        found = metrics(telemetry)
        assert found["loss_ewma"] == 2.0
        assert "loss_doubled" not in found
        assert telemetry.health()["faults"] == 1


def test_a_checkpoint_continues_numbers_and_derived_series(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """A resumed run's derived series equal an uninterrupted one's; torch.load(weights_only=True) can read it."""
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    losses = [2.0, 1.5, math.nan, 1.7, 0.3, 1.1]

    def run(telemetry: Telemetry, part: list[float]) -> list[dict[str, float]]:
        for loss in part:
            telemetry.record_step({"loss": loss, "gradient_norm": loss}, epoch=0)
        return [dict(p.state.training_metrics) | {"step": p.step} for p in telemetry.pull()]

    with esper_otel.start(run_id="whole") as telemetry:
        whole = run(telemetry, losses)
    with esper_otel.start(run_id="first") as telemetry:
        parts = run(telemetry, losses[:3])
        torch.save(telemetry.state_dict(), tmp_path / "checkpoint.pt")
    with esper_otel.start(run_id="second") as telemetry:
        telemetry.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
        parts += run(telemetry, losses[3:])
    hardware = {metric.name for metric in STEP_METRICS if metric.needs}
    assert [{k: v for k, v in step.items() if k not in hardware} for step in parts] == [
        {k: v for k, v in step.items() if k not in hardware} for step in whole
    ]


@pytest.mark.parametrize("state", [{}, [], {"version": 99}, None])
def test_a_checkpoint_of_something_else_is_refused_in_plain_words(telemetry: Telemetry, state: Any) -> None:
    """Resuming silently from nothing would break the series."""
    with pytest.raises(esper_otel.errors.ConfigurationError, match="state_dict"):
        telemetry.load_state_dict(state)


def test_a_cursor_reads_again_and_a_pull_without_one_goes_on(telemetry: Telemetry) -> None:
    """A controller that restarts goes on from its cursor; one that does not needs none."""
    for _ in range(5):
        telemetry.record_step({"loss": 1.0}, epoch=0)
    first = telemetry.pull(max_packets=2)
    assert [p.step for p in first] == [1, 2]
    assert [p.step for p in telemetry.pull()] == [3, 4, 5]
    assert [p.step for p in telemetry.pull(first.cursor)] == [3, 4, 5]
    assert list(telemetry.pull()) == []
    with pytest.raises(InvalidValue, match="cursor"):
        telemetry.pull("nonsense")
    with pytest.raises(InvalidValue, match="max_packets"):
        telemetry.pull(max_packets=0)


def test_frames_that_fell_out_of_the_buffer_are_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost silently."""
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    with esper_otel.start(settings=EsperSettings(buffer_bytes=1024 * 1024)) as telemetry:
        ids = [f"seed-{number}" for number in range(500)]
        for _ in range(50):
            telemetry.seeds(ids, alpha=np.random.default_rng(0).random(500))
            telemetry.record_step({"loss": 1.0}, epoch=0)
        page = telemetry.pull()
        assert page.gap > 0
        assert [p.step for p in page] == list(range(page.gap + 1, 51))
