"""The ring behind the watches of all requests, by itself."""

import asyncio
import random

import pytest
from steerscope.errors import SpecError
from steerscope.hub.refusals import CursorLostError
from steerscope.hub.watches.feed import EVENT_BYTES, Feed


def feed_of(num_events, linger_seconds=60.0, name="numbers"):
    """A ring for that many events of no size."""
    return Feed(name, "this hub", num_events * EVENT_BYTES, linger_seconds)


def tell(feed, *items):
    for item in items:
        feed.add(lambda item=item: (item, 0))


async def read(feed, cursor="", count=1):
    with feed.watching(cursor) as events:
        return [await asyncio.wait_for(anext(events), 1) for _ in range(count)]


async def first_event(feed, item):
    with feed.watching("") as events:
        tell(feed, item)
        return await anext(events)


def test_nothing_is_made_while_nobody_watches():
    feed = feed_of(10)
    feed.add(lambda: pytest.fail("made for nobody"))
    assert (feed.last, feed.num_bytes) == (1, 0)


async def _counted():
    feed = feed_of(10, linger_seconds=0.01)
    begun = await first_event(feed, "a")
    await asyncio.sleep(0.05)
    assert (feed.is_kept, feed.num_bytes) == (False, 0)
    tell(feed, "b", "c", "d")
    with feed.watching(begun.cursor) as events:
        tell(feed, "e")
        event = await anext(events)
    assert (event.item, event.missed) == ("e", 3)


def test_what_passed_while_nobody_watched_is_missed_by_exactly_so_many():
    asyncio.run(_counted())


async def _lingered():
    feed = feed_of(10)
    begun = await first_event(feed, "a")
    tell(feed, "b", "c")
    later = await read(feed, begun.cursor, 2)
    assert [(event.item, event.missed) for event in later] == [("b", 0), ("c", 0)]


def test_who_comes_back_soon_misses_nothing():
    asyncio.run(_lingered())


async def _raced(seed):
    choose = random.Random(seed)
    feed, got = feed_of(7), {0: [], 1: []}
    with feed.watching("") as quick, feed.watching("") as slow:
        for first in range(0, 3000, 3):
            tell(feed, first, first + 1, first + 2)
            got[0] += [await anext(quick) for _ in range(3)]
            if choose.random() < 0.2:
                got[1].append(await anext(slow))
        while got[1][-1].item < 2999:
            got[1].append(await anext(slow))
    for events in got.values():
        number = -1
        for event in events:
            assert event.item == number + event.missed + 1
            number = event.item
    assert not any(event.missed for event in got[0])
    assert sum(event.missed for event in got[1]) == 3000 - len(got[1]) > 0


@pytest.mark.parametrize("seed", range(5))
def test_of_two_watchers_only_the_slow_one_misses_and_is_told_exactly_what(seed):
    asyncio.run(_raced(seed))


async def _oversized():
    feed = feed_of(3)
    with feed.watching("") as events:
        feed.append("large", 100 * EVENT_BYTES)
        assert (await anext(events)).item == "large"
        tell(feed, "small")
        assert feed.num_bytes == EVENT_BYTES
        assert (await anext(events)).item == "small"


def test_an_event_larger_than_the_ring_is_kept_until_the_next():
    asyncio.run(_oversized())


async def _refused():
    feed, other = feed_of(3), feed_of(3, name="letters")
    event = await first_event(other, "a")
    with pytest.raises(SpecError, match="letters") as caught, feed.watching(event.cursor):
        pass
    assert caught.value.field == "cursor"
    elsewhere = Feed("letters", "that hub", 1024, 1.0)
    with pytest.raises(CursorLostError, match="another hub"), elsewhere.watching(event.cursor):
        pass
    assert not elsewhere.is_kept


def test_a_cursor_of_another_feed_or_hub_is_refused():
    asyncio.run(_refused())
