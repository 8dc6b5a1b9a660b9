"""What a worker keeps between steps: who is there, which slots hold what, what is held back."""

import numpy as np
import pytest
import torch
from steerscope.catalog import store
from steerscope.engine import canary as canaries
from steerscope.engine.canary import Canary
from steerscope.engine.plan import RequestInfo, StepLayout
from steerscope.engine.roster import Arrival, MoreBlocks, Roster, Steps
from steerscope.engine.scheduling import SchedulerSide
from steerscope.engine.slots import SiteValues, SlotCache, Values, bytes_per_slot
from steerscope.engine.tape import Reading
from steerscope.engine.taps import SiteTap, StepRows
from steerscope.errors import UnsupportedEngineError
from steerscope.steering import segments
from steerscope.steering.interventions import Intervention, SteeringSpec
from steerscope.steering.stamp import Stamp

INFO = RequestInfo(None, 5)


def layout(*members):
    starts = np.cumsum([0, *(n for _, _, n in members)])
    return StepLayout(tuple(m[0] for m in members), starts, np.array([m[1] for m in members]))


class TestRoster:
    def test_slots_follow_the_blocks_of_each_request(self):
        roster = Roster()
        roster.arrive([Arrival("a", INFO, [7, 3]), Arrival("b", INFO, [5])])
        rows_R = roster.rows(("b", "a"))
        once = Steps(*map(np.array, ([2], [1])), rows_R, np.array([2, 3]), np.array([1, 3]))
        assert roster.slots(once, 5, block_size=4).tolist() == [21, 22, 31, 12, 13]
        thrice = Steps(*map(np.array, ([2], [3])), rows_R, np.array([1, 1]), np.array([1, 2]))
        assert roster.slots(thrice, 6, 4).tolist() == [21, 30, 22, 31, 23, 12]
        both = Steps(*map(np.concatenate, zip(once, thrice, strict=True)))
        assert roster.slots(both, 11, 4).tolist() == [21, 22, 31, 12, 13, 21, 30, 22, 31, 23, 12]
        assert roster.leading_slots("a", 6, 4).tolist() == [28, 29, 30, 31, 12, 13]

    def test_blocks_are_appended_or_replaced(self):
        roster = Roster()
        roster.arrive([Arrival("a", INFO, [7])])
        roster.extend([MoreBlocks("a", [2, 9], anew=False)])
        assert roster.leading_slots("a", 6, 2).tolist() == [14, 15, 4, 5, 18, 19]
        roster.extend([MoreBlocks("a", [1], anew=True)])
        assert roster.leading_slots("a", 2, 2).tolist() == [2, 3]

    def test_a_request_sent_whole_again_keeps_nothing_of_before(self):
        roster = Roster()
        roster.arrive([Arrival("a", INFO, [7, 8])])
        roster.arrive([Arrival("a", RequestInfo(Stamp("x"), 9), [4])])
        assert roster.info("a").num_prompt_tokens == 9
        assert roster.leading_slots("a", 1, 4).tolist() == [16]

    def test_it_grows_and_forgets(self):
        roster = Roster()
        for i in range(50):
            roster.arrive([Arrival(f"r{i}", INFO, list(range(i)))])
        assert roster.leading_slots("r49", 49, 1).tolist() == list(range(49))
        roster.leave([f"r{i}" for i in range(50)])
        assert len(roster) == 0
        roster.leave(["nobody"])

    def test_a_row_is_nobody_elses_before_all_is_asked_of_who_left(self):
        roster = Roster()
        roster.arrive([Arrival("a", INFO, [7])])
        (row,) = roster.rows(["a"])
        roster.leave(["a"])
        roster.arrive([Arrival("a", INFO, [8])])
        assert roster.rows(["a"]) != row
        assert roster.slots(Steps(*np.array([[1], [1], [row], [1], [0]])), 1, 1).tolist() == [7]
        roster.recycle()
        roster.arrive([Arrival("b", INFO, [9])])
        assert roster.rows(["b"]) == row


