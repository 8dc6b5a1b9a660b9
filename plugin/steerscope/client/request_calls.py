"""The calls about requests: steering them while they run, and what was seen of them."""

from __future__ import annotations

from collections.abc import Iterable

from steerscope.api.v1 import steering_pb2, telemetry_pb2
from steerscope.client.call import Call, Watching, duration
from steerscope.client.policy_calls import Edit, messages
from steerscope.hub.conversions import POLICIES, REQUESTS

EVERY_REQUEST = "-"


def steer_request(
    request_id: str,
    *,
    policy: str = "",
    interventions: Iterable[Edit] = (),
    max_dose: float | None = None,
    ttl: float | None = None,
    validate_only: bool = False,
    timeout: float | None = None,
) -> Call[steering_pb2.SteerRequestResponse]:
    """Steer a request from its next token on, or one that will come from its first.

    It is never repeated by itself: the request would be steered anew, at another token.

    Args:
        request_id: the external id, e.g. ``chatcmpl-…``.
        policy: a policy's plain name; either it or ``interventions``.
        interventions: the edits.
        max_dose: caps the dose of every token; only with ``interventions``.
        ttl: seconds to wait for a request that has not arrived; None for a minute.
        validate_only: check everything, change nothing.
        timeout: seconds that the call may take.
    """
    edits = list(interventions)
    request = steering_pb2.SteerRequestRequest(
        name=REQUESTS + request_id,
        policy=POLICIES + policy if policy else "",
        interventions=messages(edits) if edits else (),
        max_dose=max_dose,
        ttl=None if ttl is None else duration(ttl),
        validate_only=validate_only,
    )
    return Call(
        rpc="SteerRequest",
        request=request,
        read=lambda answer: answer,
        is_repeatable=validate_only,
        timeout=timeout,
    )


def release_request(
    request_id: str, *, timeout: float | None = None
) -> Call[list[steering_pb2.SteeredSequence]]:
    """End a request's steering from its next token on; where each sequence is free."""
    return Call(
        rpc="ReleaseRequest",
        request=steering_pb2.ReleaseRequestRequest(name=REQUESTS + request_id),
        read=lambda answer: list(answer.sequences),
        is_repeatable=False,
        timeout=timeout,
    )


def get_request_report(
    request_id: str, *, wait: float = 0.0, timeout: float | None = None
) -> Call[telemetry_pb2.RequestReport]:
    """What is known of a request, by the id in its response; waits for its end if asked.

    Args:
        request_id: the external id, e.g. ``chatcmpl-…``.
        wait: seconds to wait for the request to appear and finish, at most 30.
        timeout: seconds that the call may take beside the wait.
    """
    return Call(
        rpc="GetRequestReport",
        request=telemetry_pb2.GetRequestReportRequest(
            name=REQUESTS + request_id, wait=duration(wait)
        ),
        read=lambda answer: answer.report,
        is_repeatable=True,
        timeout=timeout,
        hub_waits=wait,
    )


def watch_requests(*, cursor: str = "") -> Watching[telemetry_pb2.WatchRequestsResponse]:
    """An event whenever a completion starts or finishes.

    Args:
        cursor: of the last event that was received, to go on after it; empty for from now on.
    """
    return Watching(
        rpc="WatchRequests",
        request=telemetry_pb2.WatchRequestsRequest(cursor=cursor),
        event=telemetry_pb2.WatchRequestsResponse,
    )


def watch_signals(
    signals: Iterable[str] = (), labels: Iterable[str] = (), *, cursor: str = ""
) -> Watching[telemetry_pb2.WatchSignalsResponse]:
    """The scores of every completion that finishes.

    Args:
        signals: plain names of those wanted; none for all.
        labels: bands wanted, e.g. ``high``; none for all.
        cursor: as in ``watch_requests``.
    """
    return Watching(
        rpc="WatchSignals",
        request=telemetry_pb2.WatchSignalsRequest(
            signals=list(signals), labels=list(labels), cursor=cursor
        ),
        event=telemetry_pb2.WatchSignalsResponse,
    )


def watch_activations(
    request_id: str = EVERY_REQUEST,
    features: Iterable[str] = (),
    *,
    ttl: float | None = None,
    cursor: str = "",
) -> Watching[telemetry_pb2.WatchActivationsResponse]:
    """Activations as tokens are computed; of one request all of them, until it ends.

    Args:
        request_id: the external id, e.g. ``chatcmpl-…``; left out for all requests.
        features: plain names of those wanted; none for all.
        ttl: seconds to wait for a request that has not arrived; None for a minute.
        cursor: as in ``watch_requests``; empty for from the request's first token.
    """
    return Watching(
        rpc="WatchActivations",
        request=telemetry_pb2.WatchActivationsRequest(
            name=REQUESTS + request_id,
            features=list(features),
            cursor=cursor,
            ttl=None if ttl is None else duration(ttl),
        ),
        event=telemetry_pb2.WatchActivationsResponse,
        has_beginning=request_id != EVERY_REQUEST,
    )
