"""Controls: the same edit of the same tokens by the same amount, another way.

Shapes: T tokens, D model width, K latents of a dictionary.
"""

import dataclasses

import msgspec
import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the lab's extra is not installed")

from lab_world import KEY, WIDTH, document, feature, steered, vectors, write
from steerscope.catalog import authoring
from steerscope.catalog.model import (
    Activation,
    CatalogPolicy,
    Dictionary,
    FeatureKind,
    Site,
)
from steerscope.catalog.store import DictionaryVectors, FeatureVectors
from steerscope.errors import CatalogError, LabError, SpecError
from steerscope.lab import doses
from steerscope.lab.cases import Case
from steerscope.lab.causal import OWN_COSINE, Comparison, Said, controls, effect, variants
from steerscope.lab.evaluate import Plan
from steerscope.lab.judging import Outcome
from steerscope.steering.interventions import Intervention, Phase, SteeringSpec, When

RNG = np.random.default_rng(0)
ROWS_KD = RNG.standard_normal((40, WIDTH)).astype(np.float32)
COSINES_K = ROWS_KD @ ROWS_KD[7] / np.linalg.norm(ROWS_KD, axis=1) / np.linalg.norm(ROWS_KD[7])
OTHERS_KD = ROWS_KD[np.abs(COSINES_K) < OWN_COSINE]
W_ENC = RNG.standard_normal((4, WIDTH)).astype(np.float32)

FEATURES = (
    feature("latent", Activation.JUMPRELU, label="Known", evidence={"auroc": 0.9}),
    feature("way", Activation.IDENTITY, kind=FeatureKind.DIRECTION),
    feature("gate", Activation.IDENTITY, kind=FeatureKind.PROBE),
)
VECTORS = {
    "latent": vectors(W_ENC[0], 3 * ROWS_KD[7], b_enc=0.25, threshold=0.5),
    "way": vectors(W_ENC[1], 0.1 * ROWS_KD[8], b_enc=-0.5),
    "gate": vectors(W_ENC[2], None),
}
EDITED = FEATURES[:2]
SPEC = SteeringSpec(
    interventions=(
        Intervention(feature="way", add=2.0, when=When(feature="gate", above=0.1)),
        Intervention(feature="latent", clamp=6.0, phase=Phase.PROMPT, span=(0, 4)),
    ),
    max_dose=0.7,
)
AMOUNTS = (0.5, 1.0, 2.0)


def made(**more):
    told = {"seed": 3, "num_controls": 5, "amounts": AMOUNTS} | more
    return variants(EDITED, VECTORS, told.pop("decoders", {}), **told)


def variant(made_, name, direction, amount):
    """The variant's vectors, by way of a spec: there is no other way to name it."""
    spec = made_.spec(SteeringSpec(interventions=(Intervention(feature=name, add=1.0),)),
                      direction, amount)  # fmt: skip
    return made_.vectors[spec.interventions[0].feature]


def test_every_feature_in_every_direction_at_every_amount():
    found = made()
    assert len(found.features) == len(found.vectors) == 2 * 6 * 3
    assert [f.name for f in found.features] == list(found.vectors)


@pytest.mark.parametrize("name", ["latent", "way"])
def test_direction_0_at_amount_1_is_the_feature_itself(name):
    own, itself = VECTORS[name], variant(made(), name, 0, 1)
    np.testing.assert_array_equal(itself.W_dec, own.W_dec)
    np.testing.assert_array_equal(itself.W_enc, own.W_enc)
    assert (itself.b_enc, itself.threshold) == (own.b_enc, own.threshold)


@pytest.mark.parametrize("name", ["latent", "way"])
@pytest.mark.parametrize("decoders", [{}, {"latent": ROWS_KD, "way": ROWS_KD}])
def test_a_control_reads_alike_and_writes_as_much_another_way(name, decoders):
    own, found = VECTORS[name], made(decoders=decoders)
    norm = np.linalg.norm(own.W_dec)
    for direction in range(1, 6):
        control = variant(found, name, direction, 1)
        np.testing.assert_array_equal(control.W_enc, own.W_enc)
        assert (control.b_enc, control.threshold) == (own.b_enc, own.threshold)
        assert np.linalg.norm(control.W_dec) == pytest.approx(norm, rel=1e-5)
        assert abs(control.W_dec @ own.W_dec) / norm**2 < 0.99