class TestSlotCache:
    def values(self, num_tokens, first=0.0, edited=()):
        acts = first + np.arange(3 * num_tokens, dtype=np.float32).reshape(-1, 3)
        steered = np.array(edited, np.int64)
        doses = np.full(len(edited), 0.5, np.float32)
        return Values(steered, [SiteValues(acts, acts[steered], doses)])

    def test_where_a_slot_comes_again_the_last_token_counts(self):
        cache = SlotCache((3,), 10, 1 << 20)
        values = self.values(5, edited=(0, 1, 3))
        cache.write(np.array([4, 2, 4, 2, 7]), values)
        known, (steered, (site,)) = cache.read(np.array([2, 4, 7]))
        assert known.all()
        assert steered.tolist() == [0]
        assert np.array_equal(site.acts, values.sites[0].acts[[3, 2, 4]])
        assert np.array_equal(site.deltas, values.sites[0].acts[[3]])

    def test_of_a_slot_that_comes_again_it_is_known_at_which_site_the_last_token_was_edited(self):
        cache = SlotCache((1, 1), 10, 1 << 20)
        one, none = np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32)
        acts = np.ones((2, 1), np.float32)
        first, second = SiteValues(acts, one, one[0]), SiteValues(acts, none, none[0])
        cache.write(np.array([4, 4]), Values(np.array([1]), [first, second]))
        _, (steered, sites) = cache.read(np.array([4]))
        assert steered.tolist() == [0]
        assert [site.doses.tolist() for site in sites] == [[1.0], [0.0]]

    def test_what_was_written_is_read_and_nothing_else(self):
        cache = SlotCache((3,), 10, 1 << 20)
        cache.write(np.array([4, 2]), self.values(2, edited=(1,)))
        known, (steered, (site,)) = cache.read(np.array([2, 3, 4, 99]))
        assert known.tolist() == [True, False, True, False]
        assert site.acts[[0, 2]].tolist() == [[3, 4, 5], [0, 1, 2]]
        assert steered.tolist() == [0]
        assert site.deltas.tolist() == [[3, 4, 5]]
        assert site.doses.tolist() == [0.5]

    def test_a_slot_that_is_written_again_keeps_nothing_of_before(self):
        cache = SlotCache((3,), 4, 1 << 20)
        cache.write(np.array([1]), self.values(1, edited=(0,)))
        cache.write(np.array([1]), self.values(1, first=9.0))
        known, (steered, (site,)) = cache.read(np.array([1]))
        assert known.all()
        assert site.acts.tolist() == [[9, 10, 11]]
        assert not steered.size

    def test_the_cap_leaves_out_the_slots_beyond_it(self):
        cache = SlotCache((3,), 1000, 5 * bytes_per_slot((3,)) + 1)
        assert cache.num_slots == 5
        cache.write(np.arange(8), self.values(8))
        known, _ = cache.read(np.arange(8))
        assert known.tolist() == [True] * 5 + [False] * 3
        cache.write(np.array([4, 6, 3]), self.values(3, edited=(1, 2)))
        _, (steered, (site,)) = cache.read(np.array([3, 4]))
        assert steered.tolist() == [0]
        assert site.deltas.tolist() == [[6, 7, 8]]

    def test_a_cap_of_nothing_keeps_nothing(self):
        cache = SlotCache((3,), 1000, 0)
        cache.write(np.arange(8), self.values(8))
        known, values = cache.read(np.arange(8))
        assert not known.any()
        assert not values.sites

    def test_its_arrays_take_the_bytes_of_the_formula(self):
        cache = SlotCache((3, 5), 100, 1 << 20)
        arrays = [cache._state, *cache._acts, *cache._deltas, *cache._doses]
        assert sum(a.nbytes for a in arrays) == 100 * bytes_per_slot((3, 5))

    def test_blocks_filled_by_others_are_forgotten(self):
        cache = SlotCache((3,), 8, 1 << 20)
        cache.write(np.arange(8), self.values(8))
        cache.forget_blocks([1], block_size=2)
        known, _ = cache.read(np.arange(8))
        assert known.tolist() == [True] * 2 + [False] * 2 + [True] * 4


def test_rejected_drafts_are_left_out_of_a_step():
    acts = np.arange(10, dtype=np.float32).reshape(10, 1)
    steered = np.array([1, 3, 6])
    values = Values(steered, [SiteValues(acts, 10 * acts[steered], np.ones(3, np.float32))])
    step = Reading(layout(("a", 4, 4), ("b", 0, 3), ("c", 9, 3)), values, 0)
    kept = step.accepted({"a": 6, "b": 3, "c": 9})
    assert kept.layout.query_start_loc.tolist() == [0, 2, 5, 5]
    (site,) = kept.values.sites
    assert site.acts.ravel().tolist() == [0, 1, 4, 5, 6]
    assert kept.values.steered.tolist() == [1, 4]
    assert site.deltas.ravel().tolist() == [10, 60]
    assert step.accepted({"a": 8, "b": 3}) is step


