"""What the lab reads: files of cases, and requirements on a report."""

from __future__ import annotations

import math

from fuzz_world import refused, written
from steerscope.errors import LabError
from steerscope.lab import cases as lab_cases
from steerscope.lab import requirements as lab_requirements

REPORT = {
    "known": {"auroc": {"value": 0.9, "low": 0.8, "high": 1.0}, "fpr": None, "n": 3},
    "undefined": {"x": "no case"},
    "x": None,
    "nan": math.nan,
}


def cases(data: bytes) -> bool:
    """A file of cases, and what is drawn from it."""
    try:
        found = lab_cases.load(written("cases.jsonl", data))
        lab_cases.check_held_out(found)
        lab_cases.check_apart(found[:1], found[1:])
    except LabError as error:
        return refused(error)
    assert len(lab_cases.digest(found)) == 64
    assert sum(lab_cases.counts(found).values()) == len(found)
    assert lab_cases.load(written("again.jsonl", lab_cases.dump(found))) == found
    return True


def requirements(data: bytes) -> bool:
    """A requirement as someone types it."""
    try:
        asked = lab_requirements.parse(data.decode("utf-8", "surrogateescape"))
        assert math.isfinite(asked.bound)
        lab_requirements.check([asked], REPORT)
    except LabError as error:
        return refused(error)
    return True
