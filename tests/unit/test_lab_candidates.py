"""Candidates: planted features are found, and only what fit and dev say counts.

Shapes: N cases, D model width, K latents.
"""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the lab's extra is not installed")

import torch
from lab_world import KEY, WIDTH, feature, harvested, sides, steered, write
from safetensors.numpy import save_file
from sklearn.metrics import roc_auc_score
from steerscope.catalog.formats import Columns
from steerscope.catalog.model import Activation, FeatureKind, Fingerprint, Site
from steerscope.catalog.store import SiteKey
from steerscope.errors import LabError
from steerscope.lab import dictionaries, saes
from steerscope.lab.candidates import (
    REGULARISATION,
    Candidate,
    Dictionary,
    Sides,
    auroc,
    difference_of_means,
    directions,
    latents,
    logistic_probe,
)
from steerscope.lab.dictionaries import DictionarySettings
from steerscope.lab.harvest import Harvest, TokenChoice
from steerscope.steering.interventions import Intervention, SteeringSpec

RNG = np.random.default_rng
LAST = TokenChoice.LAST_ENTITY
MODEL = Fingerprint(
    architecture="LlamaForCausalLM", hidden_size=WIDTH, num_hidden_layers=4, vocab_size=16
)


def cloud(count, shift_D, seed, offset=0.0):
    """Streams [N, D] around a point."""
    x_ND = RNG(seed).standard_normal((count, WIDTH)) + offset + np.asarray(shift_D)
    return x_ND.astype(np.float32)


def unit(d, length=1.0):
    return length * np.eye(WIDTH, dtype=np.float32)[d]


@pytest.mark.parametrize("digits", [8, 1, 0])
def test_auroc_is_scikit_learns_ties_and_all(digits):
    pos_NK = RNG(0).normal(0.5, 1.0, (37, 5)).round(digits)
    neg_NK = RNG(1).normal(0.0, 1.0, (61, 5)).round(digits)
    labels = np.arange(98) < 37
    expected = [roc_auc_score(labels, np.r_[pos_NK[:, k], neg_NK[:, k]]) for k in range(5)]
    np.testing.assert_allclose(auroc(pos_NK, neg_NK), expected, atol=1e-12)


def test_auroc_of_equal_scores_is_a_half():
    np.testing.assert_array_equal(auroc(np.zeros((3, 2)), np.zeros((4, 2))), [0.5, 0.5])


def test_the_class_means_are_half_a_step_from_zero():
    pos_ND, neg_ND = cloud(50, unit(2, 3.0), 0, 40.0), cloud(80, unit(0, -1.0), 1, 40.0)
    found = difference_of_means(pos_ND, neg_ND)
    for x_ND, value in ((pos_ND, 0.5), (neg_ND, -0.5)):
        f_N = x_ND @ found.W_enc + np.float32(found.b_enc)
        assert f_N.mean() == pytest.approx(value, abs=1e-4)


def test_setting_a_difference_of_means_moves_the_stream_exactly_there(tmp_path):
    pos_ND, neg_ND = cloud(50, unit(2, 3.0), 0), cloud(80, unit(0, -1.0), 1)
    found = difference_of_means(pos_ND, neg_ND)
    catalog = write(tmp_path / "c", [feature("way", Activation.IDENTITY)], {"way": found})
    spec = SteeringSpec(interventions=(Intervention(feature="way", clamp=-0.5),))
    moved_ND = steered(catalog, spec, pos_ND)
    np.testing.assert_allclose(moved_ND @ found.W_enc + found.b_enc, -0.5, atol=1e-5)
    way_D = found.W_dec / np.linalg.norm(found.W_dec)
    across_ND = (moved_ND - pos_ND) - np.outer((moved_ND - pos_ND) @ way_D, way_D)
    np.testing.assert_allclose(across_ND, 0.0, atol=1e-5)
    mean_D = steered(catalog, spec, pos_ND.mean(0, keepdims=True))[0]
    np.testing.assert_allclose(mean_D, neg_ND.mean(0), atol=1e-5)


def test_classes_that_are_one_point_have_no_direction_and_no_nan():
    same_ND = np.ones((20, WIDTH), np.float32)
    found = difference_of_means(same_ND, same_ND)
    assert not found.W_enc.any()
    assert not found.W_dec.any()
    assert found.b_enc == 0.0
    both = sides(same_ND, same_ND)
    assert [c.dev_auroc for c in directions(both, both, KEY, LAST)] == [0.5, 0.5]


@pytest.mark.parametrize("counts", [(400, 400), (100, 1000)])
@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_a_probe_reads_a_planted_direction_whatever_its_scale_and_balance(counts, scale):
    way_D = RNG(5).standard_normal(WIDTH).astype(np.float32)
    way_D *= 4.0 / np.linalg.norm(way_D)
    made = [cloud(n, s * way_D / 2, 9 + n) for n, s in zip(counts, (1, -1), strict=True)]
    probe = logistic_probe(*(scale * x_ND + 7 for x_ND in made))
    assert probe.W_dec is None
    cosine = probe.W_enc @ way_D / np.linalg.norm(probe.W_enc) / 4.0
    assert cosine > 0.9
    fresh = [scale * cloud(500, s * way_D / 2, 77 + s) + 7 for s in (1, -1)]
    scores = [x_ND @ probe.W_enc + probe.b_enc for x_ND in fresh]
    assert auroc(scores[0][:, None], scores[1][:, None])[0] > 0.98
    assert (scores[0] > 0).mean() > 0.9, "log-odds: 0 lies between the classes"
    assert (scores[1] < 0).mean() > 0.9


