"""Every reduction against a plain one over whole lists, however the tokens came."""

import dataclasses
import statistics
import sys
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steerscope.catalog import store
from steerscope.catalog.model import Label, Reduction, Signal, Span, Term
from steerscope.telemetry.columns import Columns
from steerscope.telemetry.frames import CachedActivations
from steerscope.telemetry.reductions import Missing, reduce
from steerscope.telemetry.requests import Limits, RequestLedger

sys.path.insert(0, str(Path(__file__).parents[1] / "hub"))

from hub_world import frame, observed, start, write_catalog

pytestmark = pytest.mark.timeout(120)

FEATURES = ("known", "unknown", "late")
SITE_OF = {"known": 0, "unknown": 0, "late": 1}
ON_ENTITY = [r for r in Reduction if "entity" in r]


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return store.load(write_catalog(tmp_path_factory.mktemp("reductions") / "catalog"))


def with_terms(catalog, *terms):
    """The catalog with one signal over these terms and no other."""
    signal = Signal(name="s", terms=terms, bias=0.0, labels=(Label(label="any"),))
    document = msgspec.structs.replace(catalog.document, signals=(signal,))
    return dataclasses.replace(catalog, document=document)


class Plain:
    """What is known, position by position and site by site, in lists."""

    def __init__(self, num_prompt_tokens):
        self.num_prompt_tokens = num_prompt_tokens
        self.acts = {}
        self.end = 0

    def put(self, position, sites, row):
        columns = [c for c, name in enumerate(FEATURES) if SITE_OF[name] in sites]
        finite = all(np.isfinite(row[c]) for c in columns)
        for site in sites:
            self.acts[position, site] = row if finite else None
        self.end = max(self.end, position + 1)

    def reduce(self, term):
        prompt, end = self.num_prompt_tokens, self.end
        if term.reduce == "last_prompt_token":
            positions = [prompt - 1]
        elif term.reduce.endswith("first_generated"):
            positions = list(range(prompt, end))[: term.first]
        elif term.reduce.endswith("generation"):
            positions = list(range(prompt, end))
        else:
            positions = list(range(prompt))
        rows = [self.acts.get((p, SITE_OF[term.feature])) for p in positions]
        if not rows or None in rows:
            return Missing.UNOBSERVED
        if term.span is not None:
            gate = FEATURES.index(term.span.feature)
            rows = [row for row in rows if row[gate] > term.span.above]
        values = [row[FEATURES.index(term.feature)] for row in rows]
        if not values:
            return Missing.NOT_APPLICABLE
        how = term.reduce.split("_")[0]
        return {"last": values[-1], "max": max(values), "min": min(values)}.get(
            how, statistics.fmean(values)
        )


# Multiples of 1/8: their sums are exact in any order, so that means can be compared exactly.
VALUES = st.integers(-24, 24).map(lambda n: n / 8)
ROWS = st.tuples(VALUES, VALUES, VALUES).map(list)
ODD_ROWS = ROWS | st.just([1.0, float("nan"), 1.0])


@st.composite
def terms(draw):
    how = draw(st.sampled_from(Reduction))
    feature = draw(st.sampled_from(FEATURES))
    beside = [name for name in FEATURES if SITE_OF[name] == SITE_OF[feature]]
    span = Span(feature=draw(st.sampled_from(beside)), above=draw(VALUES))
    return Term(
        feature=feature,
        reduce=how,
        weight=1.0,
        first=draw(st.integers(1, 64) | st.integers(1, 8)),
        span=span if how in ON_ENTITY else None,
    )


@st.composite
def shares(draw, num_tokens, rows):
    """Some adjacent tokens as one frame brings them: of one site or of both."""
    position = draw(st.integers(0, num_tokens - 1))
    length = draw(st.integers(1, num_tokens - position))
    sites = draw(st.sampled_from([(0,), (1,), (0, 1)]))
    return position, sites, draw(st.lists(rows, min_size=length, max_size=length))


