import gc
import sys
import weakref
from pathlib import Path

import msgspec
import numpy as np
import pytest
from steerscope.catalog import store
from steerscope.telemetry import requests, signals
from steerscope.telemetry.columns import Columns
from steerscope.telemetry.frames import CachedActivations
from steerscope.telemetry.requests import Limits, RequestLedger
from steerscope.telemetry.tracks import Unobserved

sys.path.insert(0, str(Path(__file__).parents[1] / "hub"))

from hub_world import frame, start, write_catalog
from watch_world import Script

pytestmark = pytest.mark.timeout(30)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return store.load(write_catalog(tmp_path_factory.mktemp("ledger") / "catalog"))


@pytest.fixture
def make_ledger(catalog):
    def make(max_tracks=100, ttl_seconds=60.0, max_tokens=4096, max_bytes=1 << 30):
        return RequestLedger(
            Columns(catalog),
            Limits(max_tracks, ttl_seconds, max_tokens, max_bytes),
            lambda track: tuple(signals.evaluate(s, track) for s in catalog.signals),
        )

    return make


@pytest.fixture
def ledger(make_ledger):
    return make_ledger()


def ramp(first, count):
    """Distinct values by position for each of the three features."""
    return np.arange(first, first + count, dtype=np.float32)[:, None] + [[0.0, 100.0, 200.0]]


def scores(track):
    return {score.signal: score for score in track.scores}


def test_a_request_seen_whole_is_complete_and_keeps_every_value(ledger, catalog):
    prompt = frame(catalog, ("a", 0, 3), acts=ramp(0, 3), started=(start("a", 3),))
    ledger.feed(prompt, 1.0)
    ledger.feed(frame(catalog, ("a", 3, 1), acts=ramp(3, 1)), 1.0)
    step = ledger.feed(frame(catalog, finished=("a",)), 1.0)
    (track,) = ledger.report("a")
    assert step.finished == [track]
    assert track.finished
    assert track.is_complete
    assert track.num_observed == 4
    ((first, acts, deltas),) = track.runs("unknown")
    assert (first, acts.tolist(), deltas) == (0, [100.0, 101.0, 102.0, 103.0], None)


def test_tokens_of_neighbours_in_a_batch_are_not_mixed_up(ledger, catalog):
    acts = np.vstack([ramp(0, 2), ramp(50, 3)])
    ledger.feed(
        frame(catalog, ("a", 0, 2), ("b", 0, 3), acts=acts, started=(start("a", 2), start("b", 3))),
        1.0,
    )
    assert ledger.report("a")[0].runs("known")[0][1].tolist() == [0.0, 1.0]
    assert ledger.report("b")[0].runs("known")[0][1].tolist() == [50.0, 51.0, 52.0]


def test_a_prompt_in_chunks_is_one_run(ledger, catalog):
    ledger.feed(frame(catalog, ("a", 0, 2), acts=ramp(0, 2), started=(start("a", 5),)), 1.0)
    ledger.feed(frame(catalog, ("a", 2, 3), acts=ramp(2, 3)), 1.0)
    assert [first for first, _, _ in ledger.report("a")[0].runs("known")] == [0]


def test_tokens_from_the_prefix_cache_are_counted_unobserved_by_name(ledger, catalog):
    started = (start("a", 5, first_position=4),)
    step = ledger.feed(frame(catalog, ("a", 4, 1), started=started), 1.0)
    (track,) = ledger.report("a")
    assert step.unobserved[Unobserved.PREFIX_CACHE] == 4
    assert track.unobserved() == {Unobserved.PREFIX_CACHE: 4}
    assert not track.is_complete


def test_a_jump_of_position_is_a_dropped_frame(ledger, catalog):
    ledger.feed(frame(catalog, ("a", 0, 2), started=(start("a", 2),)), 1.0)
    step = ledger.feed(frame(catalog, ("a", 5, 1), acts=7.0), 1.0)
    (track,) = ledger.report("a")
    assert step.unobserved[Unobserved.DROPPED_FRAME] == 3
    assert track.unobserved() == {Unobserved.DROPPED_FRAME: 3}
    assert [first for first, _, _ in track.runs("known")] == [0, 5]


