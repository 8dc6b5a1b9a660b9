"""How many series there are, known beforehand; and a page that prometheus_client agrees with."""

import sys
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from steerscope.catalog import store
from steerscope.catalog.model import ModelMatch
from steerscope.cli.main import main
from steerscope.config import (
    CanaryCheck,
    CanarySettings,
    HubSettings,
    OtelSettings,
    Settings,
    TelemetrySettings,
)
from steerscope.errors import ConfigError
from steerscope.export import budget, instruments
from steerscope.export.exposition import MetricsPage
from steerscope.export.prometheus import HubCollector, steered_pairs
from steerscope.steering import traceparent
from steerscope.steering.interventions import Intervention, Op, Policy
from steerscope.telemetry.columns import Columns
from steerscope.telemetry.exemplars import Exemplar, Exemplars
from steerscope.telemetry.totals import CanaryTotals, HubTotals
from steerscope.telemetry.tracks import EngineKey

sys.path.insert(0, str(Path(__file__).parents[1] / "hub"))

import hub_world
import wide_world

pytestmark = pytest.mark.timeout(60)

TEXT, OPENMETRICS = "", "application/openmetrics-text; version=1.0.0"
PARSE = {TEXT: parse_text, OPENMETRICS: parse_openmetrics}
ODD = EngineKey('a "model" \\ of 100% {0}\nnot\\n more', "0")
FOUR = tuple(EngineKey("demo", engine) for engine in wide_world.ENGINES)
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
MOVE_BY_THEMSELVES = ("steerscope_hub_cpu_seconds", "steerscope_engine_last_seen_seconds")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return store.load(wide_world.write_catalog(tmp_path_factory.mktemp("wide") / "catalog"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return store.load(hub_world.write_catalog(tmp_path_factory.mktemp("small") / "catalog"))


def settings_of(catalog, **fields):
    return Settings(catalog=str(catalog.folder), **fields)


@pytest.fixture(scope="module")
def everything(wide):
    """Settings under which no metric is without a series."""
    check = CanaryCheck(prompts=("Who?",), expect={"signal_0": "high"})
    return settings_of(
        wide,
        policies=wide_world.policies(),
        hub=HubSettings(max_policies=60),
        otel=OtelSettings(endpoint="http://127.0.0.1:4317"),
        canary=CanarySettings(base_url="http://127.0.0.1:8000", checks={"a": check, "b": check}),
    )


def hub_totals(catalog, settings):
    scores = {signal.name: 0.5 for signal in catalog.signals}
    checks = settings.canary.checks if settings.canary is not None else ()
    hub = HubTotals(canaries={name: CanaryTotals(scores=dict(scores)) for name in checks})
    if settings.otel is not None:
        hub.undelivered.update(metrics=3, logs=4)
    return hub


def collector_of(catalog, settings, engines, edited=None, policies=None, exemplars=None):
    if policies is None:
        policies = (*catalog.policies, *settings.policies)
    if edited is None:
        edited = steered_pairs(Columns(catalog), policies)
    totals = wide_world.Filled(catalog, engines, edited)
    hub = hub_totals(catalog, settings)
    return HubCollector(
        catalog, totals, hub, lambda: policies, ModelMatch.EXACT, exemplars=exemplars
    )


def sizes(collector):
    return {family.name: len(family.samples) for family in collector.collect()}


def sizes_of(told, num_engines):
    return {
        row.instrument.name.removesuffix("_total"): row.of_hub + num_engines * row.of_engine
        for row in told.rows
    }


def test_the_budget_is_what_a_hub_exports_family_by_family(wide, everything):
    told = budget.declared(wide, everything)
    assert [row.instrument for row in told.rows] == list(instruments.INSTRUMENTS)
    assert all(row.of_engine or row.of_hub for row in told.rows)
    found = sizes(collector_of(wide, everything, FOUR))
    assert found == sizes_of(told, 4)
    assert told.num_series(4) == sum(found.values()) == told.of_hub + 4 * told.of_engine


def test_it_is_so_for_a_catalog_with_read_only_features_and_few_signals(small):
    settings = settings_of(small)
    found = sizes(collector_of(small, settings, FOUR[:1]))
    assert found == sizes_of(budget.declared(small, settings), 1)


def test_no_more_can_be_than_the_most_that_is_told(wide, everything):
    as_many_as_may_be = tuple(Policy(name=f"p{i}", interventions=()) for i in range(60))
    edited = np.ones((len(wide_world.FEATURES), len(Op)), np.bool_)
    found = sizes(collector_of(wide, everything, FOUR, edited, as_many_as_may_be))
    assert found == sizes_of(budget.most(wide, everything), 4)


def test_a_hub_that_counted_for_months_still_fits_in_2_mb(wide, everything):
    page = MetricsPage(collector_of(wide, everything, FOUR)).text(TEXT)
    assert len(page) < 2_000_000


def test_too_many_series_are_refused_with_what_they_are_of_and_what_to_do(wide):
    settings = settings_of(wide, telemetry=TelemetrySettings(max_series_per_engine=6000))
    most = budget.most(wide, settings)
    assert most.of_engine > 6000
    with pytest.raises(ConfigError) as caught:
        budget.check(wide, settings)
    told = str(caught.value)
    assert told.startswith("telemetry.max_series_per_engine: 6000, and one engine may have")
    assert str(most.of_engine) in told
    assert "1536 of steerscope_feature_activation, 1536 of steerscope_steered_tokens_total" in told
    assert told.endswith("lower hub.max_policies, or raise the limit")
    exactly = TelemetrySettings(max_series_per_engine=most.of_engine)
    budget.check(wide, settings_of(wide, telemetry=exactly))


def test_check_tells_the_budget_and_refuses_what_is_over_it(wide, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_bytes(msgspec.json.encode({"catalog": str(wide.folder)}))
    assert main(["check", str(path)]) == 0
    settings = settings_of(wide)
    declared, most = budget.declared(wide, settings), budget.most(wide, settings)
    assert (
        f"series    {declared.of_engine} an engine, at most {most.of_engine} (limit 20000); "
        f"{declared.of_hub} of the hub, at most {most.of_hub}\n"
    ) in capsys.readouterr().out
    limit = {"max_series_per_engine": most.of_engine - 1}
    path.write_bytes(msgspec.json.encode({"catalog": str(wide.folder), "telemetry": limit}))
    assert main(["check", str(path)]) == 2
    assert "telemetry.max_series_per_engine" in capsys.readouterr().err


def test_each_tier_of_bounds_is_within_the_one_before():
    for more, fewer in pairwise(instruments.ACTIVATION_TIERS):
        assert set(fewer) < set(more)


@pytest.mark.parametrize(
    ("num_features", "num_bounds"),
    [(1, 14), (70, 14), (71, 8), (109, 8), (110, 3), (200, 3), (201, 0), (10_000, 0)],
)
def test_more_features_have_fewer_bounds(num_features, num_bounds):
    assert len(instruments.activation_bounds(num_features)) == num_bounds


def samples(page, accept):
    """What a page says, without the values that move from one look to the next."""
    return {
        family.name: (
            family.type,
            family.documentation,
            family.unit,
            sorted(
                (s.name, sorted(s.labels.items()), value(s), s.exemplar) for s in family.samples
            ),
        )
        for family in PARSE[accept](page.decode())
    }


def value(sample):
    return None if sample.name.startswith(MOVE_BY_THEMSELVES) else sample.value


def same(collector, accept):
    """Our page and prometheus_client's of the same collector, parsed by it."""
    encode, _ = choose_encoder(accept)
    ours, theirs = MetricsPage(collector).text(accept), encode(collector)
    assert samples(ours, accept) == samples(theirs, accept)
    return samples(ours, accept)


def exemplars_of(catalog, key):
    made = Exemplars(instruments.bounds_for(catalog).score)
    trace = traceparent.parse(TRACE)
    buckets = {
        i: Exemplar(trace, score, 1_700_000_000_000_000_000 + i)
        for i, score in ((0, 0.01), (4, 0.35), (13, 1.0))
    }
    made._newest = {(key, signal.name): buckets for signal in catalog.signals}
    return made


@pytest.mark.parametrize("accept", [TEXT, OPENMETRICS])
@pytest.mark.parametrize("key", [ODD, EngineKey("demo", "0")])
def test_the_page_says_what_prometheus_client_would(wide, everything, key, accept):
    collector = collector_of(wide, everything, (key,), exemplars=exemplars_of(wide, key))
    found = same(collector, accept)
    assert len(found) == len(instruments.INSTRUMENTS)
    (_, _, _, scores) = found["steerscope_signal_score_ratio"]
    told = [exemplar for *_, exemplar in scores if exemplar is not None]
    assert len(told) == (3 * len(wide.signals) if accept == OPENMETRICS else 0)
    assert {labels["model_name"] for _, pairs, *_ in scores for labels in [dict(pairs)]} == {
        key.model_name
    }


@pytest.mark.parametrize("accept", [TEXT, OPENMETRICS])
def test_a_page_without_any_engine_has_all_families_too(wide, accept):
    collector = collector_of(wide, settings_of(wide), ())
    assert len(same(collector, accept)) == len(instruments.INSTRUMENTS)


@pytest.mark.parametrize("scheme", ["dots", "values"])
@pytest.mark.parametrize("of", ["text/plain", "application/openmetrics-text"])
def test_who_wants_names_written_otherwise_gets_what_prometheus_client_makes(small, of, scheme):
    accept = f"{of}; version=1.0.0; escaping={scheme}"
    collector = collector_of(small, settings_of(small), FOUR[:1])
    encode, _ = choose_encoder(accept)
    ours, theirs = MetricsPage(collector).text(accept), encode(collector)
    names = [[line.split()[0] for line in page.splitlines()] for page in (ours, theirs)]
    assert names[0] == names[1]


def test_a_page_follows_series_that_come_and_go(small):
    policies = [*small.policies]
    edited = np.zeros((3, len(Op)), np.bool_)
    collector = collector_of(small, settings_of(small), FOUR[:2], edited, policies)
    page, count = MetricsPage(collector), "steerscope_steered_tokens_total"

    def steered():
        metrics = hub_world.Metrics(page.text(TEXT).decode())
        pairs = (("known", "clamp"), ("known", "add"), ("unknown", "scale"), ("late", "add"))
        told = {
            pair: metrics.value(count, model_name="demo", engine="1", feature=pair[0], op=pair[1])
            for pair in pairs
        }
        return {pair: value for pair, value in told.items() if value is not None}

    assert steered() == {("known", "clamp"): 0}
    scaled = Intervention(feature="unknown", scale=2.0)
    policies.append(Policy(name="scaled", interventions=(scaled,)))
    assert steered() == {("known", "clamp"): 0, ("unknown", "scale"): 0}
    totals = collector._totals.engines[FOUR[1]]
    totals.steered[totals.columns.index["known"], list(Op).index(Op.ADD)] = 7
    policies.clear()
    assert steered() == {("known", "add"): 7}
