"""Every setting of esper_otel, once. The standard ``OTEL_*`` variables are read where OpenTelemetry reads them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter, Signature
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, cast, dataclass_transform

from esper_otel.errors import ConfigurationError, unknown

_T = TypeVar("_T")
PREFIX = "ESPER_"
_BOOLEANS = {
    **dict.fromkeys(("1", "on", "t", "true", "y", "yes"), True),
    **dict.fromkeys(("0", "off", "f", "false", "n", "no"), False),
}


@dataclass(slots=True)
class Setting:
    """A setting: its default as shipped and as it is in force, what it means, and how a value of it is read.

    ``read`` takes text of the environment, or what a program gives; a ValueError says which values can be used.
    """

    shipped: Any
    meaning: str
    read: Callable[[Any], Any]
    default: Any


def _setting(*, default: _T, read: Callable[[Any], _T], meaning: str) -> _T:
    """Declares a setting. To a type checker it is its default."""
    return cast("_T", Setting(default, meaning, read, default))


# -- how values are read ---------------------------------------------------------------------------------


def _boolean(value: Any) -> bool:
    if isinstance(value, str | int | float):  # True and False are ints
        found = _BOOLEANS.get(str(int(value) if isinstance(value, bool) else value).strip().lower())
        if found is not None:
            return found
    raise ValueError("Input should be a valid boolean, such as true or false")


def _integer(least: int, most: float = math.inf) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        try:
            number = int(value)
            is_integer = isinstance(value, str) or number == value
        except (TypeError, ValueError, OverflowError):
            is_integer = False
        if not is_integer:
            raise ValueError("Input should be a valid integer")
        return _within(number, least, most)

    return read


def _number(least: float, most: float = math.inf) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        number = _any_number(value)
        if not math.isfinite(number):
            raise ValueError("Input should be a finite number")
        return _within(number, least, most)

    return read


def _any_number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("Input should be a valid number") from None


def _within(number: _T, least: Any, most: Any) -> _T:
    if number < least:
        raise ValueError(f"Input should be greater than or equal to {least}")
    if number > most:
        raise ValueError(f"Input should be less than or equal to {most}")
    return number


def _positive(value: Any) -> float:
    number = _number(-math.inf)(value)
    if number <= 0:
        raise ValueError("Input should be greater than 0")
    return number


def _path(value: Any) -> Path | None:
    if value is not None and not isinstance(value, str | os.PathLike):
        raise ValueError("Input should be a path")
    return None if value is None else Path(value)


def _ranks(value: Any) -> Literal["all", "rank0"]:
    if value not in ("all", "rank0"):
        raise ValueError("Input should be 'all' or 'rank0'")
    return cast("Literal['all', 'rank0']", value)


def _signals(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("Input should be names of signals, separated by commas")  # noqa: TRY004 - as all others
    signal_names(value)
    return value


def _thresholds(value: Any) -> dict[str, float]:
    rule = 'Input should be numbers by name, such as {"hook_budget": 80}'
    try:
        found = json.loads(value) if isinstance(value, str) else value
        return {str(name): _any_number(threshold) for name, threshold in found.items()}
    except (AttributeError, ValueError, RecursionError):
        raise ValueError(rule) from None


# Those that end a process unless it handles them, and that something outside sends on purpose.
_FLUSH_SIGNALS = ("SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGTERM")


def signal_names(text: str) -> tuple[str, ...]:
    """The signals of ``flush_signals``; ValueError when one is not among those that can be followed."""
    names = tuple(name for part in text.split(",") if (name := part.strip()))
    for name in names:
        if name not in _FLUSH_SIGNALS:
            raise ValueError(f"{name!r} is not one of {', '.join(_FLUSH_SIGNALS)}; separate several by commas")
    return names


# -- the class -------------------------------------------------------------------------------------------


def _checked(settings: Mapping[str, Setting], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of settings.

    Raises:
        ConfigurationError: some cannot be used; the message has them all.
    """
    checked: dict[str, Any] = {}
    faults = []
    for name, setting in settings.items():
        try:
            checked[name] = setting.read(given[name])
        except ValueError as error:
            faults.append(f"{name} (or {_variable(name)}) = {given[name]!r}: {error}")
    if faults:
        raise ConfigurationError(f"setting {'; '.join(faults)}")
    return checked


def _variable(name: str) -> str:
    return f"{PREFIX}{name.upper()}"


