"""Orders over their real wire: the hub's plane, an engine core's link and book."""

import asyncio
import time
from collections import deque

import pytest
from steerscope.engine.orders import EngineLink, Limits, OrderBook
from steerscope.engine.scheduling import NO_NEWS, SchedulerSide
from steerscope.hub.engines import EnginePlane
from steerscope.hub.orders import Standing
from steerscope.steering.interventions import Intervention, SteeringSpec
from steerscope.steering.rules import OverrideMode, SteeringSource
from steerscope.steering.stamp import Stamp, decode

pytestmark = pytest.mark.timeout(60)

CATALOG = "c" * 64
SPEC = SteeringSpec(interventions=(Intervention(feature="f", clamp=2.0),), max_dose=0.5)
RELEASED = SteeringSpec(interventions=())


class Running:
    def __init__(self, external_id, computed, prompt=10):
        self.stamp = Stamp(external_id)
        self.num_computed_tokens, self.num_prompt_tokens = computed, prompt
        self.num_tokens = max(computed + 1, prompt)
        self.num_output_tokens = max(computed + 1 - prompt, 0)


class Core:
    """An engine core's half of ours, stepped by hand."""

    def __init__(self, endpoint, engine="0", *, catalog=CATALOG, refused="", max_rows=4):
        self.requests = {}
        self.link = EngineLink(endpoint, engine, catalog, self._stamps)
        limits = Limits(CATALOG, max_rows, refused)
        book = OrderBook(self.link.arrived, self.link.answer, limits, self._stamps)
        self.side = SchedulerSide(speculative=False, orders=book)

    def step(self):
        def restamp(req_id, _, stamp):
            self.requests[req_id].stamp = stamp

        return self.side.before_step(self.requests, restamp).stamps

    def _stamps(self, req_ids):
        running = list(self.requests.items())
        wanted = self.requests if req_ids is None else req_ids
        return {i: (r.stamp, r.num_prompt_tokens) for i, r in running if i in wanted}

    async def stepping(self):
        while True:
            self.step()
            await asyncio.sleep(0.002)


@pytest.fixture
def endpoint(tmp_path):
    return str(tmp_path)


async def serving(endpoint, *cores):
    plane = EnginePlane(endpoint, CATALOG)
    tasks = [asyncio.create_task(plane.run())]
    tasks += [asyncio.create_task(core.stepping()) for core in cores]
    return plane, tasks


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 30))


async def present(plane, count):
    while len(plane._engines) < count:
        await asyncio.sleep(0.01)


def test_a_running_request_is_steered_from_its_next_token_and_the_answer_says_which(endpoint):
    async def body():
        core = Core(endpoint)
        core.requests["r-1"] = Running("r", 14)
        core.requests["other-1"] = Running("other", 3)
        plane, tasks = await serving(endpoint, core)
        await present(plane, 1)
        told = await plane.steer("r", "inline", SPEC, ttl_seconds=5, num_running=1, wait_seconds=5)
        for task in tasks:
            task.cancel()
        plane.close()
        return core, told

    core, told = run(body())
    assert told.applied == {"r-1": 14}
    assert not told.is_waiting
    stamp = core.requests["r-1"].stamp
    assert (stamp.changed_at, stamp.current, stamp.max_dose) == (14, SPEC.interventions, 0.5)
    assert core.requests["other-1"].stamp == Stamp("other")


def test_a_request_that_the_hub_is_not_told_of_yet_is_steered_and_the_answer_says_so(endpoint):
    """However long a step takes: the engine says that it runs there."""

    async def body():
        core = Core(endpoint)
        core.requests["r-1"] = Running("r", 14)
        plane, tasks = await serving(endpoint)
        await present(plane, 1)

        async def long_step():
            await asyncio.sleep(0.7)
            await core.stepping()

        tasks.append(asyncio.create_task(long_step()))
        told = await plane.steer("r", "p", SPEC, ttl_seconds=5, num_running=0, wait_seconds=5)
        applied = dict(told.applied)
        for task in tasks:
            task.cancel()
        plane.close()
        return applied

    assert run(body()) == {"r-1": 14}


def test_every_sequence_of_the_request_is_steered_on_whichever_engine_it_runs(endpoint):
    async def body():
        cores = [Core(endpoint, "0"), Core(endpoint, "1")]
        cores[0].requests["r-a"] = Running("r", 12)
        cores[1].requests["r-b"] = Running("r", 20)
        plane, tasks = await serving(endpoint, *cores)
        await present(plane, 2)
        told = await plane.steer("r", "p", SPEC, ttl_seconds=5, num_running=2, wait_seconds=5)
        for task in tasks:
            task.cancel()
        plane.close()
        return told

    assert run(body()).applied == {"r-a": 12, "r-b": 20}


