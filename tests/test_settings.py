"""Settings: by argument, by environment, by assignment; and what a wrong one says."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

import esper_otel
from esper_otel import ConfigurationError, EsperSettings
from esper_otel.settings import unknown_variables

pytestmark = pytest.mark.own_code

FLAG = "tolaria_step_enrichment_enabled"
VARIABLE = "ESPER_TOLARIA_STEP_ENRICHMENT_ENABLED"
SHIPPED: dict[str, object] = {
    "tolaria_step_enrichment_enabled": True,
    "export_every_s": 1.0,
    "export_file": None,
    "close_timeout_s": 60.0,
    "export_ranks": "all",
    "black_box_frames": 256,
    "black_box_dir": None,
    "buffer_bytes": 268_435_456,
    "spool_dir": None,
    "spool_bytes": 1_073_741_824,
    "probe_period_s": 1.0,
    "peak_tflops": None,
    "compute_dtype": "",
    "hw_metrics": False,
    "flush_signals": "",
    "token_file": None,
    "kernel_latency_budget_ms": 10.0,
    "risk_thresholds": {},
    "on_mistake": "raise",
    "ui": False,
}


def by_argument(name: str, value: object) -> None:
    EsperSettings(**{name: value})  # type: ignore[arg-type]


def by_environment(name: str, value: object) -> None:
    os.environ[f"ESPER_{name.upper()}"] = str(value)  # the next test has an environment of its own
    EsperSettings()


def by_assignment(name: str, value: object) -> None:
    setattr(EsperSettings, name, value)


def test_defaults_as_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user gets who sets nothing."""
    monkeypatch.delenv("ESPER_BLACK_BOX_FRAMES")
    assert vars(EsperSettings()) == SHIPPED


def test_the_flag_by_class_assignment_changes_later_instances() -> None:
    """The request's own words: EsperSettings.tolaria_step_enrichment_enabled = False."""
    before = EsperSettings()
    EsperSettings.tolaria_step_enrichment_enabled = False
    assert EsperSettings.tolaria_step_enrichment_enabled is False
    assert EsperSettings().tolaria_step_enrichment_enabled is False
    assert before.tolaria_step_enrichment_enabled is True
    EsperSettings.tolaria_step_enrichment_enabled = True
    assert EsperSettings().tolaria_step_enrichment_enabled is True


def test_deleting_an_assignment_puts_the_shipped_default_back() -> None:
    """What a test or a notebook cell has assigned can be undone without knowing what it was."""
    EsperSettings.export_every_s = 5.0
    EsperSettings.export_every_s = 6.0
    del EsperSettings.export_every_s
    assert EsperSettings.export_every_s == EsperSettings().export_every_s == 1.0


def test_the_class_shows_the_default_in_force() -> None:
    """Before anything is assigned, too."""
    assert EsperSettings.tolaria_step_enrichment_enabled is True
    assert EsperSettings.export_every_s == 1.0


def test_an_argument_wins_over_the_environment_and_that_over_an_assignment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearer word counts."""
    EsperSettings.tolaria_step_enrichment_enabled = False
    monkeypatch.setenv(VARIABLE, "true")
    assert EsperSettings().tolaria_step_enrichment_enabled is True
    assert EsperSettings(tolaria_step_enrichment_enabled=False).tolaria_step_enrichment_enabled is False


@pytest.mark.parametrize("text", ["false", "False", "FALSE", "0", "no", "off", "f", "n"])
def test_the_flag_off_by_environment_in_every_usual_spelling(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Whatever a deployment file writes."""
    monkeypatch.setenv(VARIABLE, text)
    assert EsperSettings().tolaria_step_enrichment_enabled is False


