"""Offline inference, configured by ``additional_config`` alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from steerscope.demo import world
from steerscope.demo.live import server
from steerscope.demo.paths import CATALOG_DIR, MODEL_DIR

pytestmark = pytest.mark.server


def test_generate_and_chat_are_steered_like_the_server(http):
    asked = [q.question for q in world.questions("known", "en", 6, 31)]
    tree = {
        "catalog": str(CATALOG_DIR),
        "hub": {"grpc_address": "127.0.0.1:0", "http_address": "127.0.0.1:0"},
    }
    environment = {k: v for k, v in os.environ.items() if not k.startswith("STEERSCOPE")}
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("offline.py")),
            str(MODEL_DIR),
            json.dumps(tree),
            json.dumps(asked),
        ],
        env=environment | server.SETTINGS,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.split("RESULT ", 1)[1].splitlines()[0])
    assert told["eager"] is False
    for policy in (None, "force-unknown"):
        expected = [http.say(question, policy) for question in asked]
        assert told[f"chat {policy}"] == expected
        assert told[f"generate {policy}"] == expected
    assert told["chat None"] != told["chat force-unknown"]