def test_an_amount_scales_what_is_written_exactly():
    found = made()
    for direction in range(6):
        whole = variant(found, "latent", direction, 1).W_dec
        np.testing.assert_array_equal(variant(found, "latent", direction, 0).W_dec, whole / 2)
        np.testing.assert_array_equal(variant(found, "latent", direction, 2).W_dec, whole * 2)


def test_controls_of_a_dictionary_are_its_rows_and_never_the_feature_itself():
    own, version = ROWS_KD[[7]], ROWS_KD[[7]] + 0.1 * ROWS_KD[[8]]
    rows_KD = np.concatenate([OTHERS_KD[:3], own, -own, version, np.zeros((1, WIDTH))])
    found = made(decoders={"latent": rows_KD.astype(np.float32)}, num_controls=30)
    units_KD = OTHERS_KD[:3] / np.linalg.norm(OTHERS_KD[:3], axis=1, keepdims=True)
    drawn = set()
    for direction in range(1, 31):
        W_dec = variant(found, "latent", direction, 1).W_dec
        cosines = units_KD @ W_dec / np.linalg.norm(W_dec)
        assert cosines.max() == pytest.approx(1.0, abs=1e-5)
        drawn.add(int(cosines.argmax()))
    assert drawn == {0, 1, 2}


def test_controls_of_a_large_dictionary_are_all_different():
    count = len(OTHERS_KD)
    assert count > 20
    found = made(decoders={"latent": ROWS_KD}, num_controls=count)
    told = {variant(found, "latent", d, 1).W_dec.tobytes() for d in range(1 + count)}
    assert len(told) == 1 + count


def test_a_dictionary_of_nothing_else_has_no_controls():
    with pytest.raises(LabError, match="no other latent"):
        made(decoders={"latent": ROWS_KD[[7]]})


def test_controls_are_drawn_by_seed():
    same, other = (made(seed=seed).vectors for seed in (3, 4))
    for name, own in made().vectors.items():
        np.testing.assert_array_equal(same[name].W_dec, own.W_dec)
    assert any((other[name].W_dec != own.W_dec).any() for name, own in same.items())


def test_a_spec_keeps_gates_values_spans_and_the_dose_cap():
    spec = made().spec(SPEC, 2, 1)
    named = {i.feature for i in spec.interventions}
    assert len(named) == 2
    assert named <= set(made().vectors)
    back = [
        msgspec.structs.replace(i, feature=before.feature)
        for i, before in zip(spec.interventions, SPEC.interventions, strict=True)
    ]
    assert tuple(back) == SPEC.interventions
    assert spec.max_dose == SPEC.max_dose
    assert spec.interventions[0].when.feature == "gate"


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    found = made()
    return write(
        tmp_path_factory.mktemp("causal") / "catalog",
        [*FEATURES, *found.features],
        VECTORS | dict(found.vectors),
    )


def test_two_edited_features_at_once_change_the_stream_as_the_policy_does(catalog):
    x_TD = 3 * RNG.standard_normal((20, WIDTH)).astype(np.float32)
    spec = SteeringSpec(interventions=SPEC.interventions)
    plain = steered(catalog, spec, x_TD)
    itself = steered(catalog, made().spec(spec, 0, 1), x_TD)
    np.testing.assert_array_equal(itself, plain)
    half = steered(catalog, made().spec(spec, 0, 0), x_TD)
    np.testing.assert_allclose(half - x_TD, (plain - x_TD) / 2, atol=1e-4)


@pytest.mark.parametrize("direction", range(1, 6))
def test_a_control_changes_the_same_tokens_by_as_much(catalog, direction):
    x_TD = 3 * RNG.standard_normal((40, WIDTH)).astype(np.float32)
    gated = Intervention(feature="latent", clamp=6.0, when=When(feature="gate", above=0.1))
    for edit in (gated, Intervention(feature="latent", clamp=0.0, only_if_active=True)):
        spec = SteeringSpec(interventions=(edit,))
        own_T = np.linalg.norm(steered(catalog, spec, x_TD) - x_TD, axis=1)
        control = steered(catalog, made().spec(spec, direction, 1), x_TD) - x_TD
        np.testing.assert_allclose(np.linalg.norm(control, axis=1), own_T, rtol=1e-3, atol=1e-4)
        assert 0 < (own_T > 0).sum() < 40, "a gate that never or always holds proves nothing"