class Running:
    def __init__(self, computed, tokens, output=0):
        self.num_computed_tokens, self.num_tokens = computed, tokens
        self.num_output_tokens = output


class TestSchedulerSide:
    def test_ends_are_told_once(self):
        side = SchedulerSide(speculative=False)
        side.end("done", Running(11, 12), has_unfed_token=True)
        side.end("cut", Running(4, 12), has_unfed_token=False)
        side.end("drafted beyond", Running(15, 12), has_unfed_token=True)
        assert side.before_step({}, None).ended == {
            "done": 11,
            "cut": 4,
            "drafted beyond": 11,
        }
        assert side.before_step({}, None).ended == {}

    def test_what_was_accepted_is_told_of_those_in_the_last_step(self):
        side = SchedulerSide(speculative=True)
        side.after_step({"a": 5, "gone": 1})
        note = side.before_step({"a": Running(7, 8), "other": Running(1, 2)}, None)
        assert note.computed == {"a": 7}

    def test_a_change_takes_the_position_of_the_next_token(self):
        side = SchedulerSide(speculative=False)
        made = []

        def stamp_from(position):
            made.append(position)
            return Stamp("x", changed_at=position)

        requests = {"running": Running(7, 8, 2), "preempted": Running(0, 9, 3)}
        for name in (*requests, "gone"):
            side.change(name, stamp_from)
        seen = []
        note = side.before_step(requests, lambda *args: seen.append(args[:2]))
        assert made == [7, 8]
        assert seen == [("running", 7), ("preempted", 8)]
        assert set(note.stamps) == set(requests)
        assert side.before_step(requests, None).stamps == {}


def test_a_changed_stamp_is_the_old_one_before_and_the_new_one_after():
    first = Intervention(feature="f", clamp=1.0)
    second = Intervention(feature="g", add=2.0, phase="generation")
    parts = segments.build("c", (first,), 5)
    stamp = Stamp("x", "push", "d", (first,), parts)
    changed = stamp.changed(8, "inline", SteeringSpec(interventions=(second,)), "c", 5)
    assert [(s.start, s.end, s.active) for s in changed.segments] == [(0, 8, (0,)), (8, None, (1,))]
    assert changed.current == (second,)
    assert changed.segments[0].digest == parts[0].digest
    released = changed.changed(9, "", SteeringSpec(interventions=()), "c", 5)
    assert [(s.start, s.end) for s in released.segments] == [(0, 8), (8, 9)]
    assert (released.digest, released.current) == ("", ())


class TestCanary:
    @pytest.fixture
    def site(self, tiny_world):
        catalog = store.load(tiny_world.catalog)
        step = StepRows(8, torch.device("cpu"))
        return SiteTap(catalog, next(iter(catalog.sites)), step, 4, torch.device("cpu"))

    def stream(self):
        return 5 * torch.randn(6, 128, generator=torch.Generator().manual_seed(0))

    def test_it_sings_for_a_few_steps_and_then_costs_nothing(self, site):
        canary = Canary([site])
        for _ in range(canaries.NUM_STEPS):
            assert canary
            canary.before(6)
            site(self.stream(), None)
            canary.after(np.arange(6), torch.arange(8))
        assert not canary
        assert not site.is_probed

    def test_a_site_that_did_not_run_or_not_on_every_token(self, site):
        canary = Canary([site])
        canary.before(6)
        with pytest.raises(UnsupportedEngineError, match="did not see every token"):
            canary.after(np.arange(6), None)
        site(self.stream()[:5], None)
        with pytest.raises(UnsupportedEngineError, match="did not see every token"):
            canary.after(np.arange(6), None)

    def test_positions_that_are_not_those_of_the_plan(self, site):
        canary = Canary([site])
        canary.before(6)
        site(self.stream(), None)
        with pytest.raises(UnsupportedEngineError, match="positions"):
            canary.after(np.arange(6), torch.arange(1, 9))

    def test_an_activation_that_plain_torch_does_not_make(self, site):
        canary = Canary([site])
        canary.before(6)
        site(self.stream(), None)
        site.acts_TF[0, 3] += 0.5
        with pytest.raises(UnsupportedEngineError, match=r"probe_1 at resid_post\.1"):
            canary.after(np.arange(6), None)