def test_a_recomputed_token_is_not_counted_again_and_keeps_its_newest_value(ledger, catalog):
    ledger.feed(frame(catalog, ("a", 0, 4), acts=1.0, started=(start("a", 3),)), 1.0)
    step = ledger.feed(frame(catalog, ("a", 0, 5), acts=2.0), 1.0)
    (track,) = ledger.report("a")
    assert [news.fresh_T.tolist() for news in step.blocks] == [[False] * 4 + [True]]
    assert track.num_observed == 5
    assert track.runs("known")[0][1].tolist() == [2.0] * 5
    assert track.is_complete


def test_a_gap_filled_by_recomputation_is_no_gap_any_more(ledger, catalog):
    ledger.feed(frame(catalog, ("a", 0, 2), started=(start("a", 6),)), 1.0)
    ledger.feed(frame(catalog, ("a", 4, 2)), 1.0)
    ledger.feed(frame(catalog, ("a", 0, 6)), 1.0)
    assert ledger.report("a")[0].is_complete


def test_a_request_whose_start_was_lost_counts_as_unknown(ledger, catalog):
    step = ledger.feed(frame(catalog, ("ghost", 7, 3)), 1.0)
    assert step.unobserved[Unobserved.UNKNOWN_REQUEST] == 3
    assert not step.blocks[0].fresh_T.any()
    assert ledger.report("ghost") == ()


def test_the_children_of_one_request_are_reported_together(ledger, catalog):
    started = (start("0_x", 1, external_id="x"), start("1_x", 1, external_id="x"))
    acts = [[1.0, 0, 0], [2.0, 0, 0]]
    ledger.feed(frame(catalog, ("0_x", 0, 1), ("1_x", 0, 1), acts=acts, started=started), 1.0)
    ledger.feed(frame(catalog, finished=("0_x",)), 1.0)
    tracks = ledger.report("x")
    assert [track.start.request_id for track in tracks] == ["0_x", "1_x"]
    assert [track.finished for track in tracks] == [True, False]


def test_values_beyond_the_limit_are_counted_but_not_kept(make_ledger, catalog):
    ledger = make_ledger(max_tokens=4)
    ledger.feed(frame(catalog, ("a", 0, 6), acts=ramp(0, 6), started=(start("a", 2),)), 1.0)
    (track,) = ledger.report("a")
    assert track.num_observed == 6
    assert track.unobserved() == {Unobserved.OVER_LIMIT: 2}
    assert track.runs("known")[0][1].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_token_that_is_not_finite_is_unobserved_until_it_is_seen_well(ledger, catalog):
    acts = np.ones((3, 3), np.float32)
    acts[1, 0] = np.nan
    step = ledger.feed(frame(catalog, ("a", 0, 3), acts=acts, started=(start("a", 3),)), 1.0)
    (track,) = ledger.report("a")
    assert step.unobserved[Unobserved.NOT_FINITE] == 1
    assert track.unobserved() == {Unobserved.NOT_FINITE: 1}
    ledger.feed(frame(catalog, ("a", 0, 3)), 1.0)
    assert track.is_complete


def test_sites_that_come_from_two_ranks_make_a_token_observed_together(ledger, catalog):
    whole = frame(catalog, ("a", 0, 2), started=(start("a", 2),))
    first = ledger.feed(_at(whole, 0, 0), 1.0)
    assert ledger.report("a")[0].num_observed == 0
    second = ledger.feed(_at(whole, 1, 1), 1.0)
    assert not first.blocks[0].completed_T.any()
    assert second.blocks[0].completed_T.all()
    assert ledger.report("a")[0].is_complete


def _at(whole, site, rank):
    return msgspec.structs.replace(whole, sites=(whole.sites[site],), rank=rank)


def test_a_request_finishes_when_every_rank_has_said_so(ledger, catalog):
    whole = frame(catalog, ("a", 0, 2), started=(start("a", 2),))
    for rank in (0, 1):
        ledger.feed(_at(whole, rank, rank), 1.0)
    ledger.feed(frame(catalog, finished=("a",), rank=0), 1.0)
    assert not ledger.report("a")[0].finished
    ledger.feed(frame(catalog, finished=("a",), rank=1), 1.0)
    assert ledger.report("a")[0].finished


def test_frames_lost_after_the_last_token_seen_leave_the_end_in_doubt(ledger, catalog):
    ledger.feed(frame(catalog, ("a", 0, 3), acts=5.0, started=(start("a", 2),)), 1.0)
    ledger.feed(frame(catalog, finished=("a",), dropped=1, dropped_tokens=1), 1.0)
    (track,) = ledger.report("a")
    assert not track.is_complete
    assert scores(track)["in_answer"].score is None
    assert scores(track)["at_question"].score is not None