def test_directions_are_fitted_on_fit_and_scored_on_dev():
    shift = unit(3, 4.0)
    fit = sides(cloud(60, shift, 0), cloud(60, 0.0, 1))
    dev = sides(cloud(40, 0.0, 2), cloud(40, shift, 3))
    direction, probe = directions(fit, dev, KEY, LAST)
    assert (direction.kind, probe.kind) == (FeatureKind.DIRECTION, FeatureKind.PROBE)
    assert direction.dev_auroc < 0.05, "dev is the other way round, and dev is what is scored"
    assert not direction.is_positive
    assert direction.strength == pytest.approx(1 - direction.dev_auroc)
    assert direction.vectors.W_enc @ shift > 0, "fit alone decides which way it points"


def test_dev_chooses_how_strongly_the_probe_is_regularised():
    chosen = set()
    for seed in range(0, 60, 4):
        fit = sides(cloud(12, unit(3, 1.5), seed), cloud(12, 0.0, seed + 1))
        dev = sides(cloud(60, unit(3, 1.5), seed + 2), cloud(60, 0.0, seed + 3))
        streams = fit.at(KEY, LAST)
        each = {}
        for C in REGULARISATION:
            probe = logistic_probe(*streams, C)
            scores = np.concatenate(dev.at(KEY, LAST)) @ probe.W_enc
            each[str(C)] = roc_auc_score(dev.labels, scores)
        probe = directions(fit, dev, KEY, LAST)[1]
        assert probe.dev_auroc == pytest.approx(max(each.values()))
        assert each[probe.source["C"]] == pytest.approx(max(each.values()))
        chosen.add(probe.source["C"])
    assert len(chosen) > 1, "a choice that is always the same proves nothing"


def dictionary(activation=Activation.RELU, threshold=None, num_noise=60, seed=3):
    """Latents: 0 fires on unit 2, 1 on unit 5, the others on random small directions."""
    W_enc = 0.1 * RNG(seed).standard_normal((2 + num_noise, WIDTH)).astype(np.float32)
    W_enc[0], W_enc[1] = unit(2), unit(5)
    b_enc = np.full(len(W_enc), -0.5, np.float32)
    thresholds = None if threshold is None else np.full(len(W_enc), threshold, np.float32)
    columns = Columns(W_enc, b_enc, thresholds, 2 * W_enc)
    return Dictionary(KEY, columns, activation, FeatureKind.SAE_LATENT, {"sae": "planted"})


@pytest.mark.parametrize("threshold", [None, 0.25])
def test_planted_latents_of_either_sign_are_found(threshold):
    dev = sides(cloud(60, unit(2, 4.0), 0), cloud(60, unit(5, 4.0), 1))
    kind = Activation.RELU if threshold is None else Activation.JUMPRELU
    whole = dictionary(kind, threshold)
    found = {c.source["latent"]: c for c in latents(whole, dev, LAST, 1)}
    assert set(found) == {"0", "1"}
    assert found["0"].is_positive
    assert not found["1"].is_positive
    assert min(c.strength for c in found.values()) > 0.95
    for latent, candidate in found.items():
        scores = candidate.scores(dev.all)
        assert roc_auc_score(dev.labels, scores) == pytest.approx(candidate.dev_auroc)
        x_nD = dev.positive[0].at(KEY, LAST)
        assert candidate.acts(x_nD)[0] == pytest.approx(whole.acts(x_nD)[0, int(latent)])
        np.testing.assert_array_equal(candidate.vectors.W_dec, 2 * candidate.vectors.W_enc)


def test_a_small_dictionary_gives_each_latent_once():
    dev = sides(cloud(30, unit(2, 4.0), 0), cloud(30, 0.0, 1))
    assert len(latents(dictionary(num_noise=1), dev, LAST, 2)) == 3


def test_the_highest_token_of_a_name_counts_where_it_is_asked_for():
    quiet, loud = unit(0), unit(2, 5.0)
    early = harvested(quiet, before=[loud])
    whole = dictionary()
    latent = Candidate(
        KEY, TokenChoice.MAX_SPAN, whole.kind, whole.activation, whole.vectors(0), {}
    )
    assert latent.score(early) == pytest.approx(4.5)
    assert replace(latent, choice=LAST).score(early) == 0.0
    assert replace(latent, choice=TokenChoice.LAST_PROMPT).score(early) == 0.0


def test_a_case_without_the_token_has_no_score():
    nameless = replace(harvested(unit(2)), span={KEY: np.zeros((0, WIDTH), np.float32)})
    whole = dictionary()
    latent = Candidate(KEY, LAST, whole.kind, whole.activation, whole.vectors(0), {})
    assert np.isnan(latent.score(nameless))


