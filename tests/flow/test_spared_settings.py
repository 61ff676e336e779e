"""``ESPER_ON_MISTAKE=warn``: no telemetry setting, however wrong, keeps a training run from starting."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import esper_otel
from esper_otel import EsperSettings, MistakeError

pytestmark = pytest.mark.own_code

E = "OTEL_EXPORTER_OTLP_"
# A wrong setting, and a word of the warning about it.
WRONG = [
    ({"ESPER_EXPORT_EVERY_S": "often"}, "export_every_s"),
    ({"ESPER_EXPORT_EVERY_S": "often", "ESPER_UI": "perhaps", "ESPER_BUFFER_BYTES": "1"}, "buffer_bytes"),
    ({"ESPER_RISK_THRESHOLDS": '{"nonsense": 1}'}, "nonsense"),
    ({"ESPER_RISK_THRESHOLDS": "["}, "risk_thresholds"),
    ({f"{E}ENDPOINT": "ftp://host:1"}, f"{E}ENDPOINT"),
    ({f"{E}HEADERS": "token"}, f"{E}HEADERS"),
    ({f"{E}CERTIFICATE": "/no/such.pem"}, f"{E}CERTIFICATE"),
    ({"ESPER_TOKEN_FILE": "/no/such"}, "ESPER_TOKEN_FILE"),
    ({"ESPER_SPOOL_DIR": "/proc/no/such"}, "/proc/no/such"),
    ({"OTEL_PYTHON_EXPORTER_OTLP_GRPC_CREDENTIAL_PROVIDER": "nobody", f"{E}ENDPOINT": "https://host"}, "nobody"),
    ({"OTEL_CONFIG_FILE": "/no/such.yaml"}, "/no/such.yaml"),
    ({"ESPER_RUN_ATTEMPT": "first"}, "ESPER_RUN_ATTEMPT"),
    ({"ESPER_RUN_ID": "x" * 300}, "longer than 256 bytes"),
    ({"RANK": "first"}, "RANK"),
    ({"RANK": "1", "WORLD_SIZE": "4"}, "without a common run id"),
]


@pytest.mark.parametrize(("environ", "said"), WRONG, ids=lambda each: str(each)[:60])
def test_a_wrong_setting_is_a_warning_and_steps_are_recorded(
    environ: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And without it the same setting raises."""
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "otlp")
    for name, text in {f"{E}ENDPOINT": "http://127.0.0.1:9", **environ}.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(esper_otel.EsperOtelError):
        esper_otel.start()
    monkeypatch.setenv("ESPER_ON_MISTAKE", "warn")
    telemetry = esper_otel.start()
    try:
        telemetry.record_step({"loss": 1.0}, epoch=0)
        assert telemetry.health()["recorded"] == 1
    finally:
        telemetry.close(timeout_s=0)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any(said in text for text in warnings), warnings


def test_a_spool_that_cannot_be_used_does_not_keep_steps_from_being_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from esper_otel.testing import MemoryCollector

    (tmp_path / "file").touch()
    with MemoryCollector() as collector:
        monkeypatch.setenv(f"{E}ENDPOINT", collector.grpc_endpoint)
        settings = EsperSettings(on_mistake="warn", spool_dir=tmp_path / "file")
        with esper_otel.start(settings=settings) as telemetry:
            telemetry.record_step({"loss": 1.0}, epoch=0)
        assert telemetry.health()["exported"] == 1


def test_a_wrong_argument_raises_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_ON_MISTAKE", "warn")
    with pytest.raises(MistakeError):
        esper_otel.start(run_id="")
