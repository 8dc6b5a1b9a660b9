import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.trace import get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from steerscope.steering import stamp, traceparent
from steerscope.steering.interventions import Intervention, SteeringSpec
from steerscope.steering.stamp import Stamp
from steerscope.steering.traceparent import Traceparent

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADER = f"00-{TRACE}-{SPAN}-01"


def test_a_header_names_a_trace_a_span_and_whether_it_is_recorded():
    assert traceparent.parse(HEADER) == Traceparent(TRACE, SPAN, True)
    assert traceparent.parse(f"00-{TRACE}-{SPAN}-00") == Traceparent(TRACE, SPAN, False)
    assert traceparent.parse(f"00-{TRACE}-{SPAN}-03") == Traceparent(TRACE, SPAN, True)
    assert str(traceparent.parse(HEADER)) == HEADER


@pytest.mark.parametrize(
    "header",
    [
        "",
        "garbage",
        HEADER.upper(),
        HEADER + "-more",
        HEADER + "\n",
        HEADER[:-1],
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[:-1]}g-{SPAN}-01",
        f"00-{TRACE}-{SPAN}",
        f"01-{TRACE}-{SPAN}-01-" + "x" * 300,
    ],
)
def test_what_is_not_well_formed_is_no_header(header):
    assert traceparent.parse(header) is None


def test_a_later_version_is_read_as_far_as_it_is_known():
    assert traceparent.parse(f"cc-{TRACE}-{SPAN}-01-more") == Traceparent(TRACE, SPAN, True)


@given(
    st.one_of(
        st.text(max_size=60),
        st.from_regex(r"[0f][0f]-[0f]{32}-[0f]{16}-0[0-3](-x)?", fullmatch=True),
    )
)
def test_what_is_read_is_what_opentelemetry_reads(header):
    context = TraceContextTextMapPropagator().extract({"traceparent": header})
    theirs = get_current_span(context).get_span_context()
    ours = traceparent.parse(header)
    assert (ours is not None) == theirs.is_valid
    if ours is not None:
        assert int(ours.trace_id, 16) == theirs.trace_id
        assert int(ours.span_id, 16) == theirs.span_id
        assert ours.is_sampled == theirs.trace_flags.sampled


def test_what_vllm_was_told_goes_before_the_http_header():
    other = f"00-{TRACE}-{SPAN[::-1]}-01"
    shown = ((b"host", b"here"), (b"Traceparent", HEADER.encode()))
    assert traceparent.of_request(None, shown) == HEADER
    assert traceparent.of_request({"tracestate": "a=b"}, shown) == HEADER
    assert traceparent.of_request({"traceparent": other}, shown) == other
    assert traceparent.of_request({"traceparent": "garbage"}, shown) == ""


def test_two_headers_are_none():
    shown = ((b"traceparent", HEADER.encode()),) * 2
    assert traceparent.of_request(None, shown) == ""
    assert traceparent.of_request(None, ()) == ""


def test_bytes_that_are_no_text_are_no_header():
    assert traceparent.of_request(None, ((b"traceparent", b"\xff\xfe"),)) == ""


def test_the_trace_stays_with_a_request_whose_steering_changes():
    before = stamp.decode(stamp.encode(Stamp("a", traceparent=HEADER)))
    assert before.traceparent == HEADER
    spec = SteeringSpec(interventions=(Intervention(feature="known", clamp=6.0),))
    assert before.changed(3, "force-known", spec, "d", 10).traceparent == HEADER