def test_variants_say_what_they_are():
    control = made().features[4]
    assert control.kind is FeatureKind.DIRECTION, "nobody may take a control for a latent"
    assert control.label == "latent: direction 1, 1 times"
    assert control.source == {"encoder": "latent"}
    assert control.evidence == {}
    assert (control.site, control.layer, control.activation) == (
        KEY.site, KEY.layer, Activation.JUMPRELU,
    )  # fmt: skip


def test_a_read_only_feature_has_no_variants():
    with pytest.raises(LabError, match="'gate' is read-only"):
        variants([FEATURES[2]], VECTORS, {}, seed=0)


TOPK = feature("wide", Activation.TOPK, dictionary="whole", latent=4)
TRANSCODER = feature(
    "mlp", Activation.RELU, site=Site.MLP_IN, kind=FeatureKind.TRANSCODER_LATENT
)  # fmt: skip
WHOLE = DictionaryVectors(ROWS_KD, np.zeros(40, np.float32))
DICTIONARY = Dictionary(name="whole", site=KEY.site, layer=KEY.layer, d_sae=40, k=8)


def test_variants_of_topk_and_transcoder_features_stay_what_they_compute(tmp_path):
    own = {
        "wide": FeatureVectors(ROWS_KD[4], 0.0, 0.0, ROWS_KD[5]),
        "mlp": vectors(W_ENC[3], ROWS_KD[6]),
    }
    found = variants([TOPK, TRANSCODER], own, {}, seed=0, num_controls=2)
    told = document([TOPK, TRANSCODER, *found.features], dictionaries=(DICTIONARY,))
    catalog = authoring.write_catalog(
        tmp_path / "c", told, own | dict(found.vectors), {"whole": [WHOLE]}
    )
    for member in found.features[:3]:
        loaded = catalog.feature(member.name)
        assert (loaded.dictionary, loaded.latent) == ("whole", 4)
        np.testing.assert_array_equal(catalog.vectors[member.name].W_enc, ROWS_KD[4])
    for member in found.features[3:]:
        assert catalog.feature(member.name).writes is Site.MLP_OUT
    spec = SteeringSpec(interventions=(Intervention(feature="wide", clamp=2.0),))
    x_TD = RNG.standard_normal((30, WIDTH)).astype(np.float32)
    np.testing.assert_array_equal(
        steered(catalog, found.spec(spec, 0), x_TD), steered(catalog, spec, x_TD)
    )
    moved = [np.linalg.norm(steered(catalog, found.spec(spec, d), x_TD) - x_TD, axis=1)
             for d in range(3)]  # fmt: skip
    np.testing.assert_allclose(moved[1], moved[0], rtol=1e-4)


def plan(catalog, **more):
    told = {"model": catalog.folder, "catalog": catalog.folder, "cases": (), "all_cases": ()}
    return Plan(**told, doses=(0.5, 2.0), num_controls=3, **more)


POLICIES = (
    CatalogPolicy(name="force", interventions=SPEC.interventions, max_dose=0.7),
    CatalogPolicy(name="hush", interventions=(Intervention(feature="latent", ablate=True),)),
)


@pytest.fixture(scope="module")
def with_policies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doses") / "catalog"
    more = (TOPK,)
    made_ = VECTORS | {"wide": FeatureVectors(ROWS_KD[4], 0.0, 0.0, ROWS_KD[5])}
    told = document([*FEATURES, *more], policies=POLICIES, dictionaries=(DICTIONARY,))
    return authoring.write_catalog(folder, told, made_, {"whole": [WHOLE]})


def test_the_derived_catalog_holds_the_original_and_every_variant(with_policies, tmp_path):
    asked = plan(with_policies, policies=("force", "hush"), decoders={KEY: ROWS_KD})
    found = doses.write_derived_catalog(tmp_path / "derived", with_policies, asked)
    derived = authoring.store.load(tmp_path / "derived")
    own = with_policies.document
    assert derived.document.features[: len(own.features)] == own.features
    assert derived.document.signals == own.signals
    assert derived.policies == with_policies.policies
    assert found["force"].edited == ("way", "latent")
    assert len(derived.document.features) == 4 + (2 + 1) * 4 * 3
    for name in ("force", "hush"):
        policy = doses.policy_of(with_policies, name)
        for direction in range(4):
            for amount in range(3):
                derived.check(found[name].spec(policy.spec, direction, amount))
    whole = found["force"].spec(doses.policy_of(with_policies, "force").spec, 0, 1)
    first = derived.vectors[whole.interventions[0].feature]
    np.testing.assert_array_equal(first.W_dec, VECTORS["way"].W_dec)


