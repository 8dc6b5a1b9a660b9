"""Installed beside a server that has no Steerscope config, the plugin changes nothing."""

import json
import os
import subprocess
import sys

PROBE = """
import json, sys
import steerscope.plugin
heavy = sorted(
    {"torch", "numpy", "grpc", "vllm", "zmq", "safetensors", "yaml", "multiprocessing"}
    & set(sys.modules)
)
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
import vllm.v1.engine.input_processor, vllm.v1.core.block_pool
load_general_plugins()
from steerscope.engine import seams
import importlib
patched = []
for seam in seams.SEAMS:
    if seam.module in sys.modules:
        _, _, value = seams._find(seam, sys.modules[seam.module])
        if hasattr(value, seams._ORIGINAL):
            patched.append(f"{seam.module}.{seam.qualname}")
print("RESULT", json.dumps({"patched": sorted(patched), "heavy": heavy}))
"""

FREEZE_PROBE = """
import gc, json, multiprocessing
from steerscope import plugin
with multiprocessing.get_context("spawn").Pool(1) as pool:
    pool.apply(plugin.register)
    child = pool.apply(gc.get_freeze_count)
plugin.register()
print("RESULT", json.dumps({"child": child, "own": gc.get_freeze_count()}))
"""


def probe(script=PROBE, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("STEERSCOPE")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    return json.loads(done.stdout.split("RESULT ", 1)[1])


def test_unconfigured_nothing_of_vllm_is_patched():
    result = probe()
    assert result["patched"] == []
    assert result["heavy"] == []


def test_configured_every_seam_whose_module_is_loaded_is_patched(tiny_world):
    patched = probe(STEERSCOPE_CONFIG=str(tiny_world.config))["patched"]
    assert "vllm.engine.arg_utils.EngineArgs.create_engine_config" in patched
    assert "vllm.v1.core.block_pool.generate_block_hash_extra_keys" in patched
    assert "vllm.v1.engine.input_processor.InputProcessor.process_inputs" in patched


def test_what_a_process_of_vllm_has_imported_is_out_of_the_collectors_way(tiny_world):
    frozen = probe(FREEZE_PROBE, STEERSCOPE_CONFIG=str(tiny_world.config))
    assert frozen["child"] > 1000
    assert frozen["own"] == 0  # what a user's process holds is the user's


def test_unconfigured_the_collector_is_left_alone():
    assert probe(FREEZE_PROBE) == {"child": 0, "own": 0}
