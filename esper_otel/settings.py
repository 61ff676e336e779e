"""Every setting of esper_otel, once. The standard ``OTEL_*`` variables are read where OpenTelemetry reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from esper_otel.errors import ConfigurationError, UnknownMetric

_ModelMetaclass: Any = type(BaseSettings)


class _DefaultsByAssignment(_ModelMetaclass):  # type: ignore[misc] # pydantic does not export its metaclass
    """Lets ``EsperSettings.<setting> = value`` change the default of later instances; ``del`` puts it back."""

    def __setattr__(cls, name: str, value: object) -> None:  # noqa: N805 - a metaclass
        fields = cls.__dict__.get("__pydantic_fields__", {})
        if name.startswith("_") or cls.__dict__.get("__pydantic_complete__") is not True or name in _MODEL_NAMES:
            super().__setattr__(name, value)
            return
        if name not in fields:
            raise UnknownMetric(name, fields, what="setting")
        default = getattr(cls(**{name: value}), name)  # validated like any argument
        _SHIPPED.setdefault((cls, name), fields[name].default)
        fields[name].default = default
        cls.model_rebuild(force=True)

    def __delattr__(cls, name: str) -> None:  # noqa: N805 - a metaclass
        if (cls, name) not in _SHIPPED:
            super().__delattr__(name)
            return
        setattr(cls, name, _SHIPPED[cls, name])

    def __getattr__(cls, name: str) -> Any:  # noqa: N805 - a metaclass
        fields = cls.__dict__.get("__pydantic_fields__", {})
        if name in fields:
            return fields[name].default
        return super().__getattr__(name)


# Those that end a process unless it handles them, and that something outside sends on purpose.
_FLUSH_SIGNALS = ("SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGTERM")


def signal_names(text: str) -> tuple[str, ...]:
    """The signals of ``flush_signals``; ValueError when one is not among those that can be followed."""
    names = tuple(name for part in text.split(",") if (name := part.strip()))
    for name in names:
        if name not in _FLUSH_SIGNALS:
            raise ValueError(f"{name!r} is not one of {', '.join(_FLUSH_SIGNALS)}; separate several by commas")
    return names


_MODEL_NAMES = frozenset({"model_config", "model_fields"})
_SHIPPED: dict[tuple[type, str], Any] = {}  # defaults that have been assigned over


class EsperSettings(BaseSettings, metaclass=_DefaultsByAssignment):
    """Settings of one session, frozen: from arguments, else ``ESPER_<NAME>`` in the environment, else defaults.

    Raises:
        ConfigurationError: a value that cannot be used; the message names the setting and the variable.
    """

    model_config = SettingsConfigDict(
        env_prefix="ESPER_", frozen=True, extra="forbid", validate_default=True, env_ignore_empty=True
    )

    tolaria_step_enrichment_enabled: bool = Field(
        default=True,
        description="False leaves out every gated metric, the probes and the deriving; core metrics and seeds stay.",
    )
    export_every_s: float = Field(
        default=1.0,
        ge=0,
        le=3600,
        allow_inf_nan=False,
        description="Least time between two OTLP requests, in seconds; 0 sends each step at once.",
    )
    export_ranks: Literal["all", "rank0"] = Field(
        default="all",
        description="Which ranks of a run send: `all`, or `rank0` alone; the others record and can be pulled from.",
    )
    buffer_bytes: int = Field(
        default=256 * 1024 * 1024,
        ge=1024 * 1024,
        description="Memory for frames kept for export and for pull(), in bytes; the oldest are dropped and counted.",
    )
    spool_dir: Path | None = Field(
        default=None,
        description="Directory of a local disk where frames are kept, too, until they are acknowledged: what a killed "
        "process leaves is sent by the next start.",
    )
    spool_bytes: int = Field(
        default=1024 * 1024 * 1024,
        ge=32 * 1024 * 1024,
        description="Disk that the spool may take, in bytes; the oldest frames are deleted and counted.",
    )
    black_box_frames: int = Field(
        default=256,
        ge=0,
        le=100_000,
        description="How many of the last steps are written to a file when the loss is not finite, or the run ends by "
        "an exception or SIGTERM; 0 for none.",
    )
    black_box_dir: Path | None = Field(
        default=None,
        description="Where these files go; without it `esper-otel-UID` in the system's folder for temporary files.",
    )
    probe_period_s: float = Field(
        default=1.0,
        ge=0.01,
        le=3600,
        allow_inf_nan=False,
        description="Time between two samples of a hardware probe, in seconds.",
    )
    flush_signals: str = Field(
        default="",
        description="Signals on which steps are sent at once, beside SIGTERM, such as `SIGUSR1,SIGXCPU`: what a "
        "scheduler sends before it ends a job. What the signal does otherwise, it still does.",
    )
    token_file: Path | None = Field(
        default=None,
        description="File with a bearer token for the OTLP endpoint, read again when it changes; "
        "stands in place of an `authorization` in `OTEL_EXPORTER_OTLP_HEADERS`.",
    )
    kernel_latency_budget_ms: float = Field(
        default=10.0,
        gt=0,
        allow_inf_nan=False,
        description="A seed whose last kernel took longer, in milliseconds, is reported as DEGRADED.",
    )
    risk_thresholds: dict[str, float] = Field(
        default={},
        description='Other thresholds for risk signals, by name, such as `{"hook_budget": 80}`; `Infinity` '
        "silences one.",
    )

    @field_validator("flush_signals")
    @classmethod
    def _are_signals(cls, names: str) -> str:
        signal_names(names)
        return names

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            unknown = [fault["loc"][0] for fault in error.errors() if fault["type"] == "extra_forbidden"]
            if unknown:
                raise UnknownMetric(unknown[0], type(self).model_fields, what="setting") from None
            faults = "; ".join(
                f"{fault['loc'][0]} (or ESPER_{str(fault['loc'][0]).upper()}) = {fault['input']!r}: "
                + fault["msg"].removeprefix("Value error, ")
                for fault in error.errors()
            )
            raise ConfigurationError(f"setting {faults}") from None
