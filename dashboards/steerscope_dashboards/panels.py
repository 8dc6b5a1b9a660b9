"""Panels and whole dashboards, as objects of Grafana's own schema (its Foundation SDK).

Colours: neutral where a value is neither good nor bad; green, orange and red only where an alert
judges the same value by the same threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from grafana_foundation_sdk.builders import (
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    table,
    timeseries,
)
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    BigValueGraphMode,
    GraphThresholdsStyleMode,
    StackingMode,
)
from grafana_foundation_sdk.models.dashboard import (
    Dashboard,
    DashboardCursorSync,
    DashboardLinkType,
    DashboardSpecialValueMapOptions,
    DataSourceRef,
    DataTransformerConfig,
    FieldColorModeId,
    Panel,
    SpecialValueMap,
    SpecialValueMatch,
    Threshold,
    ThresholdsMode,
    ValueMappingResult,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from steerscope.export.instruments import Instrument

from steerscope_dashboards.pages import OWN_TAG, TAGS, Board
from steerscope_dashboards.promql import WITH_EXEMPLARS, ExpressionError, Matcher, Vector

SCHEMA_VERSION: Final = 39
"""Classic dashboards of Grafana 10.4; later ones migrate them by themselves."""
RATE: Final = "$__rate_interval"
DATASOURCE: Final = DataSourceRef(type_val="prometheus", uid="${datasource}")
MODEL: Final = Matcher("model_name", "=~", "$model")
ENGINE: Final = (MODEL, Matcher("engine", "=~", "$engine"))
FEATURE: Final = (*ENGINE, Matcher("feature", "=~", "$feature"))
SIGNAL: Final = (*ENGINE, Matcher("signal", "=~", "$signal"))
NO_TRAFFIC: Final = SpecialValueMap(
    DashboardSpecialValueMapOptions(
        SpecialValueMatch.NULL_AND_NAN, ValueMappingResult(text="No traffic", color="text")
    )
)
"""Zero divided by zero is no fault."""

PanelBuilder = Builder[Panel]


class About(NamedTuple):
    """What a reader is told: what is shown, and what to do about it."""

    shows: str
    act: str

    def __str__(self) -> str:
        return f"{self.shows}\n\n**What to do:** {self.act}"


class Query(NamedTuple):
    """One expression and how its series are called."""

    vector: Vector
    legend: str


class Level(NamedTuple):
    """From this value on, this colour."""

    value: float
    color: str


class Section(NamedTuple):
    """A titled row of panels."""

    title: str
    panels: Sequence[PanelBuilder]


def graph(
    title: str,
    about: About,
    unit: str,
    *queries: Query,
    stacked: bool = False,
    limit: float | None = None,
    span: int = 12,
) -> PanelBuilder:
    """Lines over time. ``limit`` draws the bound that an alert has."""
    panel = timeseries.Panel().title(title).description(str(about)).datasource(DATASOURCE)
    panel = panel.unit(unit).span(span).height(8).min(0.0).fill_opacity(30.0 if stacked else 8.0)
    for index, query in enumerate(queries):
        panel = panel.with_target(_target(index, query))
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    if limit is not None:
        style = common.GraphThresholdsStyleConfig().mode(GraphThresholdsStyleMode.DASHED)
        panel = panel.thresholds(_levels(Level(limit, "red"))).thresholds_style(style)
    return panel


def figure(
    title: str, about: About, unit: str, vector: Vector, *levels: Level, start: str = "text"
) -> PanelBuilder:
    """One large number; coloured where an alert judges it."""
    target = prometheus.Dataquery().expr(str(vector)).instant().ref_id("A").datasource(DATASOURCE)
    return (
        stat.Panel()
        .title(title)
        .description(str(about))
        .datasource(DATASOURCE)
        .unit(unit)
        .span(6)
        .height(4)
        .mappings([NO_TRAFFIC])
        .no_value("No data")
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.THRESHOLDS))
        .color_mode(BigValueColorMode.VALUE)
        .graph_mode(BigValueGraphMode.NONE)
        .thresholds(_levels(*levels, start=start))
        .with_target(target)
    )


def heat(title: str, about: About, unit: str, buckets: Vector, *, span: int = 12) -> PanelBuilder:
    """A histogram over time: each bucket's share of the darkness."""
    if "le" not in buckets.labels:
        raise ExpressionError(f"{title}: a heat map needs buckets")
    target = _target(0, Query(buckets.sum("le"), "{{le}}")).format(PromQueryFormat.HEATMAP)
    colors = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Blues").steps(64)
    return (
        heatmap.Panel()
        .title(title)
        .description(str(about))
        .datasource(DATASOURCE)
        .span(span)
        .height(8)
        .color(colors)
        .y_axis(heatmap.YAxisConfig().unit(unit))
        .with_target(target)
    )


