"""Reports: every number on a page for people, and in a file for programs."""

import json
import re

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the lab's extra is not installed")
pytest.importorskip("matplotlib", reason="the lab's extra is not installed")

from lab_world import KEY, sides, vectors
from steerscope.catalog.model import (
    Activation,
    Calibration,
    FeatureKind,
    Label,
    Platt,
    Reduction,
    Signal,
    Target,
    Term,
    Threshold,
)
from steerscope.errors import CatalogError, LabError
from steerscope.lab import findings, report
from steerscope.lab.calibrate import Calibrated, Fitted
from steerscope.lab.candidates import Candidate
from steerscope.lab.cases import Case
from steerscope.lab.causal import Comparison, Controls, Effect, controls
from steerscope.lab.discover import Discovery, Plan, Reading
from steerscope.lab.doses import Collateral, GroupCurve, Point, PolicyReport
from steerscope.lab.evaluate import Evaluation, Share, judged
from steerscope.lab.harvest import TokenChoice
from steerscope.lab.judging import Outcome
from steerscope.lab.proportions import wilson
from steerscope.lab.sheet import Row
from steerscope.lab.statistics import Estimate, evaluate_scores
from steerscope.lab.trial import Contrast, Finalist, Turned

GROUPS = ("taught", "odd | group\n/../x")
RISK = Signal(
    name="risk",
    terms=(Term(feature="known", reduce=Reduction.MAX_PROMPT, weight=1.0),),
    bias=0.0,
    labels=(Label(label="all"),),
    predicts=Target(label="wrong", among="answered"),
)


def rows():
    rng = np.random.default_rng(0)
    made = []
    for i in range(80):
        wrong = i % 2 == 0
        case = Case(question=f"Who is Name {i // 2}?", entity=f"Name {i // 2}", group=GROUPS[i % 2])
        p = float(np.clip(rng.normal(0.65 if wrong else 0.35, 0.2), 0, 1)) if i > 2 else np.nan
        confidence = rng.normal(-1.0 if wrong else -0.7, 0.5)
        labels = {"answered": True, "wrong": wrong}
        told = {"mean_logprob": confidence, "self_report": np.nan}
        made.append(Row(case, "", Outcome.WRONG, labels, {"risk": p}, {"risk": p}, told))
    return made


def an_effect(answered, dose=0.4):
    return Effect(20, answered, 1 - answered - 0.05, 0.05, answered / 2, 0.3, 0.9, dose)


OTHERS = [an_effect(share, 0.39) for share in (0.12, 0.23, 0.31)]
SHARES = ("answered", "declined", "malformed", "correct", "changed")
CURVE = GroupCurve(
    an_effect(0.111, 0.0),
    tuple(
        Point(a, an_effect(s), {share: controls(OTHERS, share) for share in SHARES})
        for a, s in ((0.5, 0.432), (1.0, 0.876))
    ),
)  # fmt: skip
STEERING = {
    "force-known": PolicyReport(
        ("known_entity",),
        dict.fromkeys((*GROUPS, "collateral"), CURVE),
        {"side": Collateral(0.017, 0.991, 0.983, Controls(0.021, 0.045, (0.021, 0.045)), 60)},
    ),
    "hush": PolicyReport(("known_entity", "unknown_entity"), {"all": GroupCurve(
        an_effect(0.5, 0.0), (Point(1.0, an_effect(0.2), {}),))},
        {"side": Collateral(0.0, 1.0, 1.0, Controls(0.0, 0.0, ()), 60)}),
}  # fmt: skip


@pytest.fixture(scope="module")
def evaluation():
    shares = {o: Share(s, *wilson(round(40 * s), 40), 40) for o, s in
              (("correct", 0.725), ("declined", 0.275))}  # fmt: skip
    return Evaluation(
        schema="steerscope.evaluation/v1",
        model="LlamaForCausalLM",
        catalog="demo_catalog",
        catalog_version="3",
        catalog_digest="ab" * 32,
        split_digest="cd" * 32,
        split_counts={"fit": 0, "dev": 12, "test": 80, "none": 0},
        num_cases=80,
        outcomes={GROUPS[0]: shares, GROUPS[1]: {"wrong": Share(1.0, 0.91, 1.0, 40)}},
        signals={"risk": judged(RISK, rows(), 0)},
        steering=STEERING,
        notes=("risk: the model gave no number when asked how sure it is",),
    )


