"""The same expressions on a real serving run, where vLLM's own metrics are scraped too."""

import time

import pytest
from steerscope_dashboards.answers import Prometheus, unanswered

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

PATIENCE_SECONDS = 90.0
"""Drift needs some thousand tokens, which a quiet machine has answered in a quarter of that."""


@pytest.fixture(scope="module")
def served_prometheus(prometheus_tools, generated, tmp_path_factory):
    """From a server of its own: what a canary asks would be in other tests' way."""
    import served_world
    from steerscope.demo.live import server

    folder = tmp_path_factory.mktemp("served")
    with (
        server.running(folder, settings=served_world.settings()) as serving,
        served_world.running(serving, folder, generated) as url,
    ):
        deadline = time.monotonic() + PATIENCE_SECONDS
        while unanswered(url) and time.monotonic() < deadline:
            time.sleep(1.0)
        yield url


def test_every_expression_has_data_from_a_serving_run(served_prometheus):
    assert unanswered(served_prometheus) == []


def test_no_alert_about_the_pipeline_fires_there(served_prometheus):
    firing = Prometheus(served_prometheus).get("alerts")["alerts"]
    raised = {alert["labels"]["alertname"] for alert in firing}
    # Steering is unexpected until it is declared; half of these questions are forced. Questions
    # about people alone are not the mixture that the catalog was calibrated on.
    assert raised - {"SteerscopeHeartbeat"} <= {
        "SteerscopeSteeringUnexpected",
        "SteerscopeHallucinationRiskHigh",
        "SteerscopeFeatureDrift",
    }


def test_the_canary_knows_known_names_from_made_up_ones_there(served_prometheus):
    prometheus = Prometheus(served_prometheus)
    runs = prometheus.now("sum by (canary, outcome) (steerscope_canary_runs_total) > 0")
    assert {(one.labels["canary"], one.labels["outcome"]) for one in runs} == {
        ("known", "passed"),
        ("unknown", "passed"),
    }
    firing = {a["labels"]["alertname"]: a["state"] for a in prometheus.get("alerts")["alerts"]}
    assert firing["SteerscopeHeartbeat"] == "firing"


def test_vllm_s_engine_and_ours_have_the_same_labels(served_prometheus):
    prometheus = Prometheus(served_prometheus)
    joined = prometheus.now(
        "steerscope_engine_last_seen_seconds and on (model_name, engine) vllm:num_requests_running"
    )
    assert len(joined) == 1