def test_the_oldest_finished_report_makes_room_first(make_ledger, catalog):
    ledger = make_ledger(max_tracks=2)
    for name in ("running", "done", "new"):
        finished = ("done",) if name == "done" else ()
        ledger.feed(frame(catalog, (name, 0, 1), started=(start(name, 1),), finished=finished), 1.0)
    assert ledger.report("done") == ()
    assert ledger.report("running")
    assert ledger.report("new")


def test_finished_reports_take_so_many_bytes_and_the_newest_stays(make_ledger, catalog):
    one = make_ledger()
    one.feed(frame(catalog, ("a", 0, 9), acts=ramp(0, 9), started=(start("a", 9),)), 1.0)
    one.feed(frame(catalog, finished=("a",)), 1.0)
    (track,) = one.report("a")
    for max_bytes, kept in ((2.5 * track.num_bytes, "de"), (1, "e")):
        ledger = make_ledger(max_bytes=int(max_bytes))
        for name in "abcde":
            told = frame(catalog, (name, 0, 9), acts=ramp(0, 9), started=(start(name, 9),))
            ledger.feed(told, 1.0)
            ledger.feed(frame(catalog, finished=(name,)), 1.0)
        assert "".join(name for name in "abcde" if ledger.report(name)) == kept
    ledger.expire(1e6)
    assert ledger._room.num_taken == 0


def test_where_there_is_no_room_what_runs_keeps_no_more_and_its_signals_stay_exact(
    make_ledger, catalog
):
    whole, short = make_ledger(), make_ledger(max_bytes=2000)
    for ledger in (whole, short):
        for position in range(0, 300, 3):
            told = frame(
                catalog,
                ("a", position, 3),
                acts=ramp(position, 3),
                started=(start("a", 2),) if not position else (),
            )
            ledger.feed(told, 1.0)
        assert ledger.report("a")[0].num_observed == 300
    (kept,), (cut,) = whole.report("a"), short.report("a")
    assert kept.unobserved() == {}
    num_cut = cut.unobserved()[Unobserved.OVER_LIMIT]
    assert 0 < num_cut < 300
    values = [track.runs("known")[0][1].tolist() for track in (kept, cut)]
    assert values[1] == values[0][: 300 - num_cut]
    assert 0 < short._room.num_taken <= 2000
    for ledger in (whole, short):
        ledger.feed(frame(catalog, finished=("a",)), 1.0)
    assert scores(cut) == scores(kept)
    assert scores(cut)["in_answer"].score is not None


def test_what_a_track_holds_is_free_as_soon_as_it_is_forgotten(make_ledger, catalog):
    """And not when Python next looks for cycles: megabytes would wait for it."""
    ledger = make_ledger(max_bytes=1)
    gc.disable()
    try:
        tracks = []
        for name in ("first", "second"):
            told = frame(catalog, (name, 0, 9), acts=ramp(0, 9), started=(start(name, 9),))
            ledger.feed(told, 1.0)
            tracks.append(weakref.ref(ledger.report(name)[0]))
            ledger.feed(frame(catalog, finished=(name,)), 1.0)
        assert [track() is not None for track in tracks] == [False, True]
    finally:
        gc.enable()


def test_what_ended_makes_room_for_what_runs(make_ledger, catalog):
    ledger = make_ledger(max_bytes=20_000)
    for i in range(12):
        name = f"r{i}"
        ledger.feed(frame(catalog, (name, 0, 9), acts=ramp(0, 9), started=(start(name, 9),)), 1.0)
        ledger.feed(frame(catalog, finished=(name,)), 1.0)
    assert ledger._room.num_taken <= 20_000
    before = sum(bool(ledger.report(f"r{i}")) for i in range(12))
    long = frame(catalog, ("long", 0, 1000), acts=ramp(0, 1000), started=(start("long", 9),))
    ledger.feed(long, 1.0)
    assert sum(bool(ledger.report(f"r{i}")) for i in range(12)) < before
    assert ledger.report("r11")
    assert ledger.report("long")[0].unobserved() == {}


def test_a_finished_report_is_forgotten_after_its_time(make_ledger, catalog):
    ledger = make_ledger(ttl_seconds=10.0)
    ledger.feed(frame(catalog, ("a", 0, 1), started=(start("a", 1),)), 1.0)
    ledger.feed(frame(catalog, finished=("a",)), 2.0)
    assert ledger.expire(11.5) == []
    assert ledger.report("a")
    assert ledger.expire(12.5) == []
    assert ledger.report("a") == ()


