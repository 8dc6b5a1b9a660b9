"""A wrong expression fails while it is written."""

import pytest
from steerscope.export import instruments as names
from steerscope_dashboards import promql
from steerscope_dashboards.promql import ExpressionError, equals, none_of


def test_a_label_that_the_instrument_lacks_is_refused():
    with pytest.raises(ExpressionError, match="has no label feature"):
        promql.rate(names.FRAMES, "5m", equals("feature", "known"))


def test_grouping_by_a_label_that_was_summed_away_is_refused():
    with pytest.raises(ExpressionError, match="no label engine"):
        promql.rate(names.FRAMES, "5m").sum("model_name").sum("engine")


def test_a_gauge_has_no_rate_and_a_counter_no_buckets():
    with pytest.raises(ExpressionError, match="is a gauge, not a counter"):
        promql.rate(names.ENGINE_LAST_SEEN, "5m")
    with pytest.raises(ExpressionError, match="is a counter, not a histogram"):
        promql.buckets(names.FRAMES, "5m")


def test_a_threshold_between_bucket_bounds_is_refused():
    with pytest.raises(ExpressionError, match=r"0\.85 is not a bucket bound"):
        promql.above(names.SIGNAL_SCORE, 0.85, "5m", by=("signal",))


def test_quotients_of_vectors_that_cannot_match_are_refused():
    frames = promql.rate(names.FRAMES, "5m")
    with pytest.raises(ExpressionError, match="/"):
        frames.sum("model_name").over(frames.sum("engine"))


def test_expressions_read_as_one_would_write_them():
    lost = promql.increase(names.FRAMES_DROPPED, "10m", none_of("reason", "not_sent")).sum()
    assert str(lost) == 'sum (increase(steerscope_frames_dropped_total{reason!~"not_sent"}[10m]))'
    late = promql.above(names.READOUT_LAG, 1.0, "5m", by=("engine",))
    assert str(late) == (
        '1 - (sum by (engine) (rate(steerscope_readout_lag_seconds_bucket{le="1.0"}[5m]))'
        " / sum by (engine) (rate(steerscope_readout_lag_seconds_count[5m])))"
    )


def test_ages_and_floors_read_as_one_would_write_them():
    ago = promql.age(names.CANARY_LAST_SUCCESS).min("canary").at_most(1200)
    assert str(ago) == (
        "clamp_max(min by (canary) (time() - steerscope_canary_last_success_timestamp_seconds), "
        "1200)"
    )
    index = promql.current(names.FEATURE_DRIFT_PSI)
    judged = index.given(promql.current(names.FEATURE_DRIFT_TOKENS), 2000).above(0.25).sum()
    assert str(judged) == (
        "sum (((steerscope_feature_drift_psi and steerscope_feature_drift_tokens >= 2000)"
        " > bool 0.25))"
    )


def test_a_floor_of_other_labels_is_refused():
    with pytest.raises(ExpressionError, match=" and "):
        promql.current(names.FEATURE_DRIFT_PSI).given(promql.current(names.CANARY_SCORE), 1)


def test_a_value_cannot_end_its_quotes():
    assert str(equals("signal", 'a"} or up{x="')) == r'signal="a\"} or up{x=\""'
