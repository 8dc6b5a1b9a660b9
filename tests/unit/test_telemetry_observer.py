import math
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from steerscope import __version__
from steerscope.catalog import store
from steerscope.catalog.model import ModelMatch
from steerscope.export.instruments import INSTRUMENTS, Kind, bounds_for
from steerscope.export.prometheus import HubCollector
from steerscope.steering.interventions import Intervention, Phase
from steerscope.telemetry import frames
from steerscope.telemetry.histograms import HistogramArray
from steerscope.telemetry.observer import Observer
from steerscope.telemetry.requests import Limits
from steerscope.telemetry.totals import FrameLoss, HubTotals

sys.path.insert(0, str(Path(__file__).parents[1] / "hub"))

from hub_world import ENGINE, Metrics, frame, start, write_catalog

pytestmark = pytest.mark.timeout(30)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return store.load(write_catalog(tmp_path_factory.mktemp("observer") / "catalog"))


class World:
    """An observer and what a scrape of it says."""

    def __init__(self, catalog):
        self.catalog = catalog
        self.totals = HubTotals()
        self.events = []
        self.observer = Observer(
            catalog,
            Limits(100, 60.0, 4096),
            bounds_for(catalog),
            self.totals,
            self,
            lambda name: name if name == "force-known" else "unknown",
        )

    def started(self, track):
        self.events.append(("started", track.start.request_id))

    def finished(self, track):
        self.events.append(("finished", track.start.request_id))

    def take(self, made, now_ns=2_000_000_000):
        payload = made if isinstance(made, bytes) else frames.encode(made)
        self.observer.take(payload, now_ns)

    def scrape(self):
        registry = CollectorRegistry(auto_describe=False)
        registry.register(
            HubCollector(
                self.catalog,
                self.observer,
                self.totals,
                lambda: self.catalog.policies,
                ModelMatch.FINE_TUNE,
            )
        )
        return Metrics(generate_latest(registry).decode())

    def value(self, name, **labels):
        return self.scrape().value(name, **{**ENGINE, **labels})


@pytest.fixture
def world(catalog):
    return World(catalog)


def test_a_listener_hears_of_each_start_and_end_once(world, catalog):
    world.take(frame(catalog, ("a", 0, 1), started=(start("a", 1),)))
    world.take(frame(catalog, ("a", 1, 1), started=(start("a", 1),)))
    world.take(frame(catalog, finished=("a",)))
    assert world.events == [("started", "a"), ("finished", "a")]


def test_tokens_are_counted_by_phase(world, catalog):
    world.take(frame(catalog, ("a", 0, 5), started=(start("a", 3),)))
    assert world.value("steerscope_observed_tokens_total", phase="prompt") == 3
    assert world.value("steerscope_observed_tokens_total", phase="generation") == 2


def test_activations_fall_into_the_bucket_of_their_upper_bound(world, catalog):
    acts = [[0.0, 0, 0], [0.5, 0, 0], [0.51, 0, 0], [1000.0, 0, 0]]
    world.take(frame(catalog, ("a", 0, 4), acts=acts, started=(start("a", 4),)))
    series = {"feature": "known", "phase": "prompt"}
    name = "steerscope_feature_activation"
    for le, count in (("0.0", 1), ("0.5", 2), ("1.0", 3), ("64.0", 3), ("+Inf", 4)):
        assert world.value(f"{name}_bucket", le=le, **series) == count
    assert world.value(f"{name}_sum", **series) == pytest.approx(1001.01)
    assert world.value("steerscope_feature_active_tokens_total", **series) == 3


def test_everything_declared_is_there_at_zero_from_an_engines_first_frame(world, catalog):
    world.take(frame(catalog))
    metrics = world.scrape()
    for name, labels in (
        ("steerscope_signal_requests_total", {"signal": "in_answer", "label": "unobserved"}),
        ("steerscope_signal_requests_total", {"signal": "in_answer", "label": "not_applicable"}),
        ("steerscope_signal_score_ratio_count", {"signal": "at_question"}),
        ("steerscope_feature_activation_count", {"feature": "late", "phase": "generation"}),
        ("steerscope_feature_active_tokens_total", {"feature": "late", "phase": "prompt"}),
        ("steerscope_steered_tokens_total", {"feature": "known", "op": "clamp"}),
        ("steerscope_unobserved_tokens_total", {"reason": "prefix_cache"}),
        ("steerscope_frames_dropped_total", {"reason": "not_sent"}),
        ("steerscope_steering_requests_total", {"policy": "force-known", "outcome": "applied"}),
    ):
        assert metrics.value(name, **ENGINE, **labels) == 0, name


