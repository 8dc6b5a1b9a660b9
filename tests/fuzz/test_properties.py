"""What holds for every input of a kind, on inputs that hypothesis makes."""

from __future__ import annotations

import json
import math
import random

import fuzz_steering
import fuzz_trees
import msgspec
import numpy as np
import pytest
import yaml
from fuzz_targets import TARGETS, seeds
from fuzz_world import SETTINGS, catalog
from hypothesis import given, settings
from hypothesis import strategies as st
from steerscope import yamltext
from steerscope.errors import SpecError
from steerscope.hub.conversions import intervention_message, interventions
from steerscope.hub.filters import feature_filter
from steerscope.steering import segments
from steerscope.steering.admission import Admission
from steerscope.steering.interventions import parse_spec
from steerscope.telemetry import frames

pytestmark = pytest.mark.timeout(60)

fixed = settings(derandomize=True, deadline=None, max_examples=150, database=None)
"""The same examples in every run."""

NUMBERS = st.floats(allow_nan=False, allow_infinity=False, width=32)
ANY_NUMBER = st.one_of(st.floats(), st.integers(-(2**70), 2**70), st.none(), st.booleans())
POSITIONS = st.integers(0, 200)

SPANS = st.tuples(POSITIONS, POSITIONS).filter(lambda span: span[0] < span[1])
GATES = st.fixed_dictionaries({"feature": st.just("unknown"), "above": NUMBERS})
OPERATIONS = st.one_of(
    st.sampled_from(("clamp", "at_least", "at_most", "scale", "add")).flatmap(
        lambda op: st.fixed_dictionaries({op: NUMBERS})
    ),
    st.just({"ablate": True}),
)
WHERE = st.fixed_dictionaries(
    {},
    optional={
        "phase": st.sampled_from(("prompt", "generation", "all")),
        "span": SPANS,
        "only_if_active": st.booleans(),
        "when": GATES,
    },
)
EDITS = st.builds(
    lambda feature, operation, where: {"feature": feature} | operation | where,
    st.sampled_from(("known", "unknown")),
    OPERATIONS,
    WHERE,
)
SPECS = st.fixed_dictionaries(
    {"interventions": st.lists(EDITS, min_size=1, max_size=5)},
    optional={"max_dose": st.floats(0.001, 2.0)},
)
"""Valid but for edits of one feature that meet."""

TREES = st.recursive(
    st.one_of(ANY_NUMBER, st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


def parsed(tree):
    """The spec of a tree, or None if two of its edits meet at a token."""
    try:
        return parse_spec(json.dumps(tree))
    except SpecError as error:
        if "already edited" not in error.reason:
            raise
        return None


@fixed
@given(SPECS)
def test_a_well_formed_spec_has_finite_effects_in_segments_that_partition_the_request(tree):
    if (spec := parsed(tree)) is not None:
        fuzz_steering.check_effects(spec)


@fixed
@given(SPECS, POSITIONS, POSITIONS)
def test_a_token_is_steered_by_just_the_edits_whose_phase_and_span_cover_it(tree, length, at):
    if (spec := parsed(tree)) is None:
        return
    parts = segments.build(catalog().digest, spec.interventions, length)
    here = [s for s in parts if s.start <= at and (s.end is None or at < s.end)]
    phase = "prompt" if at < length else "generation"
    wanted = {
        i
        for i, edit in enumerate(spec.interventions)
        if edit.phase in (phase, "all") and (edit.span is None or edit.span[0] <= at < edit.span[1])
    }
    assert {i for s in here for i in s.active} == wanted
    assert len(here) == bool(wanted)


@fixed
@given(SPECS)
def test_edits_are_the_same_after_the_way_through_protobuf(tree):
    if (spec := parsed(tree)) is not None:
        messages = [intervention_message(edit) for edit in spec.interventions]
        sent = [type(m).FromString(m.SerializeToString()) for m in messages]
        assert interventions(sent) == spec.interventions


@fixed
@given(
    st.lists(st.fixed_dictionaries({"feature": st.just("known"), "add": ANY_NUMBER}), max_size=3)
)
def test_no_number_that_is_not_finite_is_in_an_accepted_spec(edits):
    try:
        spec = parse_spec(json.dumps({"interventions": edits}))
    except SpecError:
        return
    assert all(math.isfinite(edit.value) for edit in spec.interventions)


@fixed
@given(TREES)
def test_any_flag_is_resolved_or_refused_with_a_field(tree):
    admission = Admission(catalog(), SETTINGS, dict)
    for flag in (tree, json.dumps(tree), json.dumps({"interventions": tree})):
        with pytest.raises(SpecError) as caught:
            admission.resolve({"steering": flag})
        assert caught.value.field.startswith("steering")


@fixed
@given(st.text(max_size=60))
def test_any_filter_is_understood_or_refused_as_the_filter(text):
    try:
        wanted = feature_filter(text, catalog())
    except SpecError as error:
        field = error.field
    else:
        field = "filter"
        assert {wanted(feature) for feature in catalog().document.features} <= {True, False}
    assert field == "filter"


@fixed
@given(TREES)
def test_yaml_without_aliases_is_read_as_pyyaml_reads_it(tree):
    text = yaml.safe_dump(tree, allow_unicode=True).encode()
    assert repr(yamltext.read(text)) == repr(yaml.safe_load(text))


@pytest.mark.parametrize("depth", [yamltext.MAX_DEPTH, yamltext.MAX_DEPTH + 1, 100_000])
@pytest.mark.parametrize("form", ["flow", "block"])
def test_yaml_is_read_to_its_greatest_depth_and_no_further(depth, form):
    text = "[" * depth + "]" * depth if form == "flow" else "- " * depth + "x"
    if depth <= yamltext.MAX_DEPTH:
        assert yamltext.read(text.encode())
    else:
        with pytest.raises(ValueError, match="within each other"):
            yamltext.read(text.encode())


@fixed
@given(st.integers(1, 5), st.integers(1, 3), st.data())
def test_a_frame_is_the_same_after_the_wire_and_a_cut_one_is_refused(num_tokens, width, data):
    acts = data.draw(st.lists(NUMBERS, min_size=num_tokens * width, max_size=num_tokens * width))
    site = frames.SiteActivations("s", width, np.array(acts, np.float32).tobytes())
    made = frames.Frame(
        version=frames.FRAME_VERSION, catalog_digest="d", model_name="m", engine="0", rank=0,
        step=0, monotonic_ns=1, overhead_ns=(0,), dropped=0, dropped_tokens=0, started=(),
        finished=(), changed=(), request_ids=("r",), query_start_loc=(0, num_tokens),
        positions=(0,), sites=(site,),
    )  # fmt: skip
    payload = frames.encode(made)
    assert frames.decode(payload) == made
    cut = payload[: data.draw(st.integers(0, len(payload) - 1))]
    with pytest.raises((msgspec.MsgspecError, ValueError)):
        frames.decode(cut)


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.codec])
def test_nearly_valid_inputs_are_accepted_or_refused_as_documented(name):
    target, rng = TARGETS[name], random.Random(name)
    for path in seeds(name):
        data = path.read_bytes()
        for _ in range(8):
            made = fuzz_trees.mutated(data, target.codec, [None, 1, "x", []], rng)
            if made is not None:
                target.run(made)