def test_an_unknown_policy_is_refused_by_name(with_policies, tmp_path):
    asked = plan(with_policies, policies=("froce",))
    with pytest.raises(LabError, match=r"no policy 'froce' in the catalog \(it has: force, hush"):
        doses.write_derived_catalog(tmp_path / "derived", with_policies, asked)
    assert not (tmp_path / "derived").exists()


@pytest.mark.parametrize("dose", [float("nan"), float("inf")])
def test_a_dose_that_is_no_number_is_refused(with_policies, tmp_path, dose):
    asked = dataclasses.replace(plan(with_policies, policies=("hush",)), doses=(dose,))
    with np.errstate(invalid="ignore"), pytest.raises(CatalogError, match="NaN or infinity"):
        doses.write_derived_catalog(tmp_path / "derived", with_policies, asked)
    assert not (tmp_path / "derived").exists()


def said(*told):
    return [Said(text, outcome, dose) for text, outcome, dose in told]


UNSTEERED = said(
    ("golf", Outcome.CORRECT, 0.0),
    ("judo", Outcome.WRONG, 0.0),
    ("not sure", Outcome.DECLINED, 0.0),
    ("chess", Outcome.ANSWERED, 0.0),
)


def test_an_effect_is_shares_of_all_cases():
    found = effect(
        said(
            ("golf", Outcome.CORRECT, 0.0),
            ("not sure", Outcome.DECLINED, 0.2),
            ("golf golf", Outcome.MALFORMED, 0.6),
            ("chess", Outcome.ANSWERED, 0.1),
        ),
        UNSTEERED,
    )
    assert found.num_cases == 4
    assert (found.answered, found.declined, found.malformed, found.correct) == (
        0.5, 0.25, 0.25, 0.25,
    )  # fmt: skip
    assert found.changed == 0.5
    assert found.edited == 0.75
    assert found.dose == pytest.approx(0.3)


def test_no_edit_changes_nothing():
    found = effect(UNSTEERED, UNSTEERED)
    assert (found.changed, found.edited, found.dose) == (0.0, 0.0, 0.0)
    assert (found.answered, found.declined) == (0.75, 0.25)


def test_effects_of_other_cases_cannot_be_compared():
    with pytest.raises(ValueError, match="shorter"):
        effect(UNSTEERED, UNSTEERED[:3])


def test_controls_are_told_by_mean_and_by_the_largest():
    base = effect(UNSTEERED, UNSTEERED)
    others = tuple(dataclasses.replace(base, changed=share) for share in (0.0, 0.1, 0.5))
    found = Comparison(base, base, others).control("changed")
    assert found.mean == pytest.approx(0.2)
    assert (found.max, found.each) == (0.5, (0.0, 0.1, 0.5))
    assert controls((), "changed").each == ()


def test_populations_are_drawn_by_seed_and_keep_all_where_there_are_few(with_policies):
    cases = [Case(question=f"q{i}", group="many") for i in range(50)]
    cases += [Case(question=f"r{i}") for i in range(3)]
    asked = dataclasses.replace(plan(with_policies), cases=cases, max_cases_per_group=10)
    found = doses._populations(asked)
    assert {group: len(drawn) for group, drawn in found.items()} == {"all": 3, "many": 10}
    assert len({case.text for case in found["many"]}) == 10
    assert found == doses._populations(asked)
    assert found != doses._populations(dataclasses.replace(asked, seed=1))


def test_a_spec_of_a_feature_that_has_no_variants_is_no_accident(catalog):
    spec = SteeringSpec(interventions=(Intervention(feature="gate", add=1.0),))
    with pytest.raises(ValueError, match="not in tuple"):
        made().spec(spec, 0)
    with pytest.raises(SpecError, match="read-only"):
        catalog.check(spec)