def test_a_sequence_without_the_entity_is_counted_as_not_applicable_and_has_no_score(
    world, catalog
):
    for name, there in (("with", 2.0), ("without", 1.0)):
        acts = [[3.0, there, 0.0]] * 4
        world.take(frame(catalog, (name, 0, 4), acts=acts, started=(start(name, 2),)))
        world.take(frame(catalog, finished=(name,)))
    count = "steerscope_signal_requests_total"
    assert world.value(count, signal="about_entity", label="not_applicable") == 1
    assert world.value(count, signal="about_entity", label="unobserved") == 0
    assert world.value(count, signal="about_entity", label="high") == 1
    assert world.value("steerscope_signal_score_ratio_count", signal="about_entity") == 1
    # z = 2 * 3 - 2 = 4, and Platt makes 0.5 * 4 + 0.25 of it
    score = 1 / (1 + np.exp(-2.25))
    assert world.value("steerscope_signal_score_ratio_sum", signal="about_entity") == (
        pytest.approx(score)
    )


def test_build_info_says_how_the_model_compares_with_the_catalogs(world, catalog):
    labels = {
        "version": __version__,
        "catalog": "small",
        "catalog_version": "1",
        "catalog_digest": catalog.digest,
        "model_match": "fine_tune",
    }
    assert world.scrape().value("steerscope_build_info", **labels) == 1


def test_bounds_of_labels_are_bounds_of_the_score(world, catalog):
    world.take(frame(catalog))
    bucket = "steerscope_signal_score_ratio_bucket"
    assert world.value(bucket, signal="in_answer", le="0.35") == 0


def test_only_steerable_features_have_steered_tokens(world, catalog):
    world.take(frame(catalog))
    assert world.value("steerscope_steered_tokens_total", feature="late", op="clamp") is None


def test_steered_tokens_are_counted_under_the_op_that_covered_them(world, catalog):
    edits = (
        Intervention(feature="known", clamp=6.0, phase=Phase.PROMPT),
        Intervention(feature="known", add=1.0, phase=Phase.GENERATION),
    )
    told = (start("a", 2, policy="force-known", interventions=edits),)
    edited = {0: 1.0, 1: 1.0, 2: 1.0}
    for _ in range(2):
        world.take(frame(catalog, ("a", 0, 4), started=told, edited=edited))
    count = "steerscope_steered_tokens_total"
    assert world.value(count, feature="known", op="clamp") == 2
    assert world.value(count, feature="known", op="add") == 1
    assert world.value("steerscope_steering_dose_ratio_count") == 3
    applied = {"policy": "force-known", "outcome": "applied"}
    assert world.value("steerscope_steering_requests_total", **applied) == 1


def test_a_policy_without_a_known_name_is_labelled_unknown(world, catalog):
    world.take(frame(catalog, ("a", 0, 1), started=(start("a", 1, policy="made-up"),)))
    labels = {"policy": "unknown", "outcome": "applied"}
    assert world.value("steerscope_steering_requests_total", **labels) == 1
    assert "made-up" not in world.scrape().text


def test_a_lost_token_is_counted_once_though_seen_missing_and_reported(world, catalog):
    world.take(frame(catalog, ("a", 0, 2), started=(start("a", 2),)))
    world.take(frame(catalog, ("a", 5, 1), dropped=1, dropped_tokens=4))
    lost = "steerscope_unobserved_tokens_total"
    assert world.value(lost, reason="dropped_frame") == 4
    assert world.value("steerscope_frames_dropped_total", reason="not_sent") == 1


def test_a_restarted_worker_counts_its_losses_from_zero(world, catalog):
    world.take(frame(catalog, dropped=5, dropped_tokens=50))
    world.take(frame(catalog, dropped=1, dropped_tokens=10))
    assert world.value("steerscope_frames_dropped_total", reason="not_sent") == 6
    assert world.value("steerscope_unobserved_tokens_total", reason="dropped_frame") == 60


def test_a_frame_for_another_catalog_is_refused_and_counted(world, catalog):
    foreign = frame(catalog, ("a", 0, 3), started=(start("a", 3),), catalog_digest="other")
    world.take(foreign)
    assert world.value("steerscope_frames_dropped_total", reason="catalog_mismatch") == 1
    assert world.value("steerscope_unobserved_tokens_total", reason="catalog_mismatch") == 3
    assert world.observer.ledger.report("a") == ()


