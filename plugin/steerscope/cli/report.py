"""``steerscope report``: what was seen and done in one request, for people."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from steerscope.cli.connection import connected
from steerscope.cli.output import Format, clean, show, tree_of, word
from steerscope.cli.steering import plain_request

if TYPE_CHECKING:  # commands import what they need when they run
    from steerscope.api.v1 import catalog_pb2, telemetry_pb2

SPARK_WIDTH = 48
SPARKS = "▁▂▃▄▅▆▇█"
UNSEEN = "·"
MAX_WAIT_SECONDS = 30.0


def add_commands(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    options: argparse.ArgumentParser,
) -> None:
    """Add ``report`` to the main command."""
    parser = commands.add_parser(
        "report", help="what was seen and done in a request", parents=[options]
    )
    parser.add_argument("request", metavar="REQUEST", help="its id in the response")
    parser.add_argument(
        "--wait", type=_wait, default=0.0, metavar="S", help="for its end, at most 30"
    )
    parser.add_argument(
        "--feature", action="append", default=[], metavar="NAME", help="show these only"
    )
    parser.set_defaults(run=lambda arguments, _: _report(arguments))


def _wait(text: str) -> float:
    seconds = float(text)
    if not 0.0 <= seconds <= MAX_WAIT_SECONDS:
        raise argparse.ArgumentTypeError(f"must be from 0 to {MAX_WAIT_SECONDS:g}")
    return seconds


def _report(arguments: argparse.Namespace) -> int:
    with connected(arguments) as client:
        report = client.get_request_report(plain_request(arguments.request), wait=arguments.wait)
        if arguments.feature:
            _keep(report, arguments.feature)
        if arguments.output is not Format.TABLE:
            show(tree_of(report), arguments.output)
            return 0
        signals = client.get_catalog().signals
    for line in lines(report, signals):
        print(line)
    return 0


def _keep(report: telemetry_pb2.RequestReport, features: Sequence[str]) -> None:
    """Leave the other features out."""
    for completion in report.completions:
        kept = [track for track in completion.features if track.feature in features]
        del completion.features[:]
        completion.features.extend(kept)


def lines(
    report: telemetry_pb2.RequestReport, signals: Iterable[catalog_pb2.Signal]
) -> Iterator[str]:
    """The report as text; ``signals`` are those of the catalog, for their bands."""
    from steerscope.api.v1 import telemetry_pb2

    bands = {signal.name: _bands(signal.labels) for signal in signals}
    state = word(telemetry_pb2.RequestState, report.state)
    yield f"{clean(report.name)}  {state}"
    version, match = clean(report.catalog_version), clean(report.model_match)
    yield f"catalog {version} ({clean(report.catalog_digest[:12])}), model match {match}"
    for completion in report.completions:
        yield ""
        yield from _completion(completion, bands)


def _completion(completion: telemetry_pb2.Completion, bands: Mapping[str, str]) -> Iterator[str]:
    from steerscope.api.v1 import telemetry_pb2

    state = word(telemetry_pb2.RequestState, completion.state)
    yield f"completion {clean(completion.request_id)}  {state}"
    yield f"  model     {clean(completion.model_name)}, engine {clean(completion.engine)}"
    yield f"  tokens    {_coverage(completion)}"
    yield f"  steering  {_steering(completion)}"
    for score in completion.signals:
        value = f"{score.score:.3f}" if score.HasField("score") else "-"
        scale = f"  ({bands[score.signal]})" if bands.get(score.signal) else ""
        yield f"  signal    {clean(score.signal)}  {value}  {clean(score.label)}{scale}"
    for feature, tracks in _by_feature(completion.features).items():
        yield f"  feature   {_feature(feature, tracks)}"


def _coverage(completion: telemetry_pb2.Completion) -> str:
    from steerscope.api.v1 import telemetry_pb2

    parts = [
        f"prompt of {completion.num_prompt_tokens}",
        f"{completion.num_observed_tokens} observed",
    ]
    if completion.num_cached_tokens:
        parts.append(f"{completion.num_cached_tokens} of them from the cache")
    for missing in completion.unobserved:
        reason = word(telemetry_pb2.UnobservedReason, missing.reason)
        parts.append(f"{missing.num_tokens} not observed ({reason})")
    parts.append("complete" if completion.complete else "NOT COMPLETE")
    return ", ".join(parts)


def _steering(completion: telemetry_pb2.Completion) -> str:
    from steerscope.api.v1 import steering_pb2

    source = word(steering_pb2.SteeringSource, completion.steering_source)
    rule = f" {clean(completion.steering_rule)}" if completion.steering_rule else ""
    why = f" ({source}{rule})" if source else ""
    asked = clean(completion.asked_policy)
    instead = f", instead of {asked}" if asked else ""
    if not completion.HasField("steering"):
        return f"none{why}{instead}"
    parts = [f"{clean(completion.policy) or 'none'}{why}{instead}"]
    summary = completion.steering
    if summary.HasField("first_position"):
        where = f"{summary.first_position} to {summary.last_position}"
        dose = f"dose {summary.dose_mean:.3f} (at most {summary.dose_max:.3f})"
        parts.append(f"{summary.num_tokens} tokens changed, {where}, {dose}")
    else:
        parts.append("no token changed")
    if summary.HasField("changed_at"):
        parts.append(f"so since token {summary.changed_at}")
    return "; ".join(parts)


def _bands(labels: Iterable[catalog_pb2.Label]) -> str:
    """``low < 0.35 <= high``."""
    parts = []
    for band in labels:
        parts.append(clean(band.label))
        if band.HasField("below"):
            parts.append(f"< {band.below:g} <=")
    return " ".join(parts)


def _by_feature(
    tracks: Iterable[telemetry_pb2.FeatureTrack],
) -> dict[str, list[telemetry_pb2.FeatureTrack]]:
    found: dict[str, list[telemetry_pb2.FeatureTrack]] = {}
    for track in tracks:
        found.setdefault(track.feature, []).append(track)
    return found


def _feature(name: str, tracks: Sequence[telemetry_pb2.FeatureTrack]) -> str:
    values = [
        (track.first_position + i, value)
        for track in tracks
        for i, value in enumerate(track.activations)
    ]
    at, top = max(values, key=lambda pair: pair[1], default=(0, 0.0))
    changed = sum(delta != 0.0 for track in tracks for delta in track.deltas)
    note = f", {changed} edited" if changed else ""
    return f"{clean(name):<24} {spark(values)}  max {top:.3g} at token {at}{note}"


def spark(values: Sequence[tuple[int, float]], width: int = SPARK_WIDTH) -> str:
    """Values by position as a line of at most ``width`` signs; the largest of each stretch.

    The lowest sign is zero, or the least value if that is below; a dot is where nothing is known.
    """
    known = [(position, value) for position, value in values if math.isfinite(value)]
    if not known:
        return UNSEEN
    count = max(position for position, _ in values) + 1
    stretch = max(math.ceil(count / width), 1)
    tops: dict[int, float] = {}
    for position, value in known:
        column = position // stretch
        tops[column] = max(tops.get(column, value), value)
    low, high = min(0.0, *tops.values()), max(0.0, *tops.values())
    return "".join(
        _sign(tops[column], low, high) if column in tops else UNSEEN
        for column in range(math.ceil(count / stretch))
    )


def _sign(value: float, low: float, high: float) -> str:
    if high <= low:
        return SPARKS[0]
    return SPARKS[round((value - low) / (high - low) * (len(SPARKS) - 1))]
