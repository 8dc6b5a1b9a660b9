"""Every expression of dashboards and rules, executed by a real Prometheus on a real hub's page."""

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from steerscope.export import instruments
from steerscope.export.instruments import Kind
from steerscope_dashboards import promql
from steerscope_dashboards.answers import AnswerError, Prometheus, unanswered
from steerscope_dashboards.expressions import Expression, Role, expressions

pytestmark = pytest.mark.timeout(180)


def test_every_expression_has_data_save_those_that_need_a_serving_vllm(
    observed_world, shipped, generated
):
    missing = {(one.role, one.where, one.text) for one in unanswered(observed_world.prometheus)}
    need_vllm = {
        (one.role, one.where, one.text)
        for one in expressions(shipped, generated)
        if one.needs_vllm and one.role is not Role.ALERT
    }
    assert {role for role, _, _ in need_vllm} == {Role.CONDITION, Role.PANEL}
    assert len(need_vllm) < 5
    assert missing == need_vllm


def test_prometheus_evaluates_every_rule_without_an_error(observed_world):
    prometheus = Prometheus(observed_world.prometheus)
    groups = {group["name"]: group["rules"] for group in prometheus.get("rules")["groups"]}
    assert set(groups) == {"steerscope.recording", "steerscope.alerts"}
    assert prometheus.unhealthy_rules() == []


def test_a_canary_that_nobody_answers_is_told_of_and_there_is_no_heartbeat(observed_world):
    alerts = Prometheus(observed_world.prometheus).get("alerts")["alerts"]
    told = {alert["labels"]["alertname"]: alert for alert in alerts}
    canary = told["SteerscopeCanaryFailing"]
    assert canary["labels"]["canary"] == "unheard"
    assert canary["annotations"]["description"].startswith("It never passed since the hub started.")
    assert "SteerscopeHeartbeat" not in told


def test_an_expression_without_data_is_noticed(observed_world, monkeypatch):
    from steerscope_dashboards import expressions as module

    lost = Expression(Role.PANEL, "nowhere", "steerscope_no_such_thing")
    undefined = Expression(Role.PANEL, "nowhere", "steerscope_build_info / 0 * 0")
    monkeypatch.setattr(module, "expressions", lambda *_: [lost, undefined])
    assert unanswered(observed_world.prometheus) == [lost, undefined]


def test_an_expression_that_is_not_promql_is_an_error(observed_world, monkeypatch):
    from steerscope_dashboards import expressions as module

    broken = Expression(Role.ALERT, "nowhere", "sum by (")
    monkeypatch.setattr(module, "expressions", lambda *_: [broken])
    with pytest.raises(AnswerError, match="parse error"):
        unanswered(observed_world.prometheus)


def test_every_threshold_on_a_histogram_is_a_bound_of_the_page_that_is_scraped(
    observed_world, shipped
):
    page = httpx.get(observed_world.metrics, timeout=10).text
    bounds: dict[str, set[float]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name.endswith("_bucket"):
                bounds.setdefault(family.name, set()).add(float(sample.labels["le"]))
    assert shipped.objective.score in bounds[instruments.SIGNAL_SCORE.name]
    assert shipped.lag_seconds in bounds[instruments.READOUT_LAG.name]
    for histogram, declared in promql.BOUNDS.items():
        assert set(declared) <= bounds[histogram.name], histogram.name


def test_every_histogram_has_its_bounds_declared():
    histograms = {i for i in instruments.INSTRUMENTS if i.kind is Kind.HISTOGRAM}
    assert set(promql.BOUNDS) == histograms


def test_every_declared_instrument_is_on_the_page_and_nothing_else_is(observed_world):
    page = httpx.get(observed_world.metrics, timeout=10).text
    found = {line.split()[2] for line in page.splitlines() if line.startswith("# TYPE")}
    declared = {i.name for i in instruments.INSTRUMENTS}
    assert {name for name in found if name.startswith("steerscope_")} == declared