def broken(catalog):
    good = frame(catalog, ("a", 0, 2), started=(start("a", 2),))
    site = good.sites[0]
    replace = msgspec.structs.replace

    def with_site(**fields):
        return replace(good, sites=(replace(site, **fields),))

    return {
        "not MessagePack": b"\xff\x00garbage",
        "empty": b"",
        "cut short": frames.encode(good)[:-5],
        "another version": replace(good, version=99),
        "offsets that fall": replace(good, query_start_loc=(0, -2)),
        "offsets not from zero": replace(good, query_start_loc=(1, 2)),
        "no offsets": replace(good, query_start_loc=()),
        "a negative position": replace(good, positions=(-1,)),
        "a position beyond reason": replace(good, positions=(1 << 40,)),
        "a start beyond reason": replace(good, started=(start("a", 2, first_position=-4),)),
        "an unknown site": with_site(site="resid_post.7"),
        "no features": with_site(num_features=0, acts=b""),
        "the wrong number of features": with_site(num_features=1, acts=site.acts[:8]),
        "acts of the wrong size": with_site(acts=site.acts[:-4]),
        "edits out of range": with_site(
            edit_tokens=np.array([9], np.int32).tobytes(),
            edit_deltas=bytes(8),
            edit_doses=bytes(4),
        ),
        "ragged edits": with_site(
            edit_tokens=b"\x00" * 5, edit_deltas=bytes(8), edit_doses=b"0000"
        ),
    }


def test_a_malformed_frame_is_counted_and_changes_nothing_else(world, catalog):
    for count, (what, payload) in enumerate(broken(catalog).items(), start=1):
        world.take(payload)
        assert world.totals.frames_lost[FrameLoss.MALFORMED] == count, what
    assert world.events == []
    world.take(frame(catalog, ("a", 0, 2), started=(start("a", 2),)))
    assert world.value("steerscope_observed_tokens_total", phase="prompt") == 2


def test_the_delay_of_a_frame_is_measured_from_its_readout(world, catalog):
    world.take(frame(catalog, monotonic_ns=1_000_000_000), now_ns=1_004_000_000)
    assert world.value("steerscope_readout_lag_seconds_bucket", le="0.0025") == 0
    assert world.value("steerscope_readout_lag_seconds_bucket", le="0.005") == 1


def test_a_request_that_fell_silent_counts_as_unobserved(world, catalog):
    world.take(frame(catalog, ("a", 0, 2), started=(start("a", 2),)), now_ns=0)
    world.observer.expire(61_000_000_000)
    labels = {"signal": "at_question", "label": "unobserved"}
    assert world.value("steerscope_signal_requests_total", **labels) == 1


def test_every_family_in_a_scrape_is_declared_and_every_declared_one_is_there(world, catalog):
    world.take(frame(catalog))
    lines = world.scrape().text.splitlines()
    kinds = {line.split()[2]: line.split()[3] for line in lines if line.startswith("# TYPE")}
    assert kinds == {i.name: i.kind.value for i in INSTRUMENTS}


def test_names_carry_their_units():
    plain = ("_ratio", "_activation", "_info", "_override", "_psi", "_ks")
    suffixes = {"s": "_seconds", "1": plain, "{token}": "_tokens"}
    for instrument in INSTRUMENTS:
        assert instrument.name.startswith("steerscope_")
        if instrument.kind is Kind.COUNTER:
            assert instrument.name.endswith("_total")
        else:
            assert instrument.name.endswith(suffixes[instrument.unit])


def test_columns_added_together_are_counted_as_one_by_one():
    values_nF = np.random.default_rng(1).normal(1.0, 2.0, (50, 3)).astype(np.float32)
    together, apart = (HistogramArray((0.0, 0.5, 2.0), 6) for _ in range(2))
    together.observe_columns(slice(1, 6, 2), values_nF)
    series_nF = np.broadcast_to([1, 3, 5], values_nF.shape)
    apart.observe(series_nF.ravel(), values_nF.ravel())
    assert together.counts.tolist() == apart.counts.tolist()
    assert together.sums.tolist() == pytest.approx(apart.sums.tolist())


def test_a_histograms_sum_never_falls():
    histogram = HistogramArray((0.0, 1.0), 2)
    histogram.observe(np.array([0, 0, 1]), np.array([-5.0, 2.0, 0.5], np.float32))
    assert histogram.counts.tolist() == [[1, 0, 1], [0, 1, 0]]
    assert histogram.sums.tolist() == [2.0, 0.5]


@pytest.fixture(scope="module")
def drifting(tmp_path_factory):
    """A catalog with a baseline of ``known``."""
    folder = write_catalog(tmp_path_factory.mktemp("drifting") / "catalog")
    path = folder / "catalog.yaml"
    tree = yaml.safe_load(path.read_text())
    shares = {"edges": [1.0], "shares": [0.5, 0.5], "num_tokens": 500}
    tree["baselines"] = [{"feature": "known", "phase": "prompt", **shares}]
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return World(store.load(folder))