def test_an_order_for_a_request_that_has_not_arrived_waits_and_holds_from_its_first_token(endpoint):
    async def body():
        core = Core(endpoint)
        plane, tasks = await serving(endpoint, core)
        await present(plane, 1)
        told = await plane.steer("r", "p", SPEC, ttl_seconds=5, num_running=0, wait_seconds=5)
        assert told.is_waiting
        await asyncio.sleep(0.1)
        core.requests["r-1"] = Running("r", 0)
        while told.is_waiting:
            await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        plane.close()
        return told

    assert run(body()).applied == {"r-1": 0}


def test_a_request_that_is_sent_after_the_answer_meets_the_order_in_its_very_first_step(endpoint):
    async def body():
        core = Core(endpoint)
        plane, tasks = await serving(endpoint)
        await present(plane, 1)
        for i in range(50):
            await plane.steer(f"r{i}", "p", SPEC, ttl_seconds=5, num_running=0, wait_seconds=5)
            core.requests[f"r{i}-1"] = Running(f"r{i}", 0)
            core.step()
        for task in tasks:
            task.cancel()
        plane.close()
        return core

    stamps = [request.stamp for request in run(body()).requests.values()]
    assert [(s.changed_at, s.current) for s in stamps] == 50 * [(0, SPEC.interventions)]


def test_an_order_expires_and_one_that_is_withdrawn_is_void(endpoint):
    async def body():
        core = Core(endpoint)
        plane, tasks = await serving(endpoint, core)
        await present(plane, 1)
        short = await plane.steer("a", "p", SPEC, ttl_seconds=0.2, num_running=0, wait_seconds=0)
        await plane.steer("b", "p", SPEC, ttl_seconds=60, num_running=0, wait_seconds=0)
        assert await plane.withdraw("b")
        assert not await plane.withdraw("b")
        await asyncio.sleep(0.5)
        core.requests = {"a-1": Running("a", 0), "b-1": Running("b", 0)}
        await asyncio.sleep(0.2)
        for task in tasks:
            task.cancel()
        plane.close()
        assert not short.is_waiting
        return core

    core = run(body())
    assert all(request.stamp.digest == "" for request in core.requests.values())


def test_a_release_takes_the_steering_away_from_the_next_token_on(endpoint):
    async def body():
        core = Core(endpoint)
        core.requests["r-1"] = Running("r", 12)
        plane, tasks = await serving(endpoint, core)
        await present(plane, 1)
        await plane.steer("r", "p", SPEC, ttl_seconds=5, num_running=1, wait_seconds=5)
        core.requests["r-1"].num_computed_tokens, core.requests["r-1"].num_tokens = 17, 18
        told = await plane.steer("r", "", RELEASED, ttl_seconds=5, num_running=1, wait_seconds=5)
        for task in tasks:
            task.cancel()
        plane.close()
        return core, told

    core, told = run(body())
    assert told.applied == {"r-1": 17}
    stamp = core.requests["r-1"].stamp
    assert (stamp.digest, stamp.current) == ("", ())
    assert [(s.start, s.end) for s in stamp.segments] == [(12, 17)]


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"refused": "not with a connector"}, "not with a connector"),
        ({"max_rows": 0}, "past and present steering make 1 combinations of edits, 0 allowed"),
    ],
)
def test_what_an_engine_cannot_do_exactly_is_declined_with_its_reason(endpoint, limits, reason):
    async def body():
        core = Core(endpoint, **limits)
        core.requests["r-1"] = Running("r", 12)
        plane, tasks = await serving(endpoint, core)
        await present(plane, 1)
        told = await plane.steer("r", "p", SPEC, ttl_seconds=5, num_running=1, wait_seconds=5)
        for task in tasks:
            task.cancel()
        plane.close()
        return core, told

    core, told = run(body())
    assert told.declined == {"r-1": reason}
    assert core.requests["r-1"].stamp == Stamp("r")


