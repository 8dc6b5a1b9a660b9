"""What an operator may decide, and what is refused before any file is written."""

from pathlib import Path

import pytest
import yaml
from steerscope.errors import ConfigError
from steerscope_dashboards import alerts, rules, settings
from steerscope_dashboards.promql import ExpressionError

SHIPPED = Path(__file__).resolve().parents[2] / "dashboards" / "settings.yaml"


@pytest.fixture
def changed(tmp_path):
    """Writes the shipped settings with some of them changed."""

    def write(**changes):
        tree = {**yaml.safe_load(SHIPPED.read_text()), **changes}
        path = tmp_path / "settings.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"objective": {"signal": "risk", "score": 0.85, "share": 0.95}}, "objective.score: 0.85"),
        ({"lag_seconds": 0.7}, "lag_seconds: 0.7"),
        ({"coverage": 1.5}, "coverage"),
        ({"high_share": float("nan")}, "high_share"),
        ({"coverege": 0.9}, "coverege"),
        ({"expected_policies": ['x"} or up']}, "expected_policies"),
        ({"high_label": "high|low"}, "high_label"),
        ({"runbooks": "javascript:alert(1)"}, "runbooks"),
        ({"replica_label": "pod, on"}, "replica_label"),
        ({"floors": {"sequences": 0}}, "floors"),
        ({"drift_psi": 0.0}, "drift_psi"),
        ({"canary_seconds": -1}, "canary_seconds"),
        ({"high_window": "15 minutes"}, "high_window"),
    ],
)
def test_a_bad_setting_is_refused_by_name(changed, changes, named):
    with pytest.raises(ConfigError) as caught:
        settings.load(changed(**changes))
    assert named in str(caught.value)
    assert "settings.yaml" in str(caught.value)


def test_a_missing_or_garbled_file_is_an_error_of_ours(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        settings.load(tmp_path / "none.yaml")
    garbled = tmp_path / "garbled.yaml"
    garbled.write_bytes(b"\xff\x00{{{")
    with pytest.raises(ConfigError, match=r"garbled\.yaml"):
        settings.load(garbled)


def test_an_objective_that_cannot_be_missed_fast_enough_is_refused(changed):
    loose = settings.load(
        changed(objective={"signal": "hallucination_risk", "score": 0.9, "share": 0.9})
    )
    with pytest.raises(ExpressionError, match=r"objective\.share: 0\.9 .* at least 0\.931"):
        alerts.alerts(loose)


def test_declared_policies_raise_no_alert(changed):
    made = rules.alert_file(settings.load(changed(expected_policies=["force-known", "inline"])))
    tree = yaml.safe_load(made)
    (rule,) = [
        rule
        for rule in tree["groups"][0]["rules"]
        if rule["alert"] == "SteerscopeSteeringUnexpected"
    ]
    assert 'policy!~"force-known|inline"' in rule["expr"]


def test_a_replica_label_ties_a_hub_to_its_own_vllm(changed):
    tied = settings.load(changed(replica_label="pod"))
    (alert,) = [a for a in alerts.alerts(tied) if a.name == "SteerscopeEngineSilent"]
    assert "\nand on (engine, model_name, pod)\n" in alert.expression
