"""W3C trace context: which trace of the client's a request belongs to.

    00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01
    version, trace, the client's span, flags (1: the trace is recorded)

vLLM makes its own request span a child of the same header, but only when the request ends; so it
is the client's span that is known here, and the trace is the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from steerscope.steering.exchange import Headers

HEADER = "traceparent"

_PATTERN = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.{0,200})?"
)
_SAMPLED = 1


class Traceparent(NamedTuple):
    """A span of the client's."""

    trace_id: str
    span_id: str
    is_sampled: bool
    """Whether the client records the trace: if not, there is none to be looked up."""

    def __str__(self) -> str:
        """The header, in the version known here."""
        return f"00-{self.trace_id}-{self.span_id}-{int(self.is_sampled):02x}"


def parse(header: str) -> Traceparent | None:
    """The span that the header names, or None if it is not well formed.

    A version later than the one known here may have more after it.
    """
    match = _PATTERN.fullmatch(header.strip(" \t"))
    if match is None or (match[1] == "00" and match[5]):
        return None
    return Traceparent(match[2], match[3], bool(int(match[4], 16) & _SAMPLED))


def of_request(given: Mapping[str, str] | None, shown: Headers) -> str:
    """What travels with a request: the header as ``parse`` reads it, or empty.

    ``given`` is what vLLM itself was told, and passes on only where it traces; ``shown`` are the
    headers of the HTTP request, of which more than one is none.
    """
    if given is not None and HEADER in given:
        headers = [given[HEADER]]
    else:
        name = HEADER.encode()
        headers = [value.decode("latin-1") for key, value in shown if key.lower() == name]
    found = parse(headers[0]) if len(headers) == 1 else None
    return "" if found is None else str(found)