@pytest.mark.parametrize("over_bound", [False, True])
def test_a_bound_request_is_only_steered_by_who_may_beat_its_rule(endpoint, over_bound):
    async def body():
        core = Core(endpoint)
        core.requests["r-1"] = Running("r", 12)
        bound = Stamp("r", source=SteeringSource.BOUND, rule="team")
        core.requests["r-1"].stamp = bound
        plane, tasks = await serving(endpoint, core)
        await present(plane, 1)
        told = await plane.steer(
            "r", "p", SPEC, ttl_seconds=5, num_running=1, wait_seconds=5, over_bound=over_bound
        )
        for task in tasks:
            task.cancel()
        plane.close()
        return core.requests["r-1"].stamp == bound, told

    is_untouched, told = run(body())
    assert is_untouched != over_bound
    if over_bound:
        assert told.applied == {"r-1": 12}
    else:
        assert told.declined == {
            "r-1": "the request is bound by the rule 'team', which takes the scope admin"
        }


def test_an_override_that_an_engine_cannot_keep_for_a_request_is_told_once(endpoint):
    async def body():
        core = Core(endpoint, max_rows=0)
        core.requests["r-1"] = Running("r", 12)
        plane, tasks = await serving(endpoint, core)
        await present(plane, 1)
        held = await plane.hold(OverrideMode.FORCE, "p", SPEC, running=["r-1"])
        await asyncio.sleep(0.1)
        assert not core.link._answers
        off = await plane.hold(OverrideMode.OFF)
        for task in tasks:
            task.cancel()
        plane.close()
        return core, held, off

    core, held, off = run(body())
    assert list(held.declined) == ["r-1"]
    assert core.requests["r-1"].stamp == Stamp("r")
    assert not off.declined


def test_an_engine_with_another_catalog_gets_no_orders(endpoint):
    async def body():
        core = Core(endpoint, catalog="d" * 64)
        core.requests["r-1"] = Running("r", 12)
        plane, tasks = await serving(endpoint, core)
        await asyncio.sleep(0.3)
        told = await plane.steer("r", "p", SPEC, ttl_seconds=5, num_running=1, wait_seconds=0.3)
        for task in tasks:
            task.cancel()
        plane.close()
        return told

    assert run(body()).applied == {}


def test_a_core_that_comes_late_hears_of_the_orders_that_wait(endpoint):
    async def body():
        plane, tasks = await serving(endpoint)
        await plane.steer("r", "p", SPEC, ttl_seconds=20, num_running=0, wait_seconds=0)
        core = Core(endpoint)
        core.requests["r-1"] = Running("r", 0)
        tasks.append(asyncio.create_task(core.stepping()))
        while plane.ordered("r").is_waiting:
            await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        plane.close()
        return core

    assert run(body()).requests["r-1"].stamp.digest


def test_a_step_without_orders_never_asks_for_stamps():
    def stamps(_):
        raise AssertionError("asked")

    book = OrderBook(deque(), None, Limits(CATALOG, 4), stamps)
    assert SchedulerSide(False, book).before_step({}, None) is NO_NEWS


def test_under_an_override_a_request_is_looked_at_when_it_comes_and_never_again():
    requests = {"a": Running("a", 12), "b": Running("b", 12)}
    asked = []

    def stamps(req_ids):
        asked.append(set(req_ids))
        return {i: (requests[i].stamp, 10) for i in req_ids}

    def step():
        side.before_step(requests, lambda req_id, _, stamp: steered.append(req_id))

    steered = []
    arrived = deque([Standing(1, OverrideMode.FORCE, "p", SPEC.interventions)])
    side = SchedulerSide(False, OrderBook(arrived, lambda _: None, Limits(CATALOG, 4), stamps))
    step()
    requests["c"] = Running("c", 12)
    step()
    step()
    assert asked == [{"a", "b"}, {"c"}]
    side.end("a", requests.pop("a"), has_unfed_token=True)
    requests["a"] = Running("another", 12)
    step()
    assert asked[2:] == [{"a"}]
    assert sorted(steered) == ["a", "a", "b", "c"]
    arrived.append(Standing(2, OverrideMode.OFF))
    step()
    assert asked[3:] == [{"a", "b", "c"}]


def test_the_note_carries_the_new_stamp_to_every_rank(endpoint):
    async def body():
        core = Core(endpoint)
        core.requests["r-1"] = Running("r", 14)
        plane, tasks = await serving(endpoint)
        await present(plane, 1)
        steered = asyncio.create_task(
            plane.steer("r", "p", SPEC, ttl_seconds=5, num_running=1, wait_seconds=5)
        )
        note, until = {}, time.monotonic() + 10
        while not note and time.monotonic() < until:
            await asyncio.sleep(0.01)
            note = core.step()
        await steered
        for task in tasks:
            task.cancel()
        plane.close()
        return note

    (payload,) = run(body()).values()
    assert decode(payload).changed_at == 14
