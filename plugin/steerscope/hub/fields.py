"""Fields that requests of several kinds have, read or refused with ``SpecError``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from steerscope.errors import SpecError
from steerscope.hub.conversions import REQUESTS

DEFAULT_TTL_SECONDS = 60.0
MAX_TTL_SECONDS = 3600.0
MAX_ID_CHARACTERS = 256

Item = TypeVar("Item")


def plain_name(name: str, collection: str, field: str = "name") -> str:
    """``force-known`` of ``policies/force-known``; raises ``SpecError`` on anything else."""
    if not name.startswith(collection) or name == collection:
        raise SpecError(field, f"must be {collection}{{id}}, got {name[:80]!r}")
    return name.removeprefix(collection)


def id_of_request(name: str) -> str:
    """The client's id of a request, by its resource name; raises ``SpecError``."""
    found = plain_name(name, REQUESTS)
    if len(found) > MAX_ID_CHARACTERS or not found.isprintable():
        raise SpecError("name", f"an id is at most {MAX_ID_CHARACTERS} printable characters")
    return found


def ttl_of(request: Any) -> float:
    """The request's ``ttl``, or what its absence means; raises ``SpecError``."""
    if not request.HasField("ttl"):
        return DEFAULT_TTL_SECONDS
    seconds: float = request.ttl.seconds + request.ttl.nanos * 1e-9
    if not 0.0 < seconds <= MAX_TTL_SECONDS:
        raise SpecError("ttl", f"must be above 0 and at most {MAX_TTL_SECONDS:g} seconds")
    return seconds


def page(names: list[str], page_size: int, page_token: str) -> tuple[list[str], str]:
    """The page of sorted ``names`` after ``page_token``, and the token of the next one."""
    size = _page_size(page_size)
    later = [name for name in sorted(names) if name > page_token]
    return later[:size], later[size - 1] if len(later) > size else ""


def page_after(
    items: Sequence[Item], key: Callable[[Item], str], page_size: int, page_token: str
) -> tuple[Sequence[Item], str]:
    """The page of ``items``, in their order, after the one whose key is ``page_token``."""
    size, keys = _page_size(page_size), [key(item) for item in items]
    if page_token and page_token not in keys:
        raise SpecError("page_token", "what it stood for is gone; begin with the first page")
    later = items[keys.index(page_token) + 1 if page_token else 0 :]
    return later[:size], key(later[size - 1]) if len(later) > size else ""


def _page_size(asked: int) -> int:
    if asked < 0:
        raise SpecError("page_size", f"must not be negative, got {asked}")
    return min(asked or 50, 1000)
