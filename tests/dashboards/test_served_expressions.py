"""The same expressions on a real serving run, where vLLM's own metrics are scraped too."""

import pytest
from steerscope_dashboards.answers import Prometheus, unanswered

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def served_prometheus(prometheus_tools, demo_server, generated, tmp_path_factory):
    import served_world

    with served_world.running(demo_server, tmp_path_factory.mktemp("served"), generated) as url:
        yield url


def test_every_expression_has_data_from_a_serving_run(served_prometheus):
    assert unanswered(served_prometheus) == []


def test_no_alert_about_the_pipeline_fires_there(served_prometheus):
    firing = Prometheus(served_prometheus).get("alerts")["alerts"]
    raised = {alert["labels"]["alertname"] for alert in firing}
    # Steering is unexpected until it is declared; half of these questions are forced.
    assert raised <= {"SteerscopeSteeringUnexpected", "SteerscopeHallucinationRiskHigh"}


def test_vllm_s_engine_and_ours_have_the_same_labels(served_prometheus):
    prometheus = Prometheus(served_prometheus)
    joined = prometheus.now(
        "steerscope_engine_last_seen_seconds and on (model_name, engine) vllm:num_requests_running"
    )
    assert len(joined) == 1
