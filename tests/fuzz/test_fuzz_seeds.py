"""Every seed: the valid ones are accepted, the others refused as documented, all of them fast."""

from __future__ import annotations

import time

import pytest
from fuzz_targets import MAX_SEED_BYTES, TARGETS, seeds

pytestmark = pytest.mark.timeout(60)

MAX_CPU_SECONDS = 1.0

SEEDS = [(name, path) for name in TARGETS for path in seeds(name)]


@pytest.mark.parametrize(("name", "path"), SEEDS, ids=[f"{n}/{p.name}" for n, p in SEEDS])
def test_a_seed_is_accepted_or_refused_as_its_name_says_and_fast(name, path):
    data = path.read_bytes()
    assert len(data) <= MAX_SEED_BYTES
    began = time.thread_time()
    accepted = TARGETS[name].run(data)
    assert time.thread_time() - began < MAX_CPU_SECONDS
    assert accepted == path.name.startswith("ok-")


@pytest.mark.parametrize("name", TARGETS)
def test_each_target_has_a_seed_that_is_accepted_and_one_that_is_refused(name):
    kinds = {path.name[:3] for path in seeds(name)}
    assert kinds == {"ok-", "no-"}