def test_drift_leaves_out_what_was_steered_and_what_the_canary_asked(drifting):
    world, made = drifting, drifting.catalog
    world.observer._is_canary = lambda external_id: external_id == "canary"
    clamp = (Intervention(feature="known", clamp=6.0),)
    now = time.monotonic_ns()
    for asked in (
        start("a", 600),
        start("steered", 700, policy="force-known", interventions=clamp),
        start("canary", 800),
        start("b", 900),
    ):
        shares = (asked.request_id, 0, asked.num_prompt_tokens)
        world.take(frame(made, shares, acts=0.0, started=(asked,)), now)
    series = {"feature": "known", "phase": "prompt"}
    assert world.value("steerscope_feature_drift_tokens", **series) == 1500
    assert world.value("steerscope_feature_drift_ks", **series) == pytest.approx(0.5)
    psi = world.value("steerscope_feature_drift_psi", **series)
    assert psi == pytest.approx(0.5 * math.log(2) + (1e-4 - 0.5) * math.log(1e-4 / 0.5), rel=1e-3)


def test_what_the_canary_asked_is_in_no_number_of_features_and_signals(catalog):
    def asked_by(is_canary):
        world = World(catalog)
        world.observer._is_canary = lambda _: is_canary
        world.take(frame(catalog, ("a", 0, 5), started=(start("a", 3),), finished=("a",)))
        world.take(frame(catalog, finished=("a",)))
        return world

    canary, user = asked_by(True), asked_by(False)
    names = (
        ("steerscope_feature_activation_count", {"feature": "known", "phase": "prompt"}),
        ("steerscope_feature_active_tokens_total", {"feature": "known", "phase": "prompt"}),
        ("steerscope_signal_requests_total", {"signal": "at_question", "label": "low"}),
        ("steerscope_signal_score_ratio_count", {"signal": "at_question"}),
    )
    for name, labels in names:
        assert user.value(name, **labels) > 0
        assert canary.value(name, **labels) == 0
    for phase in ("prompt", "generation"):
        name = "steerscope_observed_tokens_total"
        assert canary.value(name, phase=phase) == user.value(name, phase=phase) > 0


SHED_ALL = 1 << 62
"""Every frame was read out before that."""


def lost_tokens(world):
    return world.value("steerscope_unobserved_tokens_total", reason="dropped_frame")


def test_of_a_shed_frame_requests_are_followed_and_tokens_counted_as_lost(world, catalog):
    shed = frame(catalog, ("a", 0, 5), started=(start("a", 3, policy="force-known"),))
    world.observer.take(frames.encode(shed), 2, SHED_ALL)
    world.take(frame(catalog, ("a", 5, 2)))
    end = msgspec.structs.replace(frame(catalog), finished=(frames.RequestEnd("a", 7),))
    world.observer.take(frames.encode(end), 2, SHED_ALL)
    assert world.events == [("started", "a"), ("finished", "a")]
    assert world.value("steerscope_frames_dropped_total", reason="shed") == 1
    assert lost_tokens(world) == 5
    assert world.value("steerscope_observed_tokens_total", phase="generation") == 2
    (track,) = world.observer.ledger.report("a")
    assert {reason.value: n for reason, n in track.unobserved().items()} == {"dropped_frame": 5}
    applied = {"policy": "force-known", "outcome": "applied"}
    assert world.value("steerscope_steering_requests_total", **applied) == 1


def test_a_shed_token_is_not_counted_again_where_it_was_seen_or_missed_before(world, catalog):
    world.take(frame(catalog, ("a", 0, 2), started=(start("a", 2),)))
    world.take(frame(catalog, ("a", 4, 1), dropped=1, dropped_tokens=2))
    again = frame(catalog, ("a", 0, 6), dropped=1, dropped_tokens=2)
    world.observer.take(frames.encode(again), 2, SHED_ALL)
    assert lost_tokens(world) == 2 + 1


def test_a_token_of_two_ranks_of_which_one_is_shed_is_lost_once(world, catalog):
    whole = frame(catalog, ("a", 0, 3), started=(start("a", 3),))
    parts = [
        msgspec.structs.replace(whole, sites=(site,), rank=rank)
        for rank, site in enumerate(whole.sites)
    ]
    world.take(parts[0])
    world.observer.take(frames.encode(parts[1]), 2, SHED_ALL)
    assert lost_tokens(world) == 3
    assert world.value("steerscope_observed_tokens_total", phase="prompt") == 0


def test_what_is_kept_of_the_prefix_cache_goes_with_a_shed_frame_and_is_counted(world, catalog):
    kept = frames.CachedActivations(bytes([1, 1, 1]), frame(catalog, ("x", 0, 3)).sites)
    told = msgspec.structs.replace(start("a", 4, first_position=3), cached=kept)
    shed = frame(catalog, ("a", 3, 2), started=(told,))
    world.observer.take(frames.encode(shed), 2, SHED_ALL)
    assert lost_tokens(world) == 2
    assert world.value("steerscope_unobserved_tokens_total", reason="prefix_cache") == 3
