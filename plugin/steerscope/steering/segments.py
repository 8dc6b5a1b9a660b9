"""From phases and spans to position ranges: which edits hold at which token.

A request's tokens fall into segments ``[start, end)`` within which the set of
edits does not change. A segment's digest names that effective steering: equal
digests share a steering row in the worker and, over the same tokens, KV blocks
in the prefix cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import msgspec

from steerscope.steering.interventions import Intervention, Phase, digest, steering_digest


class Segment(msgspec.Struct, frozen=True, array_like=True):
    """Tokens ``[start, end)`` (``end`` None: to the request's end) under the edits ``active``."""

    start: int
    end: int | None
    digest: str
    active: tuple[int, ...]
    """Indices into the request's interventions."""
    max_dose: float | None = None


def build(
    catalog_digest: str,
    interventions: tuple[Intervention, ...],
    num_prompt_tokens: int,
    max_dose: float | None = None,
) -> tuple[Segment, ...]:
    """Split a request into segments, in order, leaving out the unsteered ones."""
    cuts = sorted(
        {0, num_prompt_tokens, *(edge for i in interventions if i.span for edge in i.span)}
    )
    ranges = zip(cuts, [*cuts[1:], None], strict=True)
    pieces = [
        (start, end, _active(interventions, start, num_prompt_tokens)) for start, end in ranges
    ]
    return tuple(
        Segment(
            start, end, _digest(catalog_digest, interventions, active, max_dose), active, max_dose
        )
        for start, end, active in _merge(pieces)
        if active
    )


def changed_from(
    before: tuple[Segment, ...], after: tuple[Segment, ...], position: int, offset: int
) -> tuple[Segment, ...]:
    """``before`` up to ``position``, ``after`` from there on: steering changed in flight.

    ``offset`` is added to the indices of ``after``, whose interventions follow the others.
    """
    kept = [
        msgspec.structs.replace(s, end=position if s.end is None else min(s.end, position))
        for s in before
        if s.start < position
    ]
    taken = [
        msgspec.structs.replace(
            s, start=max(s.start, position), active=tuple(i + offset for i in s.active)
        )
        for s in after
        if s.end is None or s.end > position
    ]
    return (*kept, *taken)


def salt(segments: Iterable[Segment], start: int, end: int) -> str | None:
    """What steering adds to the identity of the KV block over tokens ``[start, end)``.

    None where no token of the block is steered. The positions enter clipped to
    the block, so that equal steering of equal tokens shares and nothing else does.
    """
    parts = [
        f"{max(s.start, start)}-{end if s.end is None else min(s.end, end)}:{s.digest}"
        for s in segments
        if s.start < end and (s.end is None or s.end > start)
    ]
    return digest(*(part.encode() for part in parts)) if parts else None


def _active(
    interventions: tuple[Intervention, ...], position: int, num_prompt_tokens: int
) -> tuple[int, ...]:
    here = Phase.PROMPT if position < num_prompt_tokens else Phase.GENERATION
    return tuple(
        i
        for i, intervention in enumerate(interventions)
        if intervention.phase in (here, Phase.ALL)
        and (intervention.span is None or intervention.span[0] <= position < intervention.span[1])
    )


_Piece = tuple[int, int | None, tuple[int, ...]]


def _merge(pieces: list[_Piece]) -> list[_Piece]:
    merged: list[_Piece] = []
    for start, end, active in pieces:
        if merged and merged[-1][2] == active:
            merged[-1] = (merged[-1][0], end, active)
        else:
            merged.append((start, end, active))
    return merged


@lru_cache(maxsize=4096)
def _digest(
    catalog_digest: str,
    interventions: tuple[Intervention, ...],
    active: tuple[int, ...],
    max_dose: float | None,
) -> str:
    """Phase and span say where, not what: they are left out of the identity."""
    edits = [msgspec.structs.replace(interventions[i], phase=Phase.ALL, span=None) for i in active]
    edits.sort(key=lambda edit: edit.feature)
    return steering_digest(catalog_digest, tuple(edits), max_dose)