@pytest.mark.parametrize("text", ["true", "True", "TRUE", "1", "yes", "on", "t", "y"])
def test_the_flag_on_by_environment_in_every_usual_spelling(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """As above; over an assignment that switched it off."""
    EsperSettings.tolaria_step_enrichment_enabled = False
    monkeypatch.setenv(VARIABLE, text)
    assert EsperSettings().tolaria_step_enrichment_enabled is True


def test_the_variable_is_found_in_lower_case_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment names are not case-sensitive here."""
    monkeypatch.setenv(VARIABLE.lower(), "false")
    assert EsperSettings().tolaria_step_enrichment_enabled is False


def test_an_empty_variable_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose files set what is not set to the empty string."""
    for name in EsperSettings.settings:
        monkeypatch.setenv(f"ESPER_{name.upper()}", "")
    assert vars(EsperSettings()) == SHIPPED


def test_numbers_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """0 is a value: it sends each step at once."""
    monkeypatch.setenv("ESPER_EXPORT_EVERY_S", "0")
    monkeypatch.setenv("ESPER_BUFFER_BYTES", "1048576")
    settings = EsperSettings()
    assert (settings.export_every_s, settings.buffer_bytes) == (0.0, 1_048_576)


def test_a_file_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether there is a token in it is seen when it is needed."""
    monkeypatch.setenv("ESPER_TOKEN_FILE", "/run/secrets/no such token")
    assert EsperSettings().token_file == Path("/run/secrets/no such token")


def test_other_esper_variables_are_not_ours_to_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """ESPER_RUN_ID is read elsewhere, and Esper itself has more."""
    monkeypatch.setenv("ESPER_RUN_ID", "digits-7")
    monkeypatch.setenv("ESPER_LEYLINE_SECRET", "secret")
    monkeypatch.delenv("ESPER_BLACK_BOX_FRAMES")
    assert vars(EsperSettings()) == SHIPPED


def test_an_instance_is_frozen() -> None:
    """A session's settings are those it started with."""
    settings = EsperSettings()
    with pytest.raises(AttributeError, match="setting export_every_s: an instance is frozen"):
        settings.export_every_s = 2.0
    with pytest.raises(AttributeError, match="frozen"):
        del settings.export_every_s
    assert settings == EsperSettings()


@pytest.mark.parametrize("how", [by_argument, by_assignment])
def test_a_misspelt_setting_raises_and_names_the_nearest(how: Callable[[str, object], None]) -> None:
    """A flag that silently does nothing is worse than an exception."""
    with pytest.raises(ConfigurationError) as raised:
        how("tolaria_step_enrichment_enable", False)
    assert str(raised.value) == (
        "unknown setting 'tolaria_step_enrichment_enable': did you mean 'tolaria_step_enrichment_enabled'?"
    )
    assert f"did you mean {FLAG!r}?" in str(raised.value)


@pytest.mark.parametrize("how", [by_argument, by_environment, by_assignment])
@pytest.mark.parametrize(
    ("name", "wrong", "rule"),
    [
        (FLAG, "maybe", "Input should be a valid boolean"),
        ("export_every_s", "-1", "Input should be greater than or equal to 0"),
        ("export_every_s", "nan", "Input should be a finite number"),
        ("export_every_s", "4000", "Input should be less than or equal to 3600"),
        ("export_every_s", "soon", "Input should be a valid number"),
        ("buffer_bytes", "1000", "Input should be greater than or equal to 1048576"),
        ("buffer_bytes", "1.5", "Input should be a valid integer"),
        ("probe_period_s", "0", "Input should be greater than or equal to 0.01"),
        ("kernel_latency_budget_ms", "0", "Input should be greater than 0"),
        ("kernel_latency_budget_ms", "inf", "Input should be a finite number"),
        ("export_ranks", "rank1", "Input should be 'all' or 'rank0'"),
        ("flush_signals", "SIGKILL", "'SIGKILL' is not one of SIGHUP"),
        ("risk_thresholds", "hook_budget=80", "Input should be numbers by name"),
        ("risk_thresholds", "[80]", "Input should be numbers by name"),
        ("risk_thresholds", '{"hook_budget": "much"}', "Input should be numbers by name"),
    ],
)
def test_a_wrong_value_names_setting_variable_value_and_rule(
    how: Callable[[str, object], None], name: str, wrong: str, rule: str
) -> None:
    """The message alone is enough to repair it, wherever it was set."""
    before = getattr(EsperSettings, name)
    with pytest.raises(ConfigurationError) as raised:
        how(name, wrong)
    assert str(raised.value).startswith(f"setting {name} (or ESPER_{name.upper()}) = {wrong!r}: {rule}")
    assert getattr(EsperSettings, name) == before


def test_all_faults_are_said_at_once() -> None:
    """One round of repair."""
    with pytest.raises(ConfigurationError) as raised:
        EsperSettings(export_every_s=-1, buffer_bytes=0)
    assert "export_every_s" in str(raised.value)
    assert "buffer_bytes" in str(raised.value)


def test_a_setting_of_a_session_is_taken_as_given() -> None:
    """What is assigned later changes no instance that is there."""
    mine = EsperSettings(probe_period_s=0.5)
    EsperSettings.probe_period_s = 2.0
    assert mine.probe_period_s == 0.5
    assert EsperSettings().probe_period_s == 2.0


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (FLAG, 0, False),
        ("buffer_bytes", 2.0**20, 2**20),
        ("export_every_s", 3, 3.0),
        ("spool_dir", "/spool", Path("/spool")),
        ("risk_thresholds", {"hook_budget": 80}, {"hook_budget": 80.0}),
        ("risk_thresholds", '{"hook_budget": Infinity}', {"hook_budget": float("inf")}),
    ],
)
def test_a_value_may_be_of_a_type_that_means_the_same(name: str, value: object, expected: object) -> None:
    """What a program has read from a file of its own, for one."""
    read = getattr(EsperSettings(**{name: value}), name)  # type: ignore[arg-type]
    assert read == expected
    assert type(read) is type(expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [(FLAG, "2"), (FLAG, None), ("buffer_bytes", 2**20 + 0.5), ("token_file", 7), ("flush_signals", 15)],
)
def test_a_value_of_another_type_is_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=f"setting {name} "):
        EsperSettings(**{name: value})  # type: ignore[arg-type]


