"""The public names are the documented ones, and each of them is there."""

from __future__ import annotations

import pytest

import esper_otel
from esper_otel import errors

DOCUMENTED = {
    *("start", "watch", "Telemetry", "Step", "Metric", "Stage", "EsperSettings", "Processor", "Packets", "Page"),
    *("LeylineMetricReader", "gradient_conflict_rate", "__version__"),
    *("EsperOtelError", "MistakeError", "UnknownMetric", "InvalidValue", "InvalidName", "InvalidCatalogue"),
    *("WrongState", "ConfigurationError", "AdapterError"),
    *(
        "TamiyoClient",
        "RankInfo",
        "RunInfo",
        "RunRanks",
        "GatewayError",
        "GatewayUnavailable",
        "UnknownRun",
        "StaleCursor",
    ),
}


def test_the_public_names_are_those_that_are_documented() -> None:
    """A name that is added or taken away is a decision, and stands in this list."""
    assert set(esper_otel.__all__) == DOCUMENTED
    assert list(esper_otel.__all__) == sorted(esper_otel.__all__)


def test_every_public_name_is_there_and_shown_to_editors() -> None:
    """Those that are imported on demand too."""
    for name in esper_otel.__all__:
        assert getattr(esper_otel, name) is not None
    assert set(DOCUMENTED) <= set(dir(esper_otel))


def test_an_unknown_name_is_an_attribute_error_that_names_it() -> None:
    """As from any other module."""
    with pytest.raises(AttributeError, match=r"module 'esper_otel' has no attribute 'strat'"):
        esper_otel.strat  # noqa: B018 - the access is what raises


def test_every_exception_for_users_is_public_and_has_one_root() -> None:
    """`except esper_otel.EsperOtelError` catches all that is ours."""
    ours = {
        name: each
        for name, each in vars(errors).items()
        if isinstance(each, type) and each.__module__ == errors.__name__
    }
    assert all(issubclass(each, esper_otel.EsperOtelError) for each in ours.values())
    between_our_parts = {"ProbeUnavailable"}
    assert ours.keys() - between_our_parts <= set(esper_otel.__all__)


def test_mistakes_are_also_what_python_calls_them() -> None:
    """Code that expects a ValueError, TypeError or RuntimeError keeps working."""
    assert issubclass(esper_otel.UnknownMetric, ValueError)
    assert issubclass(esper_otel.InvalidName, ValueError)
    assert issubclass(esper_otel.InvalidCatalogue, ValueError)
    assert issubclass(esper_otel.ConfigurationError, ValueError)
    assert issubclass(esper_otel.InvalidValue, TypeError)
    assert issubclass(esper_otel.WrongState, RuntimeError)