@dataclass_transform(kw_only_default=True, field_specifiers=(_setting,))
class _DefaultsByAssignment(type):
    """Lets ``EsperSettings.<setting> = value`` change the default of later instances; ``del`` puts it back.

    Attributes:
        settings: what is declared, by name.
    """

    settings: Mapping[str, Setting]

    def __new__(cls, name: str, bases: tuple[type, ...], content: dict[str, Any]) -> _DefaultsByAssignment:
        settings = {key: value for key, value in content.items() if isinstance(value, Setting)}
        made = super().__new__(cls, name, bases, {key: content[key] for key in content if key not in settings})
        type.__setattr__(made, "settings", MappingProxyType(settings))
        return made

    @property
    def __signature__(cls) -> Signature:
        """For help() and notebooks."""
        return Signature(
            [Parameter(name, Parameter.KEYWORD_ONLY, default=each.default) for name, each in cls.settings.items()]
        )

    if not TYPE_CHECKING:  # else a misspelt setting would pass

        def __getattr__(cls, name: str) -> Any:
            if name not in cls.settings:
                raise AttributeError(f"type object {cls.__name__!r} has no attribute {name!r}")
            return cls.settings[name].default

        def __setattr__(cls, name: str, value: object) -> None:
            setting = cls._named(name)
            setting.default = _checked({name: setting}, {name: value})[name]

        def __delattr__(cls, name: str) -> None:
            setting = cls._named(name)
            setting.default = setting.shipped

    def _named(cls, name: str) -> Setting:
        if name not in cls.settings:
            raise unknown("setting", name, cls.settings)
        return cls.settings[name]


class _Settings(metaclass=_DefaultsByAssignment):  # noqa: PLW1641 - thresholds are a dictionary
    """What holds for all settings. The class below stands apart, so that type checkers know its arguments."""

    def __init__(self, **values: Any) -> None:
        settings = type(self).settings
        for name in values:
            if name not in settings:
                raise unknown("setting", name, settings)
        given = {name: setting.default for name, setting in settings.items()}
        names = {_variable(name): name for name in settings}
        # Case does not matter; an empty variable is as good as none.
        given |= {names[key.upper()]: text for key, text in os.environ.items() if text and key.upper() in names}
        self.__dict__.update(_checked(settings, given | values))

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"setting {name}: an instance is frozen; make another, or assign to {type(self).__name__}")

    def __delattr__(self, name: str) -> NoReturn:
        self.__setattr__(name, None)

    def __eq__(self, other: object) -> bool:
        return self.__dict__ == other.__dict__ if isinstance(other, _Settings) else NotImplemented

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"


class EsperSettings(_Settings):
    """Settings of one session, frozen: from arguments, else ``ESPER_<NAME>`` in the environment, else defaults.

    Raises:
        ConfigurationError: a value that cannot be used; the message names the setting and the variable.
    """

    tolaria_step_enrichment_enabled: bool = _setting(
        default=True,
        read=_boolean,
        meaning="False leaves out every gated metric, the probes and the deriving; core metrics and seeds stay.",
    )
    export_every_s: float = _setting(
        default=1.0,
        read=_number(0, 3600),
        meaning="Least time between two OTLP requests, in seconds; 0 sends each step at once.",
    )
    export_ranks: Literal["all", "rank0"] = _setting(
        default="all",
        read=_ranks,
        meaning="Which ranks of a run send: `all`, or `rank0` alone; the others record and can be pulled from.",
    )
    buffer_bytes: int = _setting(
        default=256 * 1024 * 1024,
        read=_integer(1024 * 1024),
        meaning="Memory for frames kept for export and for pull(), in bytes; the oldest are dropped and counted.",
    )
    spool_dir: Path | None = _setting(
        default=None,
        read=_path,
        meaning="Directory of a local disk where frames are kept, too, until they are acknowledged: what a killed "
        "process leaves is sent by the next start.",
    )
    spool_bytes: int = _setting(
        default=1024 * 1024 * 1024,
        read=_integer(32 * 1024 * 1024),
        meaning="Disk that the spool may take, in bytes; the oldest frames are deleted and counted.",
    )
    black_box_frames: int = _setting(
        default=256,
        read=_integer(0, 100_000),
        meaning="How many of the last steps are written to a file when the loss is not finite, or the run ends by "
        "an exception or SIGTERM; 0 for none.",
    )
    black_box_dir: Path | None = _setting(
        default=None,
        read=_path,
        meaning="Where these files go; without it `esper-otel-UID` in the system's folder for temporary files.",
    )
    probe_period_s: float = _setting(
        default=1.0,
        read=_number(0.01, 3600),
        meaning="Time between two samples of a hardware probe, in seconds.",
    )
    flush_signals: str = _setting(
        default="",
        read=_signals,
        meaning="Signals on which steps are sent at once, beside SIGTERM, such as `SIGUSR1,SIGXCPU`: what a "
        "scheduler sends before it ends a job. What the signal does otherwise, it still does.",
    )
    token_file: Path | None = _setting(
        default=None,
        read=_path,
        meaning="File with a bearer token for the OTLP endpoint, read again when it changes; "
        "stands in place of an `authorization` in `OTEL_EXPORTER_OTLP_HEADERS`.",
    )
    kernel_latency_budget_ms: float = _setting(
        default=10.0,
        read=_positive,
        meaning="A seed whose last kernel took longer, in milliseconds, is reported as DEGRADED.",
    )
    risk_thresholds: dict[str, float] = _setting(
        default={},
        read=_thresholds,
        meaning='Other thresholds for risk signals, by name, such as `{"hook_budget": 80}`; `Infinity` silences one.',
    )