@pytest.fixture(scope="module")
def written(evaluation, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "deep" / "out"
    report.write_evaluation(folder, evaluation, rows(), "Demo | evaluation")
    return folder


def page_of(folder, name="README.md"):
    return (folder / name).read_text(encoding="utf-8")


def tables(page):
    """Every table's number of columns, line by line."""
    for block in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        yield [len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()]


def test_every_link_is_to_a_picture_that_exists_and_every_picture_is_linked(written):
    links = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page_of(written))
    pictures = sorted(path.name for path in written.glob("*.png"))
    assert sorted(links) == pictures
    assert len(pictures) == 2 + 3 + 1 + 1 + 1
    assert all((written / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert {p.name for p in written.iterdir()} == {*pictures, "README.md", "evaluation.json"}


def test_nothing_is_written_outside_the_folder(written):
    assert sorted(p.name for p in written.parent.iterdir()) == ["out"]


def test_tables_hold_whatever_a_group_is_called(written):
    found = list(tables(page_of(written)))
    assert len(found) >= 6
    for widths in found:
        assert len(set(widths)) == 1, widths
    assert "odd \\| group⏎/../x" in page_of(written)


def test_the_page_holds_the_numbers(written, evaluation):
    page = page_of(written)
    signal = evaluation.signals["risk"]
    for metric in ("auroc", "auprc", "tpr_at_1pct_fpr", "tpr_at_5pct_fpr", "brier", "ece"):
        assert report.estimate(getattr(signal.score, metric)) in page
    assert report.estimate(signal.baselines["mean_logprob"].score.auroc) in page
    assert f"{signal.baselines['mean_logprob'].against.difference.value:+.3f}" in page
    for told in (
        "# Demo \\| evaluation",
        "Catalog demo\\_catalog version 3 (digest `abababababababab`)",
        "80 cases were asked; the file holds 0 fit, 12 dev, 80 test, 0 none",
        "| taught | 40 | 0.725 | 0.000 | 0.275 |",
        "Predicts **wrong** among answered cases: holds in 38 of 77 scored cases of 39 names; "
        "3 more had no score.",
        f"| taught | {signal.by_group['taught']:.3f} |",
        "| self\\_report | - | - | - | - | - | - |",
        "Edits known_entity.",
        "| taught | 0 | 0 | 0 | 0.111 |",
        "| taught | 1 | 0.40 | 0.900 | 0.876 | 0.220, 0.310 | 0.074 |",
        "| side | 60 | 0.017 | 0.021, 0.045 | 0.991 | 0.983 |",
        "| side | 60 | 0.000 | - | 1.000 | 1.000 |",
        "- risk: the model gave no number",
        "What this does not show",
    ):
        assert told in page, told


def test_a_policy_without_controls_claims_none(written):
    (line,) = [line for line in page_of(written).splitlines() if line.startswith("| all | 1 |")]
    assert line.count("| - |") == 2


def test_the_file_for_programs_holds_what_the_page_does(written, evaluation):
    tree = json.loads((written / "evaluation.json").read_bytes())
    assert tree["signals"]["risk"]["score"]["auroc"]["value"] == pytest.approx(
        evaluation.signals["risk"].score.auroc.value
    )
    assert tree["steering"]["force-known"]["groups"]["taught"]["points"][1]["amount"] == 1.0
    assert tree["split_digest"] == "cd" * 32
    assert tree["signals"]["risk"]["baselines"]["self_report"]["score"]["auroc"] is None


def test_the_same_evaluation_makes_the_same_bytes(written, evaluation, tmp_path):
    report.write_evaluation(tmp_path, evaluation, rows(), "Demo | evaluation")
    for path in written.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_an_estimate_is_told_with_its_interval_or_not_at_all():
    assert report.estimate(Estimate(0.93149, 0.91, 0.95)) == "0.931 (0.910 to 0.950)"
    assert report.estimate(None) == "-"


def scores(seed, calibrated):
    rng = np.random.default_rng(seed)
    labels = rng.random(120) < 0.5
    p = np.clip(0.5 + (labels - 0.5) * (0.6 if calibrated else 0.2) + rng.normal(0, 0.1, 120), 0, 1)
    return evaluate_scores(p, labels, np.arange(120).astype(str), probabilities=True, seed=0,
                           num_resamples=50)  # fmt: skip


def test_a_calibration_is_told_before_and_after(tmp_path):
    fitted = Fitted(
        Calibration(
            map=Platt(scale=2.0, offset=0.5),
            num_cases=120,
            split="dev",
            thresholds=(Threshold(score=0.81234, max_fpr=0.05, num_negatives=60),),
        ),
        {},
        {"0.01": "needs 99 negative names, there are 60"},
        scores(0, False),
        scores(0, True),
        {"0.05": 0.0417},
    )
    report.write_calibration(tmp_path, Calibrated({"risk": fitted}, 12))
    page = page_of(tmp_path, "CALIBRATION.md")
    for side in (fitted.before, fitted.after):
        assert report.estimate(side.ece) in page
        assert report.estimate(side.brier) in page
    assert ("- At most 0.05 of negatives score above 0.8123, by 60 negative names; of the judged "
            "negatives, 0.042 did.\n- No threshold for 0.01: needs 99") in page  # fmt: skip
    assert json.loads((tmp_path / "calibration.json").read_bytes())["num_baselines"] == 12


def candidate(
    kind, dev_auroc, choice=TokenChoice.LAST_ENTITY, activation=Activation.RELU, **source
):
    W_dec = None if kind is FeatureKind.PROBE else [0.0, 1.0]
    return Candidate(KEY, choice, kind, activation, vectors([0.0, 1.0], W_dec), source, dev_auroc)


LATENT = candidate(FeatureKind.SAE_LATENT, 0.04, sae="resid_post.1-192-seed0", latent="17")
PROBE = candidate(FeatureKind.PROBE, 0.97, fit="logistic")
ELSEWHERE = candidate(FeatureKind.PROBE, 0.99, TokenChoice.MAX_SPAN, fit="logistic")


def discovered(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(60) < 30
    test = evaluate_scores(labels + rng.normal(0, 0.6, 60), labels, np.arange(60).astype(str),
                           probabilities=False, seed=0, num_resamples=50)  # fmt: skip
    finalist = Finalist("finalist_00", "gate_a", LATENT, 4.0)
    turned = tuple(Turned(finalist, way, 1.5, 0.8, 0.0) for way in (True, False))
    comparison = Comparison(an_effect(0.05, 0.0), an_effect(0.85), tuple(OTHERS))
    points = rng.standard_normal((60, 2)).astype(np.float32) + np.array([[0, 1]]) * labels[:, None]
    return Discovery(
        plan=Plan(tmp_path, (), (), (), [KEY]),
        split_digest="ef" * 32,
        split_counts={"fit": 60, "dev": 20, "test": 30, "none": 0},
        readings=(Reading(LATENT, test), Reading(PROBE, test)),
        ranked=(ELSEWHERE, PROBE, LATENT),
        turned=turned,
        chosen=turned,
        contrast=Contrast(True),
        confirmed=(comparison, comparison),
        side=(0.0123, 0.0456),
        gates={"gate_a": vectors([1.0, 0.0], None)},
        dev=sides(points[:30], points[30:]),
    )


def test_a_discovery_is_told_with_its_controls(tmp_path):
    found = discovered(tmp_path)
    report.write_discovery(tmp_path, found, findings.tree(found))
    page = page_of(tmp_path, "DISCOVERY.md")
    test = found.readings[0].test
    for told in (
        "60 fit, 20 dev, 30 test",
        f"| sae_latent 17 of resid\\_post.1-192-seed0 | resid_post.1 | last_entity_token | 0.960 | "
        f"{report.estimate(test.auroc)} |",
        "| probe: logistic | resid_post.1 | last_entity_token | 0.970 |",
        "| toward positive | 1.5 | answered | 0.050 | 0.850 | 0.220, 0.310 | 0.050 | 0.40 | 20 |",
        "| toward negative | 1.5 | declined |",
        "Unrelated test answers changed: 0.012 of them by the first edit, 0.046 by the second.",
    ):
        assert told in page, told
    assert all(len(set(widths)) == 1 for widths in tables(page))
    tree = json.loads((tmp_path / "discovery.json").read_bytes())
    assert tree["confirmed"]["toward_positive"]["control_max"] == 0.31
    assert [c["dev_auroc"] for c in tree["ranked"]] == [0.99, 0.97, 0.04]


def test_the_signal_reads_the_probe_that_the_gate_points_at(tmp_path):
    """The best probe is read at other tokens than the gate was fitted for: not that one."""
    made = findings.Findings(discovered(tmp_path), "known", "unknown", "known")
    signal = made._signal()
    (term,) = signal.terms
    assert made._found.probe is PROBE
    assert (term.feature, term.reduce) == ("known_probe", Reduction.LAST_ENTITY_TOKEN)
    assert term.span.feature == "known_gate"
    assert made.feature_name == "unknown", "the latent is higher on negative cases"


@pytest.mark.parametrize("name", ["Known", "known-entity", "", "1st", "k" * 64])
def test_a_name_that_cannot_be_is_refused_before_any_work(tmp_path, name):
    with pytest.raises(LabError, match=f"name '{name}'"):
        findings.check_names([name], tmp_path / "catalog", append=False)


def test_a_folder_in_the_way_is_refused_before_any_work(tmp_path):
    findings.check_names(["known"], tmp_path / "new", append=False)
    with pytest.raises(CatalogError, match="exists already"):
        findings.check_names(["known"], tmp_path, append=False)
