"""Dashboards for Grafana, of the catalogue: one run, its seeds, runs beside each other, and the telemetry itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from grafana_foundation_sdk.builders import (
    common,
    dashboard,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
    xychart,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, StackingMode
from grafana_foundation_sdk.models.dashboard import (
    AnnotationTarget,
    DataSourceRef,
    DataTransformerConfig,
    DynamicConfigValue,
    MatcherConfig,
    SpecialValueMap,
    SpecialValueMatch,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
    VariableHide,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from names import CATALOGUE, Naming

from esper_otel.schema import Stage

_UID = "${datasource}"
_UNITS = {
    "ms": "ms",
    "ratio": "percentunit",
    "GB": "decgbytes",
    "%": "percent",
    "s": "s",
    "By": "bytes",
    "Cel": "celsius",
}
_COLORS = {
    Stage.DORMANT: "#6e7079",
    Stage.GERMINATED: "#8ab8ff",
    Stage.TRAINING: "#3274d9",
    Stage.BLENDING: "#ff9830",
    Stage.SHADOWING: "#b877d9",
    Stage.PROBATIONARY: "#fade2a",
    Stage.FOSSILIZED: "#37872d",
    Stage.CULLED: "#c4162a",
}
Kind = Literal["stat", "lines", "stack", "stages", "table", "points"]


@dataclass(frozen=True, slots=True)
class Query:
    """One query of a panel: an expression, and what its series are called."""

    expression: str
    legend: str = ""
    instant: bool = False


@dataclass(frozen=True, slots=True)
class Shown:
    """One panel.

    Attributes:
        title: what it shows.
        description: how to read it.
        kind: how it is drawn.
        queries: what it asks for.
        unit: Grafana's name of the unit.
        width: of 24.
        height: in rows of the grid.
        limits: values from which on it turns orange, and red.
        low_is_bad: whether the limits are lower ones.
        columns: names of a table's columns, in the order of its queries.
    """

    title: str
    description: str
    kind: Kind
    queries: Sequence[Query]
    unit: str = ""
    width: int = 8
    height: int = 8
    limits: tuple[float, ...] = ()
    low_is_bad: bool = False
    columns: tuple[str, ...] = field(default=())


class Board:
    """Makes a dashboard.

    Args:
        naming: how metrics are asked for.
        uid: stable, so that links hold.
        title: its name.
        description: what it answers.
    """

    def __init__(self, naming: Naming, uid: str, title: str, description: str) -> None:
        suffix = f"-{naming.folder}" if naming.folder else ""
        self.file = f"{uid}.json"
        self._board = (
            dashboard.Dashboard(title)
            .uid(f"esper-{uid}{suffix}")
            .description(description)
            .tags(["esper"])
            .refresh("5s")
            .time("now-1h", "now")
            .timezone("browser")
            .editable()
            .tooltip(1)  # type: ignore[arg-type] # a shared crosshair
        )
        self._board.with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        self._board.link(
            dashboard.DashboardLink("esper")
            .type("dashboards")
            .tags(["esper"])
            .as_dropdown(as_dropdown=True)
            .keep_time(keep_time=True)
            .include_vars(include_vars=True)  # type: ignore[arg-type]
        )

    def variable(self, name: str, label: str, query: str, regex: str = "", *, multi: bool = False) -> None:
        """Adds a choice, from the values of a label."""
        variable = (
            dashboard.QueryVariable(name)
            .label(label)
            .query(query)
            .datasource(DataSourceRef(type_val="prometheus", uid=_UID))
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .regex(regex)
            .multi(multi)
            .include_all(multi)
        )
        if multi:
            variable = variable.all_value(".*")
        self._board.with_variable(variable)

    def row(self, title: str) -> None:
        """Begins a row."""
        self._board.with_row(dashboard.Row(title))

    def show(self, *panels: Shown) -> None:
        """Adds panels."""
        for shown in panels:
            self._board.with_panel(_panel(shown))

    def annotate(self, name: str, expression: str, text: str) -> None:
        """Marks moments on every panel."""
        query = (
            dashboard.AnnotationQuery()
            .name(name)
            .datasource(DataSourceRef(type_val="prometheus", uid=_UID))
            .enable(enable=True)
            .icon_color("orange")
            .expr(expression)
        )
        query._internal.target = AnnotationTarget()  # noqa: SLF001 - Grafana wants one
        del text
        self._board.annotation(query)

    def rendered(self) -> str:
        """The file."""
        return JSONEncoder(sort_keys=True, indent=2).encode(self._board.build()) + "\n"