def test_a_request_that_fell_silent_is_given_up_and_named(make_ledger, catalog):
    ledger = make_ledger(ttl_seconds=10.0)
    ledger.feed(frame(catalog, ("a", 0, 1), started=(start("a", 1),)), 1.0)
    (track,) = ledger.report("a")
    assert ledger.expire(11.5) == [track]
    assert ledger.report("a") == ()


def test_a_frame_of_unknown_sites_changes_nothing(ledger, catalog):
    good = frame(catalog, ("a", 0, 1), started=(start("a", 1),))
    bad = msgspec.structs.replace(
        good, sites=(msgspec.structs.replace(good.sites[0], site="resid_post.9"),)
    )
    with pytest.raises(ValueError, match=r"resid_post\.9"):
        ledger.feed(bad, 1.0)
    assert ledger.report("a") == ()


def test_kept_values_are_filed_and_the_message_that_brought_them_is_let_go(ledger, catalog):
    kept = CachedActivations(bytes([1, 1, 1]), frame(catalog, ("x", 0, 3), acts=ramp(0, 3)).sites)
    num_held = sys.getrefcount(kept)
    started = (msgspec.structs.replace(start("a", 4, first_position=3), cached=kept),)
    ledger.feed(frame(catalog, ("a", 3, 1), acts=ramp(3, 1), started=started), 1.0)
    del started
    (track,) = ledger.report("a")
    assert np.array_equal(track.activations(), ramp(0, 4))
    assert sys.getrefcount(kept) == num_held


def test_changed_tokens_are_summed_up_once_however_often_recomputed(ledger, catalog):
    started = (start("a", 2, policy="force-known"),)
    edited = {1: 3.0, 2: -1.0}
    for _ in range(2):
        ledger.feed(frame(catalog, ("a", 0, 4), started=started, edited=edited), 1.0)
    steered = ledger.report("a")[0].steered
    assert (steered.num_tokens, steered.first_position, steered.last_position) == (2, 1, 2)
    assert (steered.dose_mean, steered.dose_max) == (0.5, 0.5)
    assert ledger.report("a")[0].runs("known")[0][2].tolist() == [0.0, 3.0, -1.0, 0.0]
    assert ledger.report("a")[0].runs("unknown")[0][2] is None


def told_by(ledger, script):
    """All that a ledger says of the frames, as plain values."""
    steps = []
    for made in script.frames:
        step = ledger.feed(made, 1.0)
        news = [(n.fresh_T.tolist(), n.completed_T.tolist(), n.cached) for n in step.blocks]
        steps.append((news, dict(+step.unobserved)))
    tracks = [
        (
            np.nan_to_num(track.activations(), nan=-1.0).tolist(),
            [(p.first, p.stop) for p in track.passes],
            track.unobserved(),
            [track.spans(site) for site in range(2)],
            (track.end, track.steered.num_tokens, track.scores),
        )
        for name in script.names
        for track in ledger.report(name)
    ]
    return steps, tracks


@pytest.mark.parametrize("seed", range(12))
def test_tokens_that_come_one_by_one_are_kept_as_any_others(
    make_ledger, catalog, monkeypatch, seed
):
    script = Script(catalog, seed, 6, recomputing=seed % 2 == 0)
    found = told_by(make_ledger(max_tokens=25), script)
    monkeypatch.setattr(requests, "_append", lambda block, shares: ([], shares))
    assert found == told_by(make_ledger(max_tokens=25), script)


def test_tokens_that_were_not_filed_yet_are_seen_at_once(ledger, catalog):
    ledger.feed(frame(catalog, ("a", 0, 2), acts=ramp(0, 2), started=(start("a", 2),)), 1.0)
    (track,) = ledger.report("a")
    for position in (2, 3, 6, *range(7, 100)):
        ledger.feed(frame(catalog, ("a", position, 1), acts=ramp(position, 1)), 1.0)
        assert track.values("known", position, position + 1).tolist() == [position]
        assert (track.end, track.passes[-1].stop) == (position + 1, position + 1)
    assert track.unobserved() == {Unobserved.DROPPED_FRAME: 2}
    assert track.values("known", 2, 6) is None
    assert track.runs("late")[1][:2][1].tolist() == [200.0 + p for p in range(6, 100)]
