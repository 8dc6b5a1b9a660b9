from hypothesis import given
from hypothesis import strategies as st
from steerscope.steering import segments
from steerscope.steering.interventions import Intervention, Phase


def edit(feature="f", **kwargs):
    return Intervention(feature=feature, clamp=1.0, **kwargs)


def build(*edits, num_prompt_tokens=10, catalog="c"):
    return segments.build(catalog, edits, num_prompt_tokens)


def test_an_edit_of_all_tokens_is_one_segment_without_end():
    (only,) = build(edit())
    assert (only.start, only.end, only.active) == (0, None, (0,))


def test_a_generation_edit_starts_after_the_prompt():
    (only,) = build(edit(phase=Phase.GENERATION))
    assert (only.start, only.end) == (10, None)


def test_a_span_narrows_its_phase_and_never_widens_it():
    (only,) = build(edit(phase=Phase.PROMPT, span=(4, 40)))
    assert (only.start, only.end) == (4, 10)


def test_overlapping_edits_of_two_features_split_where_the_set_changes():
    parts = build(edit("f", span=(2, 6)), edit("g", span=(4, 8)))
    assert [(p.start, p.end, p.active) for p in parts] == [
        (2, 4, (0,)),
        (4, 6, (0, 1)),
        (6, 8, (1,)),
    ]


def test_equal_effective_steering_has_equal_digests_whatever_the_phase_and_order():
    one = build(edit("f", phase=Phase.PROMPT), edit("g", phase=Phase.PROMPT))
    two = build(edit("g"), edit("f"))
    assert one[0].digest == two[0].digest
    assert one[0].digest != build(edit("f"))[0].digest
    assert one[0].digest != build(edit("f"), edit("g"), catalog="other")[0].digest


def test_blocks_before_the_first_steered_token_are_not_salted():
    parts = build(edit(phase=Phase.GENERATION), num_prompt_tokens=40)
    assert segments.salt(parts, 0, 32) is None
    assert segments.salt(parts, 32, 64) is not None


def test_a_block_that_is_half_prompt_differs_from_one_that_is_all_prompt():
    short = build(edit(phase=Phase.PROMPT), num_prompt_tokens=20)
    long = build(edit(phase=Phase.PROMPT), num_prompt_tokens=64)
    assert segments.salt(short, 0, 16) == segments.salt(long, 0, 16)
    assert segments.salt(short, 16, 32) != segments.salt(long, 16, 32)


spans = st.tuples(st.integers(0, 30), st.integers(1, 10)).map(lambda t: (t[0], t[0] + t[1]))
edits = st.lists(
    st.builds(
        Intervention,
        feature=st.sampled_from("abcdef"),
        clamp=st.just(1.0),
        phase=st.sampled_from(Phase),
        span=st.none() | spans,
    ),
    max_size=5,
)


@given(edits, st.integers(1, 20), st.integers(0, 50))
def test_a_position_is_in_exactly_the_segments_its_edits_cover(interventions, num_prompt, position):
    parts = segments.build("c", tuple(interventions), num_prompt)
    here = Phase.PROMPT if position < num_prompt else Phase.GENERATION
    expected = tuple(
        i
        for i, each in enumerate(interventions)
        if each.phase in (here, Phase.ALL)
        and (each.span is None or each.span[0] <= position < each.span[1])
    )
    holding = [p for p in parts if p.start <= position and (p.end is None or position < p.end)]
    assert [p.active for p in holding] == ([expected] if expected else [])