def listing(title: str, about: About, vector: Vector, *hidden: str) -> PanelBuilder:
    """A table of series, one row each, without the ``hidden`` columns."""
    target = (
        prometheus.Dataquery()
        .expr(str(vector))
        .instant()
        .format(PromQueryFormat.TABLE)
        .ref_id("A")
        .datasource(DATASOURCE)
    )
    excluded = dict.fromkeys(("Time", "__name__", *hidden), True)
    tidy = DataTransformerConfig(id_val="organize", options={"excludeByName": excluded})
    return (
        table.Panel()
        .title(title)
        .description(str(about))
        .datasource(DATASOURCE)
        .span(12)
        .height(8)
        .with_transformation(tidy)
        .with_target(target)
    )


def variable(name: str, label: str, instrument: Instrument, *matchers: Matcher) -> QueryVariable:
    """A choice among a label's values, of which all are chosen at first."""
    if label not in instrument.labels:
        raise ExpressionError(f"{instrument.name} has no label {label}")
    selector = f"{{{', '.join(map(str, matchers))}}}" if matchers else ""
    return (
        dashboard.QueryVariable(name)
        .label(name.capitalize())
        .query(f"label_values({instrument.name}{selector}, {label})")
        .datasource(DATASOURCE)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.NATURAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(VariableOption(selected=True, text="All", value="$__all"))
    )


QueryVariable = dashboard.QueryVariable


def board(
    uid: Board,
    title: str,
    description: str,
    variables: Sequence[QueryVariable],
    sections: Sequence[Section],
) -> Dashboard:
    """A whole dashboard, with links to its siblings and to vLLM's own."""
    made = (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(list(TAGS))
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("30s")
        .link(_links("Steerscope", OWN_TAG))
        .link(_links("vLLM", "vllm"))
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
        )
    )
    for choice in variables:
        made = made.with_variable(choice)
    identity = 0
    for section in sections:
        made = made.with_row(dashboard.Row(section.title).id(identity := identity + 1))
        for panel in section.panels:
            made = made.with_panel(_Numbered(panel, identity := identity + 1))
    built = made.build()
    built.schema_version = SCHEMA_VERSION
    return built


class _Numbered(Builder[Panel]):
    """A panel with an id, so that links to it hold."""

    def __init__(self, panel: PanelBuilder, identity: int) -> None:
        self._panel, self._identity = panel, identity

    def build(self) -> Panel:
        built = self._panel.build()
        built.id_val = self._identity
        return built


def _links(title: str, tag: str) -> dashboard.DashboardLink:
    return (
        dashboard.DashboardLink(title)
        .type(DashboardLinkType.DASHBOARDS)
        .tags([tag])
        .as_dropdown(True)
        .include_vars(True)
        .keep_time(True)
    )


def _target(index: int, query: Query) -> prometheus.Dataquery:
    made = (
        prometheus.Dataquery()
        .expr(str(query.vector))
        .legend_format(query.legend)
        .range()
        .ref_id(chr(ord("A") + index))
        .datasource(DATASOURCE)
    )
    has_exemplars = any(f"{i.name}_bucket" in query.vector.text for i in WITH_EXEMPLARS)
    return made.exemplar(True) if has_exemplars else made


def _levels(*levels: Level, start: str = "text") -> dashboard.ThresholdsConfig:
    steps = [Threshold(value=None, color=start), *(Threshold(v, c) for v, c in levels)]
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)
