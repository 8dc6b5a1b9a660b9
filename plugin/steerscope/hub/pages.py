"""What is told over HTTP: metrics and reports, on the hub's own port and through front ends."""

from __future__ import annotations

import asyncio

import msgspec
from google.protobuf.json_format import MessageToDict

from steerscope.api.v1 import telemetry_pb2
from steerscope.catalog.model import ModelMatch
from steerscope.catalog.store import Catalog
from steerscope.export.exposition import MetricsPage
from steerscope.hub.conversions import report_message
from steerscope.hub.watches.waiters import Waiters
from steerscope.telemetry.asked import AskedLog
from steerscope.telemetry.requests import RequestLedger


class HubPages:
    """Reads the hub's state; changes nothing. On the hub's loop."""

    def __init__(
        self,
        catalog: Catalog,
        ledger: RequestLedger,
        asked: AskedLog,
        waiters: Waiters,
        page: MetricsPage,
        model_match: ModelMatch,
    ) -> None:
        self._catalog = catalog
        self._ledger = ledger
        self._asked = asked
        self._waiters = waiters
        self._page = page
        self._model_match = model_match

    async def finished(
        self, external_id: str, wait_seconds: float = 0.0, *, activations: bool = True
    ) -> telemetry_pb2.RequestReport | None:
        """A request's report, once it has ended or time is up; None for an unknown one."""
        if wait_seconds > 0.0:
            await self._waiters.until(
                external_id, lambda: self._has_finished(external_id), wait_seconds
            )
        tracks = self._ledger.report(external_id)
        if not tracks:
            return None
        asked = self._asked.digest(external_id)
        return report_message(
            external_id, tracks, self._catalog, asked, self._model_match, features=activations
        )

    async def report(
        self, external_id: str, wait_seconds: float, activations: bool
    ) -> bytes | None:
        """The same as JSON.

        Made in a thread: a quarter of a million activations take most of a second.
        """
        found = await self.finished(external_id, wait_seconds, activations=activations)
        return None if found is None else await asyncio.to_thread(_json, found)

    def metrics(self, accept: str) -> bytes:
        """The metrics page, in a format that the HTTP header ``accept`` names."""
        return self._page.text(accept)

    def _has_finished(self, external_id: str) -> bool:
        tracks = self._ledger.report(external_id)
        return bool(tracks) and all(track.finished for track in tracks)


def _json(report: telemetry_pb2.RequestReport) -> bytes:
    """With every field spelled out."""
    tree = MessageToDict(
        report, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return msgspec.json.encode(tree)