def test_an_instance_is_a_value() -> None:
    """It can be compared, copied, sent to another process and shown; nothing in it is a secret."""
    settings = EsperSettings(export_every_s=2.0, risk_thresholds={"hook_budget": 80})
    assert copy.deepcopy(settings) == pickle.loads(pickle.dumps(settings)) == settings != EsperSettings()
    assert repr(settings).startswith("EsperSettings(tolaria_step_enrichment_enabled=True, export_every_s=2.0, ")
    assert [*inspect.signature(EsperSettings).parameters] == [*EsperSettings.settings]


def test_a_dictionary_that_is_changed_later_changes_no_instance() -> None:
    mine = {"hook_budget": 80.0}
    settings = EsperSettings(risk_thresholds=mine)
    mine["hook_budget"] = 1.0
    EsperSettings().risk_thresholds["hook_budget"] = 2.0
    assert settings.risk_thresholds == {"hook_budget": 80.0}
    assert EsperSettings().risk_thresholds == {}


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("ESPER_BUFER_BYTES", "ESPER_BUFER_BYTES is unknown: did you mean ESPER_BUFFER_BYTES?"),
        ("ESPER_BUFFER_SIZE", "ESPER_BUFFER_SIZE is unknown: did you mean ESPER_BUFFER_BYTES?"),
        ("esper_on_mistakes", "esper_on_mistakes is unknown: did you mean ESPER_ON_MISTAKE?"),
        ("ESPER_RUNID", "ESPER_RUNID is unknown: did you mean ESPER_RUN_ID?"),
        ("ESPER_FROBNICATE", "ESPER_FROBNICATE is unknown; known: ESPER_BLACK_BOX_DIR, "),
    ],
)
def test_an_unknown_variable_is_told_at_the_start(
    variable: str, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With the nearest one; the run goes on."""
    monkeypatch.setenv(variable, "1")
    esper_otel.start(export_steps=False).close()
    assert f"setting ignored: {said}" in caplog.text


def test_no_variable_that_something_reads_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of settings, of the run, and those that the programs of a deployment read."""
    for name in EsperSettings.settings:
        monkeypatch.setenv(f"ESPER_{name.upper()}", "1")
    for name in ("RUN_ID", "RUN_ATTEMPT", "OONA_PASSWORD", "OTELCOL_GRPC", "GATEWAY", "PROMETHEUS_OTLP", "TIER_CA"):
        monkeypatch.setenv(f"ESPER_{name}", "1")
    monkeypatch.setenv("ESPER_FROBNICATE", "")
    assert unknown_variables() == []


def test_what_was_given_is_known_also_of_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting of OpenTelemetry takes effect only where ours is not given, even if ours has its default."""
    assert not EsperSettings().is_given("export_every_s")
    assert EsperSettings(export_every_s=1.0).is_given("export_every_s")
    monkeypatch.setenv("ESPER_EXPORT_EVERY_S", "1")
    settings = EsperSettings()
    for each in (settings, copy.copy(settings), pickle.loads(pickle.dumps(settings))):
        assert each.is_given("export_every_s")
        assert not each.is_given("spool_dir")
        assert each == settings
    monkeypatch.delenv("ESPER_EXPORT_EVERY_S")
    EsperSettings.export_every_s = 2.0
    try:
        assert EsperSettings().is_given("export_every_s")
    finally:
        del EsperSettings.export_every_s
