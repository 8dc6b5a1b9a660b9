"""What a request may bring: the JSON spec, vLLM's extra arguments, and the stamp made of them.

Each target takes the bytes of one boundary and says whether they were accepted. Any exception
but the documented refusal, and anything accepted that should not be, is a failure.
"""

from __future__ import annotations

import functools
import json
import math
from itertools import pairwise

import msgspec
from fuzz_world import SETTINGS, catalog, folder, policies, refused
from steerscope.config import Settings
from steerscope.errors import SpecError
from steerscope.hub.link import FrontendLink
from steerscope.hub.protocol import Policies
from steerscope.steering import segments, stamp
from steerscope.steering.admission import STEERING_KEY
from steerscope.steering.frontend import FrontEnd
from steerscope.steering.interventions import (
    Intervention,
    SteeringSpec,
    canonical_json,
    check_spec,
    parse_spec,
    steering_digest,
)

PROMPT_LENGTHS = (0, 1, 5, 64, 100_000)


def spec(data: bytes) -> bool:
    """The inline JSON spec, then what admission makes of it."""
    try:
        asked = parse_spec(data.decode("utf-8", "surrogateescape"))
        catalog().check(asked)
    except SpecError as error:
        return refused(error)
    check_effects(asked)
    return True


def check_effects(asked: SteeringSpec) -> None:
    """An accepted spec has finite numbers, and segments that a worker can follow."""
    edits = asked.interventions
    check_spec(asked)
    for edit in edits:
        assert math.isfinite(edit.value)
    assert asked.max_dose is None or math.isfinite(asked.max_dose)
    assert msgspec.json.decode(canonical_json(edits), type=tuple[Intervention, ...]) == edits
    digest = steering_digest(catalog().digest, edits, asked.max_dose)
    for length in PROMPT_LENGTHS:
        parts = segments.build(catalog().digest, edits, length, asked.max_dose)
        check_segments(parts, len(edits))
        made = stamp.Stamp("id", "inline", digest, edits, parts, asked.max_dose)
        assert stamp.decode(stamp.encode(made)) == made
        assert segments.salt(parts, 0, 16) is None or parts
        later = made.changed(length + 3, "inline", asked, catalog().digest, length)
        check_segments(later.segments, 2 * len(edits))
        assert later.current == edits


def check_segments(parts: tuple[segments.Segment, ...], num_edits: int) -> None:
    """In order, apart, none empty, and every index there."""
    for part in parts:
        assert part.end is None or part.start < part.end
        assert part.active
        assert all(0 <= i < num_edits for i in part.active)
    for before, after in pairwise(parts):
        assert before.end is not None
        assert before.end <= after.start


@functools.cache
def front_end() -> FrontEnd:
    """A front end that has policies; what it tells the hub is kept in a bounded queue."""
    link = FrontendLink(str(folder()), catalog().digest)
    link._take(Policies(1, tuple(policies().values())))
    settings = Settings(catalog=str(catalog().folder), steering=SETTINGS)
    return FrontEnd(catalog(), settings, link)


def admission(data: bytes) -> bool:
    """``vllm_xargs`` as a client sends them, up to the bytes that travel with the request."""
    try:
        extra_args = json.loads(data.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return False
    if not isinstance(extra_args, dict):
        extra_args = {STEERING_KEY: extra_args}
    try:
        asked = front_end().resolve("id", extra_args)
        payloads = [front_end().stamp("id", asked, length) for length in PROMPT_LENGTHS]
    except SpecError as error:
        return refused(error)
    for payload in payloads:
        assert stamp.decode(payload).external_id == "id"
    if asked is not None:
        check_effects(asked.spec)
    return asked is not None


def stamps(data: bytes) -> bool:
    """A stamp's bytes, as scheduler and workers read them. Only our own front ends write them."""
    try:
        made = stamp.decode.__wrapped__(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    segments.salt(made.segments, 0, 16)
    stamp.encode(made)
    return True
