"""Reads a request's report, waiting for it if need be; behind both gRPC and HTTP."""

from __future__ import annotations

from steerscope.api.v1 import telemetry_pb2 as pb
from steerscope.hub import reports
from steerscope.hub.refusals import RefusalError, RefusalReason
from steerscope.hub.watch import Watch
from steerscope.telemetry.requests import RequestLedger


class ReportReader:
    """Reads the ledger on the loop that feeds it."""

    def __init__(self, ledger: RequestLedger, watch: Watch, catalog_digest: str) -> None:
        self._ledger = ledger
        self._watch = watch
        self._catalog_digest = catalog_digest

    async def read(self, external_id: str, wait_seconds: float) -> pb.RequestReport:
        """The report once the request has finished, or as it is when time is up.

        Raises ``RefusalError`` when the request is not known then.
        """
        tracks = self._ledger.report(external_id)
        if wait_seconds > 0.0 and not (tracks and all(track.finished for track in tracks)):
            tracks = await self._watch.wait_finished(external_id, self._ledger.report, wait_seconds)
        if not tracks:
            raise RefusalError(
                RefusalReason.REQUEST_NOT_FOUND,
                f"requests/{external_id}",
                "no such request, or its report has expired",
            )
        return reports.report(tracks, self._catalog_digest)