@st.composite
def whole(draw, num_tokens, first_position):
    """All tokens from some position on, chunk after chunk, each site by itself or both at once."""
    brought = []
    for sites in draw(st.sampled_from([((0, 1),), ((0,), (1,)), ((1,), (0,))])):
        cuts = draw(st.sets(st.integers(first_position + 1, num_tokens)))
        bounds = sorted({first_position, *cuts, num_tokens})
        for position, stop in pairwise(bounds):
            length = stop - position
            rows = draw(st.lists(ROWS, min_size=length, max_size=length))
            brought.append((position, sites, rows))
    return brought


@st.composite
def histories(draw):
    """A prompt's length, what the prefix cache kept, and shares in the order of arrival.

    Recomputed tokens get new values, so that it shows which of them is counted, and how often.
    """
    num_prompt_tokens = draw(st.integers(1, 12))
    num_tokens = num_prompt_tokens + draw(st.integers(0, 14))
    num_cached = draw(st.integers(0, num_prompt_tokens - 1))
    cached = draw(st.lists(st.none() | ROWS, min_size=num_cached, max_size=num_cached))
    if draw(st.booleans()):
        cached = [row or [0.5, 1.0, 1.5] for row in cached]
    odd = draw(st.lists(shares(num_tokens, ODD_ROWS), max_size=4))
    then = draw(whole(num_tokens, draw(st.sampled_from([0, num_cached]))))
    again = draw(st.lists(shares(num_tokens, draw(st.sampled_from([ROWS, ODD_ROWS]))), max_size=3))
    return num_prompt_tokens, cached, [*odd, *(then if draw(st.booleans()) else ()), *again]


def told(catalog, num_prompt_tokens, cached):
    made = start("a", num_prompt_tokens, first_position=len(cached))
    if not cached:
        return made
    rows = [row or [9.0, 9.0, 9.0] for row in cached]
    kept = frame(catalog, ("a", 0, len(cached)), acts=rows).sites
    known = bytes(row is not None for row in cached)
    return msgspec.structs.replace(made, cached=CachedActivations(known, kept))


def of_sites(made, sites):
    return msgspec.structs.replace(made, sites=tuple(made.sites[s] for s in sites))


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(term=terms(), history=histories(), limit=st.integers(1, 30))
def test_a_reduction_is_exact_whatever_the_limit_and_however_tokens_arrive(
    catalog, term, history, limit
):
    num_prompt_tokens, cached, arrivals = history
    catalog = with_terms(catalog, term)
    reduced = []
    ledger = RequestLedger(
        Columns(catalog),
        Limits(10, 60.0, limit),
        lambda track: reduced.append(reduce(term, track)) or (),
    )
    plain = Plain(num_prompt_tokens)
    plain.end = len(cached)
    for position, row in enumerate(cached):
        if row is not None:
            plain.put(position, (0, 1), row)
    neighbour = start("b", 3)
    started = (neighbour, told(catalog, num_prompt_tokens, cached))
    ledger.feed(frame(catalog, ("b", 0, 1), acts=77.0, started=started), 1.0)
    for position, sites, rows in arrivals:
        acts = [[99.0] * 3, *rows]
        made = frame(catalog, ("b", 1, 1), ("a", position, len(rows)), acts=acts)
        ledger.feed(of_sites(made, sites), 1.0)
        for n, row in enumerate(rows):
            plain.put(position + n, sites, row)
    ledger.feed(frame(catalog, finished=("a",)), 1.0)
    assert reduced == [plain.reduce(term)]


READ = Term(feature="known", reduce=Reduction.MAX_PROMPT, weight=1.0)


