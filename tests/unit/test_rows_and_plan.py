import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from steerscope.engine.plan import BatchPlan, RequestInfo, StepLayout
from steerscope.engine.rows import RowTable
from steerscope.steering import segments
from steerscope.steering.interventions import Intervention, Phase
from steerscope.steering.stamp import Stamp, decode, encode


def stamp(*edits, num_prompt_tokens=5):
    return Stamp("x", "inline", "d", edits, segments.build("c", edits, num_prompt_tokens))


def clamp(value, **kwargs):
    return Intervention(feature="f", clamp=value, **kwargs)


class Batch:
    """A plan with the requests it may meet."""

    def __init__(self, capacity=8, **stamps):
        self.stamps = stamps
        self.table = RowTable(capacity)
        self.written = []
        self.plan = BatchPlan(self.table, self.look_up, self.write)

    def look_up(self, req_id):
        return RequestInfo(self.stamps.get(req_id), 5)

    def write(self, row, stamp, segment):
        self.written.append((row, [stamp.interventions[i].value for i in segment.active]))

    def row_at(self, name, position):
        """The row that holds exactly what the request's stamp says of the position."""
        if self.stamps[name] is None:
            return 0
        for segment in self.stamps[name].segments:
            if segment.start <= position and (segment.end is None or position < segment.end):
                return self.table.acquire(segment.digest)[0]
        return 0

    def rows(self, *members):
        """``members`` are (id, first position, number of tokens)."""
        starts = np.cumsum([0, *(n for _, _, n in members)])
        ids, firsts = tuple(m[0] for m in members), np.array([m[1] for m in members])
        rows_T = self.plan.rows(StepLayout(ids, starts, firsts))
        return [0] * int(starts[-1]) if rows_T is None else rows_T.tolist()


def test_a_stamp_survives_the_wire():
    made = stamp(clamp(1.0, phase=Phase.PROMPT, span=(1, 3)))
    assert decode(encode(made)) == made


def test_unsteered_tokens_have_the_neutral_row():
    assert Batch(a=None).rows(("a", 0, 3), ("b", 7, 1)) == [0, 0, 0, 0]


def test_rows_follow_positions_through_a_chunked_prompt_into_generation():
    batch = Batch(a=stamp(clamp(1.0, phase=Phase.PROMPT), clamp(2.0, phase=Phase.GENERATION)))
    assert batch.rows(("a", 0, 3)) == [1, 1, 1]
    assert batch.rows(("a", 3, 2)) == [1, 1]
    assert batch.rows(("a", 5, 1)) == [2]
    assert batch.written == [(1, [1.0]), (2, [2.0])]


def test_equal_steering_shares_a_row_and_is_written_once():
    batch = Batch(a=stamp(clamp(1.0)), b=stamp(clamp(1.0)), c=stamp(clamp(3.0)))
    assert batch.rows(("a", 0, 1), ("b", 0, 1), ("c", 0, 1)) in ([1, 1, 2], [2, 2, 1])
    assert batch.table.num_in_use == 2
    assert len(batch.written) == 2


def test_a_preempted_request_gives_its_row_back_and_gets_it_again():
    batch = Batch(a=stamp(clamp(1.0)))
    batch.rows(("a", 0, 5))
    batch.rows(("b", 0, 1))
    assert batch.table.num_in_use == 0
    assert batch.rows(("a", 0, 1), ("b", 1, 1)) == [1, 0]


def test_an_id_that_comes_back_as_another_request_gets_its_own_steering():
    batch = Batch(a=stamp(clamp(1.0)))
    batch.rows(("a", 0, 1))
    batch.stamps["a"] = None
    batch.plan.forget(["a"])
    assert batch.rows(("a", 0, 1)) == [0]
    assert batch.table.num_in_use == 0


def test_a_thousand_policies_in_rotation_neither_leak_nor_run_out():
    batch = Batch(capacity=4)
    for i in range(1000):
        batch.stamps = {f"r{i + k}": stamp(clamp(float(i + k))) for k in range(4)}
        rows = batch.rows(*((f"r{i + k}", 0, 1) for k in range(4)))
        assert sorted(rows) == [1, 2, 3, 4]
    batch.rows(("none", 0, 1))
    assert batch.table.num_in_use == 0


def test_the_last_written_steering_of_a_row_is_that_of_its_holder():
    batch = Batch(capacity=2)
    content = {}
    rng = np.random.default_rng(0)
    for step in range(300):
        chosen = rng.choice(6, size=2, replace=False)
        batch.stamps = {f"p{v}-{step}": stamp(clamp(float(v))) for v in chosen}
        before = len(batch.written)
        rows = batch.rows(*((f"p{v}-{step}", 0, 1) for v in chosen))
        for row, (value,) in batch.written[before:]:
            content[row] = value
        assert [content[row] for row in rows] == [float(v) for v in chosen]


def test_more_rows_than_capacity_cannot_happen_silently():
    table = RowTable(1)
    table.acquire("a")
    with pytest.raises(KeyError):
        table.acquire("b")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_rows_are_those_of_each_token_s_own_position(data):
    """Any crowd, in any order, step after step: against one token at a time."""
    names = "abcdef"
    phases = (Phase.PROMPT, Phase.GENERATION, Phase.ALL)
    stamps = {}
    for i, name in enumerate(names):
        edits = [
            clamp(10.0 * i + j, phase=data.draw(st.sampled_from(phases)))
            for j in range(data.draw(st.integers(0, 2)))
        ]
        if edits and data.draw(st.booleans()):
            start = data.draw(st.integers(0, 6))
            edits[0] = clamp(10.0 * i, span=(start, start + data.draw(st.integers(1, 6))))
        stamps[name] = stamp(*edits) if edits else None
    batch = Batch(capacity=64, **stamps)
    for _ in range(data.draw(st.integers(1, 4))):
        here = data.draw(st.lists(st.sampled_from(names), unique=True, max_size=6))
        members = [(n, data.draw(st.integers(0, 9)), data.draw(st.integers(0, 5))) for n in here]
        rows = iter(batch.rows(*members))
        for name, first, count in members:
            for position in range(first, first + count):
                assert next(rows) == batch.row_at(name, position)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_steps_of_one_token_each_have_the_rows_of_their_positions_too(data):
    spans = st.tuples(st.integers(0, 12), st.integers(1, 8)).map(lambda s: (s[0], s[0] + s[1]))
    names = ["a", "b", "c"]
    batch = Batch(
        **{
            name: stamp(*(clamp(float(i), span=span) for i, span in enumerate(chosen)))
            for name, chosen in (
                (name, data.draw(st.lists(spans, max_size=2, unique=True))) for name in names
            )
        }
    )
    at = dict.fromkeys(names, 0)
    for _ in range(20):
        # Mostly the next token; now and then a request starts over, or has more than one token.
        if data.draw(st.integers(0, 9)) == 0:
            at[data.draw(st.sampled_from(names))] = 0
        counts = [data.draw(st.sampled_from([1, 1, 1, 1, 1, 1, 1, 2])) for _ in names]
        got = batch.rows(*((name, at[name], n) for name, n in zip(names, counts, strict=True)))
        wanted = [
            batch.row_at(name, at[name] + i)
            for name, n in zip(names, counts, strict=True)
            for i in range(n)
        ]
        assert got == wanted
        for name, n in zip(names, counts, strict=True):
            at[name] += n
