"""All settings of esper_otel. The standard ``OTEL_*`` variables are not defined here; OpenTelemetry reads them."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter, Signature
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, cast, dataclass_transform

from esper_otel.errors import ConfigurationError, nearest, unknown

_T = TypeVar("_T")
PREFIX = "ESPER_"
# Variables that name a run and a rank's place, and the beginnings of those that other programs of a deployment read.
_NOT_SETTINGS = ("RUN_ID", "RUN_ATTEMPT", "PARALLEL")
_OF_OTHERS = ("GATEWAY", "GRAFANA", "LEYLINE_", "OONA_", "OTEL", "PROMETHEUS_", "TIER", "TOOLS_")
# "tf32" is float32 whose products the tensor cores compute.
COMPUTE_DTYPES = ("float32", "tf32", "bfloat16", "float16", "float8")
_BOOLEANS = {
    **dict.fromkeys(("1", "on", "t", "true", "y", "yes"), True),
    **dict.fromkeys(("0", "off", "f", "false", "n", "no"), False),
}


@dataclass(slots=True)
class Setting:
    """A setting: its original and current default, its meaning, and the function that reads a value.

    ``read`` takes text from the environment or a value from the program. It raises ValueError with the allowed values.
    """

    shipped: Any
    meaning: str
    read: Callable[[Any], Any]
    default: Any


def _setting(*, default: _T, read: Callable[[Any], _T], meaning: str) -> _T:
    """Declares a setting. Type checkers see the type of its default."""
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


def _positive_or_none(value: Any) -> float | None:
    return None if value is None else _positive(value)


def _dtype(value: Any) -> str:
    if value not in ("", *COMPUTE_DTYPES):
        raise ValueError(f"Input should be one of {', '.join(COMPUTE_DTYPES)}")
    return str(value)


def _path(value: Any) -> Path | None:
    if value is not None and not isinstance(value, str | os.PathLike):
        raise ValueError("Input should be a path")
    return None if value is None else Path(value)


def _ranks(value: Any) -> Literal["all", "rank0"]:
    if value not in ("all", "rank0"):
        raise ValueError("Input should be 'all' or 'rank0'")
    return cast("Literal['all', 'rank0']", value)


def _reaction(value: Any) -> Literal["raise", "warn"]:
    if value not in ("raise", "warn"):
        raise ValueError("Input should be 'raise' or 'warn'")
    return cast("Literal['raise', 'warn']", value)


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


# Signals that end a process unless it handles them, and that other programs send on purpose.
_FLUSH_SIGNALS = ("SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGTERM")


def signal_names(text: str) -> tuple[str, ...]:
    """Reads ``flush_signals``; raises ValueError for an unsupported signal."""
    names = tuple(name for part in text.split(",") if (name := part.strip()))
    for name in names:
        if name not in _FLUSH_SIGNALS:
            raise ValueError(f"{name!r} is not one of {', '.join(_FLUSH_SIGNALS)}; separate several by commas")
        if name not in signal.Signals.__members__:
            raise ValueError(f"this system has no signal {name}")
    return names


# -- the class -------------------------------------------------------------------------------------------


def _checked(settings: Mapping[str, Setting], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of all settings.

    Raises:
        ConfigurationError: settings are invalid; the message lists all of them.
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
    """Lets ``EsperSettings.<setting> = value`` change the default of later instances; ``del`` restores it.

    Attributes:
        settings: the declared settings by name.
    """

    settings: Mapping[str, Setting]

    def __new__(cls, name: str, bases: tuple[type, ...], content: dict[str, Any]) -> _DefaultsByAssignment:
        settings = {key: value for key, value in content.items() if isinstance(value, Setting)}
        made = super().__new__(cls, name, bases, {key: content[key] for key in content if key not in settings})
        type.__setattr__(made, "settings", MappingProxyType(settings))
        return made

    @property
    def __signature__(cls) -> Signature:
        """Returns the signature for help() and notebooks."""
        return Signature(
            [Parameter(name, Parameter.KEYWORD_ONLY, default=each.default) for name, each in cls.settings.items()]
        )

    if not TYPE_CHECKING:  # otherwise type checkers would accept misspelt settings

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


class _GivenNames:
    """Which settings were given. Apart, so that it is not a setting, and neither compared nor shown."""

    __slots__ = ("_given",)
    _given: frozenset[str]


class _Settings(_GivenNames, metaclass=_DefaultsByAssignment):  # noqa: PLW1641 - thresholds are a dictionary
    """Behaviour common to all settings. Separate from the class below so that type checkers know its arguments."""

    def __init__(self, **values: Any) -> None:
        settings = type(self).settings
        for name in values:
            if name not in settings:
                raise unknown("setting", name, settings)
        given = {name: setting.default for name, setting in settings.items()}
        names = {_variable(name): name for name in settings}
        # Names are not case-sensitive; an empty variable counts as not set.
        of_environment = {names[key.upper()]: text for key, text in os.environ.items() if text and key.upper() in names}
        given |= of_environment
        changed = {name for name, setting in settings.items() if setting.default != setting.shipped}
        self.__dict__.update(_checked(settings, given | values))
        object.__setattr__(self, "_given", frozenset({*changed, *of_environment, *values}))

    def is_given(self, name: str) -> bool:
        """Whether the setting was given, by an argument, the environment or an assignment to the class."""
        return name in self._given

    def __getstate__(self) -> tuple[dict[str, Any], frozenset[str]]:
        return self.__dict__, self._given

    def __setstate__(self, state: tuple[dict[str, Any], frozenset[str]]) -> None:
        self.__dict__.update(state[0])
        object.__setattr__(self, "_given", state[1])

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"setting {name}: an instance is frozen; make another, or assign to {type(self).__name__}")

    def __delattr__(self, name: str) -> NoReturn:
        self.__setattr__(name, None)

    def __eq__(self, other: object) -> bool:
        return self.__dict__ == other.__dict__ if isinstance(other, _Settings) else NotImplemented

    def changed(self) -> dict[str, str]:
        """Returns the settings that differ from those we ship. Paths are left out: they concern this machine only."""
        values = {name: (self.__dict__[name], each.shipped) for name, each in type(self).settings.items()}
        return {name: str(now) for name, (now, was) in values.items() if now != was and not isinstance(now, Path)}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"


class EsperSettings(_Settings):
    """Settings of one session: from arguments, or else ``ESPER_<NAME>`` in the environment, or else defaults. Frozen.

    Raises:
        ConfigurationError: a value is invalid; the message names the setting and the variable.
    """

    tolaria_step_enrichment_enabled: bool = _setting(
        default=True,
        read=_boolean,
        meaning="False leaves out all gated metrics, the probes and derived metrics; core metrics and seeds stay.",
    )
    export_every_s: float = _setting(
        default=1.0,
        read=_number(0, 3600),
        meaning="Minimum time between two OTLP requests, in seconds; 0 sends each step at once.",
    )
    export_ranks: Literal["all", "rank0"] = _setting(
        default="all",
        read=_ranks,
        meaning="Ranks of a run that send: `all`, or only `rank0`; the others still record and can be pulled from.",
    )
    buffer_bytes: int = _setting(
        default=256 * 1024 * 1024,
        read=_integer(1024 * 1024),
        meaning="Memory for frames kept for export and pull(), in bytes; beyond it the oldest are dropped and counted.",
    )
    export_file: Path | None = _setting(
        default=None,
        read=_path,
        meaning="Directory for files of OTLP JSON lines, which are written instead of sending; `esper-otel send` "
        "delivers them later, from another machine, too.",
    )
    close_timeout_s: float = _setting(
        default=60.0,
        read=_number(0, 86_400),
        meaning="Maximum time for sending the remaining steps at the end, in seconds, while the endpoint takes them; "
        "after 5 s in which it takes none, and after a signal that ends the process, the rest is counted as dropped.",
    )
    spool_dir: Path | None = _setting(
        default=None,
        read=_path,
        meaning="Directory on a local disk where frames are also kept until they are acknowledged; the next start "
        "sends frames that a killed process has left.",
    )
    spool_bytes: int = _setting(
        default=1024 * 1024 * 1024,
        read=_integer(32 * 1024 * 1024),
        meaning="Disk space for the spool, in bytes; beyond it the oldest frames are deleted and counted.",
    )
    black_box_frames: int = _setting(
        default=256,
        read=_integer(0, 100_000),
        meaning="Number of last steps written to a file when the loss is not finite, or when an exception or SIGTERM "
        "ends the run; 0 disables the files.",
    )
    black_box_dir: Path | None = _setting(
        default=None,
        read=_path,
        meaning="Directory for these files; by default `esper-otel-UID` in the system's folder for temporary files.",
    )
    probe_period_s: float = _setting(
        default=1.0,
        read=_number(0.01, 3600),
        meaning="Time between two samples of a hardware probe, in seconds.",
    )
    peak_tflops: float | None = _setting(
        default=None,
        read=_positive_or_none,
        meaning="Highest rate of the training device in TFLOP/s, for `esper.mfu`; by default from the table of "
        "[throughput](throughput.md).",
    )
    compute_dtype: str = _setting(
        default="",
        read=_dtype,
        meaning="Dtype of the matrix products, for that table: `float32`, `tf32`, `bfloat16`, `float16` or `float8`.",
    )
    hw_metrics: bool = _setting(
        default=False,
        read=_boolean,
        meaning="True also sends the GPU's metrics under the names of the semantic conventions, such as "
        "`hw.gpu.utilization`; see [attributes](attributes.md).",
    )
    flush_signals: str = _setting(
        default="",
        read=_signals,
        meaning="Signals, in addition to SIGTERM, on which steps are sent at once, such as `SIGUSR1,SIGXCPU`, which a "
        "scheduler sends before it ends a job. The signal's other effects are kept.",
    )
    token_file: Path | None = _setting(
        default=None,
        read=_path,
        meaning="File with a bearer token for the OTLP endpoint, read again when it changes; "
        "replaces an `authorization` in `OTEL_EXPORTER_OTLP_HEADERS`.",
    )
    kernel_latency_budget_ms: float = _setting(
        default=10.0,
        read=_positive,
        meaning="Kernel latency, in milliseconds, above which a seed is reported as DEGRADED.",
    )
    risk_thresholds: dict[str, float] = _setting(
        default={},
        read=_thresholds,
        meaning='Other thresholds for risk signals, by name, such as `{"hook_budget": 80}`; `Infinity` disables one.',
    )
    on_mistake: Literal["raise", "warn"] = _setting(
        default="raise",
        read=_reaction,
        meaning="What a mistake in recording, such as an unknown metric or a value that is not a number, leads to: "
        "`raise` raises an exception; `warn` logs each kind of mistake once, counts all of them, leaves out the value "
        "and records the rest of the step.",
    )
    ui: bool = _setting(
        default=False,
        read=_boolean,
        meaning="True opens the live page for this session, as `start(ui=True)` does: unless it is already open, "
        "`esper-otel ui` is started in a process of its own.",
    )


def settings_of_environment(ignored: Callable[[str], None]) -> EsperSettings:
    """Returns the settings; with ``ESPER_ON_MISTAKE=warn`` a wrong one has its default, and is only reported.

    Args:
        ignored: called with the message about each wrong setting.

    Raises:
        ConfigurationError: a setting is wrong, and a mistake raises.
    """
    try:
        return EsperSettings()
    except ConfigurationError:
        given = {key.upper().removeprefix(PREFIX).lower(): text for key, text in os.environ.items() if text}
        if given.get("on_mistake") != "warn":
            raise
    defaults = {}
    for name, setting in EsperSettings.settings.items():
        try:
            _checked({name: setting}, {name: given.get(name, setting.default)})
        except ConfigurationError as error:
            ignored(f"{error}; the default is {setting.default}")
            defaults[name] = setting.default
    return EsperSettings(**defaults)


def unknown_variables() -> list[str]:
    """Returns a message for each variable ``ESPER_<NAME>`` that nothing reads, with the setting that may be meant."""
    known = [*(name.upper() for name in EsperSettings.settings), *_NOT_SETTINGS]
    messages = []
    for variable, text in os.environ.items():
        name = variable.upper().removeprefix(PREFIX)
        if text and name != variable.upper() and name not in known:
            found = nearest(name, known)
            if found:
                messages.append(f"{variable} is unknown: did you mean {' or '.join(PREFIX + each for each in found)}?")
            elif not name.startswith(_OF_OTHERS):
                messages.append(f"{variable} is unknown; known: {', '.join(PREFIX + each for each in sorted(known))}")
    return messages
