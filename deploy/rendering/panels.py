"""Panels and boards of Grafana, drawn with its SDK."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from grafana_foundation_sdk.builders import (
    barchart,
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
    xychart,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    DataSourceRef,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataTransformerConfig,
    SpecialValueMap,
    SpecialValueMatch,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from esper_otel.files.selectors import Naming
from esper_otel.schema import Stage

_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")

_COLORS = {
    Stage.UNKNOWN: "#c7d0d9",
    Stage.DORMANT: "#6e7079",
    Stage.GERMINATED: "#8ab8ff",
    Stage.TRAINING: "#3274d9",
    Stage.BLENDING: "#ff9830",
    Stage.SHADOWING: "#b877d9",
    Stage.PROBATIONARY: "#fade2a",
    Stage.FOSSILIZED: "#37872d",
    Stage.CULLED: "#c4162a",
    Stage.EMBARGOED: "#8f3bb8",
    Stage.RESETTING: "#96d98d",
    Stage.TERMINATED: "#3d3d42",
}

# Labels of target_info and of the device's description, with the titles of their columns.
OF_RESOURCE = {
    "esper_experiment_name": "experiment",
    "esper_run_id": "run",
    "esper_rank": "rank",
    "host_name": "host",
    "host_id": "host id",
    "slurm_job_id": "Slurm job",
    "k8s_pod_name": "pod",
    "esper_parallel_dp": "dp",
    "esper_parallel_tp": "tp",
    "esper_parallel_pp": "pp",
}

OF_DEVICE = {
    "esper_device_id": "device",
    "hw_model": "model",
    "hw_id": "UUID",
    "hw_parent": "UUID of its GPU",
    "esper_device_pci_bus_id": "PCI bus id",
    "esper_device_index": "GPU of DCGM",
}
Kind = Literal["stat", "lines", "stack", "stages", "table", "points", "bars", "heat", "identity"]


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
            .tooltip(DashboardCursorSync.CROSSHAIR)
        )
        self._board.with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        link = dashboard.DashboardLink("esper").type(DashboardLinkType.DASHBOARDS).tags(["esper"])
        self._board.link(link.as_dropdown(True).keep_time(True).include_vars(True))

    def variable(self, name: str, label: str, query: str, regex: str = "", *, multi: bool = False) -> None:
        """Adds a choice, from the values of a label."""
        variable = (
            dashboard.QueryVariable(name)
            .label(label)
            .query(query)
            .datasource(_SOURCE)
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
        """Marks the moments at which an expression has a value on every panel."""
        query = dashboard.AnnotationQuery().name(name).datasource(_SOURCE).enable(True).icon_color("orange")
        self._board.annotation(query.expr(expression).title_format(name).text_format(text).step("15s"))

    def rendered(self) -> str:
        """The file."""
        return JSONEncoder(sort_keys=True, indent=2).encode(self._board.build()) + "\n"


def _panel(shown: Shown) -> Any:
    panel = _KINDS[shown.kind](shown)
    panel = panel.title(shown.title).description(shown.description).datasource(_SOURCE)
    panel = panel.span(shown.width).height(shown.height)
    if shown.unit:
        panel = panel.unit(shown.unit)
    for number, query in enumerate(shown.queries):
        target = prometheus.Dataquery().expr(query.expression).legend_format(query.legend).ref_id(chr(65 + number))
        if shown.kind in {"table", "points", "bars", "identity"}:
            target = target.format(PromQueryFormat.TABLE)
        panel = panel.with_target(target.instant() if query.instant else target.range())
    if shown.limits:
        colors = ["green", "orange", "red"]
        if shown.low_is_bad:
            colors.reverse()
        values = [None, *shown.limits]
        colors = colors[len(colors) - len(values) :] if shown.low_is_bad else colors[: len(values)]
        steps = [Threshold(value=value, color=color) for value, color in zip(values, colors, strict=True)]
        panel = panel.thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
    return panel


def _stat(_shown: Shown) -> Any:
    calculation = common.ReduceDataOptions().calcs(["lastNotNull"])
    nan = SpecialValueMap(_nan())
    return stat.Panel().reduce_options(calculation).mappings([nan]).no_value("none")


def _nan() -> Any:
    return (
        dashboard.DashboardSpecialValueMapOptions()
        .match(SpecialValueMatch.NA_N)
        .result(ValueMappingResult(text="NaN", color="red", index=0))
        .build()
    )


def _lines(_shown: Shown) -> Any:
    legend = common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
    return timeseries.Panel().legend(legend.show_legend(True)).span_nulls(False).line_width(1)


def _stack(shown: Shown) -> Any:
    stacking = common.StackingConfig().mode(StackingMode.PERCENT).group("A")
    return _lines(shown).stacking(stacking).fill_opacity(40)


def _stages(_shown: Shown) -> Any:
    named = {
        str(int(stage)): ValueMappingResult(text=stage.name, color=_COLORS[stage], index=int(stage)) for stage in Stage
    }
    return statetimeline.Panel().mappings([ValueMap(options=named)]).merge_values(True).row_height(0.8)


def _table(shown: Shown) -> Any:
    merged = DataTransformerConfig(id_val="merge", options={})
    names = {f"Value #{chr(65 + number)}": name for number, name in enumerate(shown.columns)}
    organized = DataTransformerConfig(
        id_val="organize", options={"renameByName": names, "excludeByName": {"Time": True}}
    )
    return table.Panel().with_transformation(merged).with_transformation(organized)


def _points(shown: Shown) -> Any:
    """Series of (x, y) pairs, one a run: rows of both queries are joined, then told apart by their run."""
    merged = DataTransformerConfig(id_val="merge", options={})
    names = {f"Value #{chr(65 + number)}": name for number, name in enumerate(shown.columns)}
    organized = DataTransformerConfig(
        id_val="organize", options={"renameByName": names, "excludeByName": {"Time": True}}
    )
    parted = DataTransformerConfig(
        id_val="partitionByValues", options={"fields": ["run_id"], "keepFields": False, "naming": {"asLabels": True}}
    )
    panel = xychart.Panel()
    for transformation in (merged, organized, parted):
        panel = panel.with_transformation(transformation)
    return panel


def _bars(shown: Shown) -> Any:
    """A bar of 100 % for each rank; its parts are the queries, in their order."""
    merged = DataTransformerConfig(id_val="merge", options={})
    names = {f"Value #{chr(65 + number)}": name for number, name in enumerate(shown.columns)}
    organized = DataTransformerConfig(
        id_val="organize", options={"renameByName": names, "excludeByName": {"Time": True, "run_id": True}}
    )
    legend = common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
    panel = barchart.Panel().x_field("rank").orientation(VizOrientation.HORIZONTAL).stacking(StackingMode.PERCENT)
    panel = panel.legend(legend.show_legend(True)).fill_opacity(80).line_width(0)
    return panel.with_transformation(merged).with_transformation(organized)


def _identity(_shown: Shown) -> Any:
    """A row for each rank; the columns are labels, and when it was seen last."""
    names = {**OF_RESOURCE, **OF_DEVICE, "Value": "last seen"}
    options = {
        "renameByName": names,
        "excludeByName": {"Time": True},
        "indexByName": {name: number for number, name in enumerate(names)},
    }
    return table.Panel().with_transformation(DataTransformerConfig(id_val="organize", options=options))


def _heat(_shown: Shown) -> Any:
    """A row for each series."""
    return heatmap.Panel().calculate(calculate=False)


_KINDS = {
    "identity": _identity,
    "heat": _heat,
    "stat": _stat,
    "lines": _lines,
    "stack": _stack,
    "stages": _stages,
    "table": _table,
    "points": _points,
    "bars": _bars,
}
