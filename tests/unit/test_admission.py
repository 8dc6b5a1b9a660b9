import pytest
from steerscope.catalog import store
from steerscope.config import SteeringSettings
from steerscope.errors import SpecError
from steerscope.steering.admission import Admission
from steerscope.steering.interventions import steering_digest


@pytest.fixture
def admission(tiny_world):
    catalog = store.load(tiny_world.catalog)
    policies = {policy.name: policy for policy in catalog.policies}
    return Admission(catalog, SteeringSettings(max_interventions=3), lambda: policies)


def test_a_request_without_a_flag_is_stamped_unsteered(admission):
    made = admission.stamp("id-1", admission.resolve({"top_k": 3}), 12)
    assert (made.external_id, made.policy, made.segments) == ("id-1", "", ())


def test_a_policy_is_resolved_by_name(admission):
    asked = admission.resolve({"steering": "push"})
    made = admission.stamp("id-1", asked, 12)
    assert made.policy == "push"
    assert made.interventions[0].feature == "direction_1"
    assert made.digest == steering_digest(admission._catalog.digest, asked.spec.interventions, None)


@pytest.mark.parametrize(
    ("extra_args", "field"),
    [
        ({"steering": 3}, "steering"),
        ({"steering": ["push"]}, "steering"),
        ({"steering": ""}, "steering"),
        ({"steering": "nope"}, "steering"),
        ({"steering": "{"}, "steering"),
        (
            {"steering": '{"interventions":[{"feature":"x","add":1}]}'},
            "steering.interventions[0].feature",
        ),
        ({"steering_policy": "push"}, "steering_policy"),
        ({"steerscope": b"forged"}, "steerscope"),
        (
            {
                "steering": '{"interventions":['
                + ",".join(
                    f'{{"feature":"{f}","add":1}}'
                    for f in ("unit_1", "unit_2", "latent_1", "latent_2")
                )
                + "]}"
            },
            "steering.interventions",
        ),
    ],
)
def test_a_bad_flag_is_refused_and_its_field_named(admission, extra_args, field):
    with pytest.raises(SpecError) as caught:
        admission.resolve(extra_args)
    assert caught.value.field == field


def test_more_combinations_than_rows_are_refused(tiny_world):
    catalog = store.load(tiny_world.catalog)
    admission = Admission(catalog, SteeringSettings(max_rows_per_request=2), dict)
    edits = ",".join(
        f'{{"feature":"direction_1","add":{i + 1},"span":[{i},{i + 1}]}}' for i in range(3)
    )
    asked = admission.resolve({"steering": f'{{"interventions":[{edits}]}}'})
    with pytest.raises(SpecError, match="3 different combinations"):
        admission.stamp("id", asked, 12)


def test_a_dose_over_the_cap_is_refused_and_the_cap_holds_for_who_names_none(tiny_world):
    catalog = store.load(tiny_world.catalog)
    admission = Admission(catalog, SteeringSettings(max_dose=0.5), dict)
    edit = '{"feature": "direction_1", "add": 1}'

    def stamped(more):
        asked = admission.resolve({"steering": f'{{"interventions": [{edit}]{more}}}'})
        return admission.stamp("id", asked, 5)

    with pytest.raises(SpecError) as caught:
        stamped(', "max_dose": 0.6')
    assert caught.value.field == "steering.max_dose"
    assert stamped("").max_dose == stamped("").segments[0].max_dose == 0.5
    assert stamped(', "max_dose": 0.25').max_dose == 0.25
    assert stamped("").digest != stamped(', "max_dose": 0.25').digest


@pytest.mark.parametrize("dose", ["0", "-1", "1e999", "NaN", '"1"'])
def test_a_dose_that_is_none_is_refused(admission, dose):
    spec = f'{{"interventions": [{{"feature": "direction_1", "add": 1}}], "max_dose": {dose}}}'
    with pytest.raises(SpecError):
        admission.resolve({"steering": spec})