def test_identity_features_keep_their_sign_and_others_do_not():
    x_nD = np.stack([unit(2, -3.0), unit(2, 3.0)])
    whole = dictionary()
    latent = Candidate(KEY, LAST, whole.kind, Activation.RELU, whole.vectors(0), {})
    np.testing.assert_allclose(latent.acts(x_nD), [0.0, 2.5])
    plain = replace(latent, activation=Activation.IDENTITY)
    np.testing.assert_allclose(plain.acts(x_nD), [-3.5, 2.5])


def test_what_is_perfect_on_test_but_chance_on_dev_does_not_win():
    """Unit 2 tells fit and dev apart fairly; unit 5 tells test apart perfectly, and only test."""
    fair = unit(2, 1.5)
    fit = sides(cloud(80, fair, 0), cloud(80, 0.0, 1))
    dev = sides(cloud(80, fair, 2), cloud(80, 0.0, 3))
    test = sides(cloud(80, unit(5, 9.0), 4), cloud(80, 0.0, 5))
    found = [*directions(fit, dev, KEY, LAST), *latents(dictionary(), dev, LAST, 3)]
    won = max(found, key=lambda c: c.strength)
    trap = Candidate(
        KEY, LAST, FeatureKind.SAE_LATENT, Activation.RELU, dictionary().vectors(1), {}
    )
    assert roc_auc_score(test.labels, trap.scores(test.all)) > 0.99
    assert abs(won.vectors.W_enc @ unit(2)) > abs(won.vectors.W_enc @ unit(5))
    assert roc_auc_score(test.labels, won.scores(test.all)) < 0.8
    scored = {c.source.get("latent"): c.strength for c in found}
    assert won.strength > 0.75
    assert scored.get("1", 0.5) < 0.65


def test_sides_say_who_is_who():
    told = Sides([harvested(unit(0), "Ada")], [harvested(unit(1), "Bob"), harvested(unit(2))])
    assert told.labels.tolist() == [True, False, False]
    assert told.names == ["Ada", "Bob", "Ada Lovelace"]
    positive, negative = told.at(KEY, LAST)
    np.testing.assert_array_equal(positive, [unit(0)])
    np.testing.assert_array_equal(negative, [unit(1), unit(2)])


SETTINGS = DictionarySettings(d_sae=12, k=2, num_steps=30, batch_size=64, seed=5)


def test_a_dictionary_trained_here_reads_as_its_trainer_does(tmp_path):
    elsewhere = SiteKey(2, Site.RESID_POST)
    sample = {KEY: cloud(300, 0.0, 0), elsewhere: cloud(300, 0.0, 1)}
    both = sides(cloud(30, unit(1, 3.0), 2), cloud(30, 0.0, 3))
    found = directions(both, both, KEY, LAST)
    train = saes.trained([SETTINGS], 1, lambda what: None, tmp_path, "small")
    (made,) = train(Harvest((), {}, sample), found)
    assert made.key == KEY, "trained where directions read best"
    stored = dictionaries.load(tmp_path / "resid_post.1-12-seed5")
    acts_NK = stored.acts(torch.from_numpy(sample[KEY])).numpy()
    assert (acts_NK > 0).any()
    np.testing.assert_allclose(made.acts(sample[KEY]), acts_NK, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(made.vectors(3).W_dec, stored.W_dec_KD[3].numpy())
    opened = saes.open_dictionary(f"saelens:{tmp_path / 'resid_post.1-12-seed5'}", MODEL)
    np.testing.assert_allclose(opened.acts(sample[KEY]), acts_NK, rtol=1e-4, atol=1e-5)
    assert (opened.key, opened.kind, len(opened)) == (KEY, FeatureKind.SAE_LATENT, 12)


def test_what_cannot_be_searched_is_refused(tmp_path):
    with pytest.raises(LabError, match="write FORMAT:PATH"):
        saes.open_dictionary("saelens", MODEL)
    with pytest.raises(LabError, match="no format 'sae'"):
        saes.open_dictionary("sae:x", MODEL)
    with pytest.raises(LabError, match="no such file"):
        saes.open_dictionary(f"saelens:{tmp_path / 'nothing'}", MODEL)
    settings = DictionarySettings(d_sae=6, k=2, num_steps=2, batch_size=8)
    made = dictionaries.train(torch.randn(20, 6), settings)
    dictionaries.save_saelens(made, tmp_path / "narrow", Site.RESID_POST, 1, "small")
    with pytest.raises(LabError, match=f"reads width 6, not {WIDTH}"):
        saes.open_dictionary(f"saelens:{tmp_path / 'narrow'}", MODEL)


def test_plain_directions_are_no_dictionary(tmp_path):
    path = tmp_path / "ways.safetensors"
    save_file({"north": unit(0)}, path, metadata={"site": "resid_post", "layer": "1"})
    with pytest.raises(LabError, match="identity features are not searched"):
        saes.open_dictionary(f"directions:{path}", MODEL)