def test_a_feature_that_no_signal_reads_is_not_known_beyond_the_limit(catalog):
    track = observed(with_terms(catalog, READ), [[1.0, 2.0, 3.0]] * 5, 5, limit=2)
    assert track.values("known", 0, 5).tolist() == [1.0] * 5
    assert track.values("late", 0, 2).tolist() == [3.0] * 2
    assert track.values("late", 0, 5) is None
    assert reduce(entity(Reduction.MAX_ENTITY_SPAN), track) is Missing.UNOBSERVED


def test_what_lies_beyond_the_limit_is_let_go_when_the_sequence_ends(catalog):
    track = observed(with_terms(catalog, READ), [[1.0] * 3] * 5, 5, limit=2)
    assert reduce(READ, track) == 1.0
    track.finish((), 2.0)
    assert reduce(READ, track) is Missing.UNOBSERVED
    assert track.values("known", 0, 2).tolist() == [1.0, 1.0]


def entity(how, above=1.0):
    return Term(feature="known", reduce=how, weight=1.0, span=Span(feature="unknown", above=above))


def test_an_entity_is_the_prompt_tokens_above_the_bound_and_not_at_it(catalog):
    acts = [[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [4.0, 3.0, 0.0], [8.0, 1.0, 0.0], [16.0, 9.0, 0.0]]
    track = observed(catalog, acts, 4)
    assert reduce(entity(Reduction.LAST_ENTITY_TOKEN), track) == 4.0
    assert reduce(entity(Reduction.MAX_ENTITY_SPAN), track) == 4.0
    assert reduce(entity(Reduction.MEAN_ENTITY_SPAN), track) == 2.5


@pytest.mark.parametrize("how", ON_ENTITY)
def test_a_prompt_without_the_entity_is_not_applicable_only_if_it_was_seen_whole(catalog, how):
    without, somewhere = [[1.0, 0.5, 0.0]] * 2, [[1.0, 9.0, 0.0]] * 2
    assert reduce(entity(how), observed(catalog, without, 2)) is Missing.NOT_APPLICABLE
    assert reduce(entity(how), observed(catalog, without, 3)) is Missing.UNOBSERVED
    assert reduce(entity(how), observed(catalog, somewhere, 3)) is Missing.UNOBSERVED


def test_a_bound_that_float32_cannot_hold_is_not_rounded(catalog):
    for value, inside in ((0.1, True), (0.0999, False)):
        track = observed(catalog, [[7.0, value, 0.0]], 1)
        found = reduce(entity(Reduction.MAX_ENTITY_SPAN, above=0.1), track)
        assert (found == 7.0) is inside
    beyond_float32 = entity(Reduction.MAX_ENTITY_SPAN, above=1e300)
    assert reduce(beyond_float32, track) is Missing.NOT_APPLICABLE


@pytest.mark.parametrize(
    ("how", "first", "known"),
    [
        (Reduction.MAX_FIRST_GENERATED, 3, True),
        (Reduction.MEAN_FIRST_GENERATED, 2, True),
        (Reduction.MAX_FIRST_GENERATED, 4, False),
        (Reduction.MAX_GENERATION, 8, False),
        (Reduction.LAST_PROMPT_TOKEN, 8, True),
    ],
)
def test_a_lost_tail_takes_only_the_reductions_that_could_look_at_it(catalog, how, first, known):
    track = observed(catalog, [[1.0] * 3] * 4, 1, tail_lost=True)
    found = reduce(Term(feature="known", reduce=how, weight=1.0, first=first), track)
    assert (found is not Missing.UNOBSERVED) is known


@pytest.mark.parametrize("num_prompt_tokens", [-3, 0])
@pytest.mark.parametrize("how", [Reduction.LAST_PROMPT_TOKEN, Reduction.MEAN_PROMPT])
def test_a_prompt_of_no_length_reduces_to_nothing(catalog, how, num_prompt_tokens):
    track = observed(catalog, [[1.0] * 3] * 64, num_prompt_tokens)
    term = Term(feature="known", reduce=how, weight=1.0)
    assert reduce(term, track) is Missing.UNOBSERVED
