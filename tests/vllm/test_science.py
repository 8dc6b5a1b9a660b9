"""The claims of the demo, measured through the server on held-out names and phrasings."""

from __future__ import annotations

import asyncio
import json

import pytest
from steerscope.catalog import store
from steerscope.demo.live.asking import Asker
from steerscope.demo.live.served_evaluation import Evaluation
from steerscope.demo.paths import CATALOG_DIR

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def report(demo_server, client):
    async def evaluate():
        async with Asker(demo_server) as asker:
            return await Evaluation(asker, client, store.load(CATALOG_DIR), lambda: None).run()

    made = asyncio.run(evaluate())
    print(json.dumps(made, indent=2))
    return made


@pytest.mark.parametrize(
    ("key", "least"),
    [
        ("known", 0.95),
        ("unknown", 0.90),
        ("force_known_on_unknown", 0.75),
        ("force_unknown_on_known", 0.85),
        ("side", 0.95),
    ],
)
def test_the_rate_holds(report, key, least):
    assert report[key]["rate"] >= least


@pytest.mark.parametrize("key", ["control_on_unknown", "control_on_known"])
def test_random_latents_of_the_same_size_do_much_less(report, key):
    assert report[key]["directions"] >= 8
    assert report[key]["rate"] <= 0.15


def test_the_model_is_asked_enough(report):
    assert report["known"]["n"] >= 150
    assert report["unknown"]["n"] >= 150


def test_known_and_unknown_names_are_told_apart(report):
    assert report["auroc"]["known_entity_confidence"] >= 0.93


def test_no_neighbour_changes(report):
    assert report["neighbours_changed"] == 0
