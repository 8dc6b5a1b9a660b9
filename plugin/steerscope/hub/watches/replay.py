"""One request, exactly: all that is known of it, from the first token or a cursor on.

What has been sent is told by how far each pass of each completion was read, so nothing is
kept for a consumer but that; the values are read from the ledger's tracks when they are sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from steerscope.hub.refusals import CursorLostError
from steerscope.hub.watches.chunks import Chunk, Run, of_track, runs_of, tokens_per_message
from steerscope.hub.watches.cursors import Reached, RequestCursor, decode, encode
from steerscope.telemetry.columns import Columns
from steerscope.telemetry.requests import RequestLedger
from steerscope.telemetry.tracks import Pass, RequestTrack


class Portion(NamedTuple):
    """Some tokens of one completion, as runs; ``cursor`` says where they end."""

    chunk: Chunk
    runs: list[Run]
    cursor: str


@dataclass(slots=True)
class _Progress:
    """How far one completion has been read: one past the last position, of each pass."""

    track: RequestTrack
    stops: list[int]
    told_end: bool = False

    def unread(self) -> tuple[int, Pass] | None:
        """The first pass that has more, and its place."""
        passes = self.track.passes
        self.stops += [each.first for each in passes[len(self.stops) :]]
        at_stop = zip(passes, self.stops, strict=True)
        return next(((i, p) for i, (p, stop) in enumerate(at_stop) if stop < p.stop), None)

    @property
    def has_news(self) -> bool:
        """Whether there is something to tell."""
        return not self.told_end and (self.track.finished or self.unread() is not None)


class Replay:
    """What one consumer has got of one request. Also follows it while it runs."""

    def __init__(
        self,
        external_id: str,
        hub: str,
        ledger: RequestLedger,
        columns: Columns,
        wanted: frozenset[str],
    ) -> None:
        self._external_id = external_id
        self._hub = hub
        self._ledger = ledger
        self._named: list[dict[int, str]] = [{} for _ in columns.site_names]
        """The features wanted of each site, by column."""
        for column, name in enumerate(columns.features):
            if name in wanted:
                self._named[columns.site_of[column]][column] = name
        self._max_tokens = tokens_per_message(columns)
        self._progress: dict[int, _Progress] = {}

    def resume(self, cursor: str) -> None:
        """Go on after what ``cursor`` says was received.

        Raises:
            SpecError: it is not a cursor of one request.
            CursorLostError: it is of another hub or request, or what follows is forgotten.
        """
        known = decode(cursor, RequestCursor)
        if known.hub != self._hub:
            raise CursorLostError("the cursor is of another hub, or of one that was restarted")
        tracks = {track.serial: track for track in self._ledger.report(self._external_id)}
        if not tracks:
            raise CursorLostError("the hub does not know the request, or has forgotten it")
        for reached in known.completions:
            self._take_up(reached, tracks.get(reached.serial))

    def is_known(self) -> bool:
        """Whether any of the request has been seen."""
        self._meet()
        return bool(self._progress)

    def is_over(self) -> bool:
        """Whether the end of every completion seen so far was told."""
        self._meet()
        return all(progress.told_end for progress in self._progress.values())

    def may_go_on(self) -> bool:
        """Whether there is something to tell, or nothing will follow."""
        return self._has_news() or self.is_over()

    def portions(self) -> Iterator[Portion]:
        """All that there is to tell now, also what comes while it is told.

        Raises:
            CursorLostError: the hub forgot a completion before it heard of its end.
        """
        while self._has_news():
            for progress in list(self._progress.values()):
                if progress.has_news:
                    portion = self._next(progress)
                    if portion.runs or portion.chunk.is_finished:
                        yield portion
            if lost := self._lost():
                raise CursorLostError(f"{lost[0]}: its end was never heard of; it is forgotten")

    def _has_news(self) -> bool:
        self._meet()
        return bool(self._lost()) or any(p.has_news for p in self._progress.values())

    def _next(self, progress: _Progress) -> Portion:
        track, runs = progress.track, list[Run]()
        if (unread := progress.unread()) is not None:
            place, some = unread
            first = progress.stops[place]
            stop = min(some.stop, first + self._max_tokens)
            runs = list(self._runs(track, some, first, stop))
            progress.stops[place] = stop
        progress.told_end = track.finished and progress.unread() is None
        chunk = of_track(track)._replace(is_finished=progress.told_end)
        return Portion(chunk, runs, self._cursor())

    def _runs(self, track: RequestTrack, some: Pass, first: int, stop: int) -> Iterator[Run]:
        deltas = track.steered.deltas if track.steered.num_tokens else None
        for site in range(some.sites.start, some.sites.stop):
            if named := self._named[site]:
                spans = track.spans(site, first, stop)
                yield from runs_of(named, spans, track.activations(), deltas)

    def _meet(self) -> None:
        """Take note of completions that have begun since."""
        for track in self._ledger.report(self._external_id):
            if track.serial not in self._progress:
                self._progress[track.serial] = _Progress(track, [])

    def _lost(self) -> list[str]:
        """The completions that the ledger has forgotten before they ended."""
        running = [p.track for p in self._progress.values() if not p.track.finished]
        known = {track.serial for track in self._ledger.report(self._external_id)}
        return [track.start.request_id for track in running if track.serial not in known]

    def _take_up(self, reached: Reached, track: RequestTrack | None) -> None:
        if track is None:
            if reached.is_finished:
                return
            raise CursorLostError("the hub does not know the completion, or has forgotten it")
        stops = list(reached.stops)
        if len(stops) > len(track.passes) or not _are_past(stops, track.passes):
            raise CursorLostError("the cursor is of tokens that have not been computed")
        if reached.is_finished and not track.finished:
            raise CursorLostError("the cursor is of an end that has not happened")
        self._progress[track.serial] = _Progress(track, stops, reached.is_finished)

    def _cursor(self) -> str:
        completions = (
            Reached(serial, tuple(p.stops), p.told_end) for serial, p in self._progress.items()
        )
        return encode(RequestCursor(self._hub, tuple(completions)))


def _are_past(stops: Iterable[int], passes: Iterable[Pass]) -> bool:
    return all(p.first <= stop <= p.stop for stop, p in zip(stops, passes, strict=False))
