"""The seeds: valid inputs (``ok-*``), refused ones, and what fuzzing found (``no-found-*``).

    python tests/fuzz/fuzz_seeds.py        # writes tests/fuzz/corpus anew

To be run again when a wire's version changes: a seed of the old one is refused for that alone.
"""

from __future__ import annotations

import io
import json
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import yaml
from fuzz_trees import varint
from fuzz_world import catalog, policies
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from hub_world import _document, frame, start
from safetensors.numpy import save
from steerscope.api.v1 import catalog_pb2, steering_pb2
from steerscope.catalog.formats.attribution_graph import paired
from steerscope.hub.audit import events
from steerscope.hub.audit.log import AuditLog
from steerscope.hub.orders import ORDERS_VERSION
from steerscope.hub.protocol import PROTOCOL_VERSION
from steerscope.hub.storage.documents import Answered, Document, Revision
from steerscope.hub.watches import cursors as watch_cursors
from steerscope.hub.watches.cursors import FeedCursor, Reached, RequestCursor
from steerscope.steering import segments, stamp
from steerscope.steering.interventions import Policy, canonical_json, parse_spec
from steerscope.telemetry.frames import (
    CachedActivations,
    RequestEnd,
    RequestStart,
    SiteActivations,
    SteeringChange,
    encode,
)

Seeds = dict[str, bytes | str]

NOW_NS = 10**12
DEEP = 1500
"""Lists within each other: more than any recursion takes."""
AT = 1_700_000_000_000_000
REQUEST_ID = "6f0e2d5c-1b7a-4c3e-9d2f-0a1b2c3d4e5f"

WHEN = {"feature": "unknown", "above": 0.5, "below": 9.0}
EDITS: list[dict[str, Any]] = [
    {"feature": "known", "at_least": 2.5, "phase": "generation", "only_if_active": True,
     "when": WHEN, "span": [3, 9]},
    {"feature": "unknown", "ablate": True, "span": [0, 4]},
    {"feature": "unknown", "scale": 0.5, "span": [4, 8], "phase": "prompt"},
]  # fmt: skip
CLAMP = [{"feature": "known", "clamp": 6.0}]
FULL = json.dumps({"interventions": EDITS, "max_dose": 0.5})

pack = msgspec.msgpack.encode


def _edits() -> Any:
    return parse_spec(FULL).interventions


def spec() -> Seeds:
    ops = [{"feature": "known", "add": 1, "span": [0, 3]},
           {"feature": "known", "at_most": -2e3, "span": [3, 6]},
           {"feature": "known", "scale": 0, "span": [6, 9]}]  # fmt: skip
    return {
        "ok-one": json.dumps({"interventions": CLAMP}),
        "ok-all": FULL,
        "ok-ops": json.dumps({"interventions": ops}),
        "no-read-only": json.dumps({"interventions": [{"feature": "late", "clamp": 6.0}]}),
        "no-infinite": '{"interventions":[{"feature":"known","clamp":1e999}]}',
        "no-deep": '{"interventions":[{"feature":"known","when":' + "[" * DEEP,
        "no-surrogate": b'{"interventions":[{"feature":"\xff","clamp":1}]}',
        "no-found-span-beyond-int32": json.dumps(
            {"interventions": [{"feature": "known", "add": 1, "span": [0, 2**40]}]}
        ),
    }


def admission() -> Seeds:
    return {
        "ok-named": '{"steering":"force-known","top_k":3}',
        "ok-inline": json.dumps({"steering": FULL}),
        "no-flag": '{"top_k":1}',
        "no-forged": '{"steerscope":"x","steering":"force-known"}',
        "no-newline": '{"steering":"force-known\\nx"}',
    }


def stamps() -> Seeds:
    digest = catalog().digest
    parts = segments.build(digest, _edits(), 5, 0.5)
    made = stamp.Stamp("id", "inline", "d" * 64, _edits(), parts, 0.5)
    changed = made.changed(7, "force-known", policies()["force-known"].spec, digest, 5)
    return {
        "ok-steered": stamp.encode(made),
        "ok-unsteered": stamp.encode(stamp.Stamp("id")),
        "ok-changed": stamp.encode(changed),
        "no-empty": b"",
    }


def config() -> Seeds:
    identity = {"name": "team-a", "token_sha256": "a" * 64, "scopes": ["steer"],
                "policies": ["force-?nown"], "features": ["known"], "max_dose": 0.8,
                "rate": {"requests_per_second": 5.5, "burst": 3},
                "expires": "2030-01-01T00:00:00Z"}  # fmt: skip
    tree = {
        "catalog": "catalog",
        "policies": [{"name": "p-1", "interventions": EDITS, "max_dose": 0.5, "description": "x"}],
        "hub": {"grpc_address": "127.0.0.1:0", "max_policies": 5, "report_ttl_seconds": 3.0},
        "steering": {"max_interventions": 3, "max_dose": 0.9, "allow_inline": True},
        "telemetry": {"max_cache_bytes": 0},
        "state": {"redis": {"url": "redis://h:1/0", "prefix": "p", "password_env": "X"}},
        "audit": {"path": "a.jsonl", "max_bytes": 4096, "keep": 2, "fsync": "every"},
        "security": {
            "tls": {"certificate": "c", "key": "k", "client_ca": "ca"},
            "identities": [identity],
            "unauthenticated": "observe",
            "reload_seconds": 1.5,
        },
    }
    shared = (
        "catalog: catalog\npolicies:\n- {name: a, interventions: &x [{feature: known, add: 1}]}\n"
    )
    return {
        "ok-least": "catalog: catalog\n",
        "ok-all": yaml.safe_dump(tree),
        "ok-anchors": shared + "- {name: b, interventions: *x}\n",
        "no-unknown": "catalog: catalog\nhubs: {}\n",
        "no-found-name-too-long": f"catalog: {'x' * 300}\n",
        "no-found-nul": 'catalog: "\\0"\n',
        "no-found-nan": "catalog: catalog\nhub: {report_ttl_seconds: .nan}\n",
        "no-found-infinite": "catalog: catalog\nsteering: {max_dose: .inf}\n",
        "no-found-newline": 'catalog: catalog\npolicies: [{name: "a\\n", interventions: '
        "[{feature: known, add: 1}]}]\n",
        "no-found-span-beyond-int32": "catalog: catalog\npolicies: [{name: a, interventions: "
        "[{feature: known, add: 1, span: [0, 4294967296]}]}]\n",
        **_hostile_yaml("catalog: catalog\npolicies: "),
    }


def _hostile_yaml(before: str) -> Seeds:
    """What any reader of YAML must refuse, after the text ``before``."""
    tens = ",".join(["*{0}"] * 9)
    bomb = f"{before}\n  - &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"  - &{name} [{tens.format(of)}]\n"
        for of, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    values = ("!!bool maybe", "!!timestamp soon", "!!int ''", "2020-13-01", "1:" * 200 + "1.0")
    odd = {f"no-found-value-{i}": f"{before}{value}\n" for i, value in enumerate(values)}
    return {
        "no-alias-bomb": bomb,
        "no-alias-of-itself": f"{before}&a [*a]\n",
        "no-found-deep-flow": before + "[" * DEEP + "]" * DEEP,
        "no-found-deep-block": before + "\n" + "- " * DEEP,
        "no-object": f"{before}!!python/object/apply:os.system [x]\n",
        **odd,
    }


def identities() -> Seeds:
    three = [
        {"name": "team-a", "token_sha256": "a" * 64, "scopes": ["steer"],
         "policies": ["force-?nown"], "features": ["?nknown"], "max_dose": 0.8,
         "expires": "2030-01-01T00:00:00Z"},
        {"name": "b", "certificate_uri": "spiffe://x/y", "scopes": ["observe"], "rate": None},
        {"name": "c", "certificate_subject": "CN=c", "scopes": ["admin"]},
    ]  # fmt: skip
    taken = {"name": "anonymous", "token_sha256": "a" * 64, "scopes": ["steer"]}
    return {
        "ok-three": yaml.safe_dump({"identities": three}),
        "no-taken": json.dumps({"identities": [taken]}),
        "no-found-newline": json.dumps({"identities": [taken | {"name": "a\n"}]}),
        "no-found-infinite": f"identities: [{{name: a, token_sha256: {'a' * 64}, "
        "scopes: [steer], max_dose: .inf}]\n",
        **_hostile_yaml("identities: "),
    }


def catalog_yaml() -> Seeds:
    small, calibrated = _document(), _document()
    small["signals"] = small["signals"][2:]
    small["baselines"] = [{"feature": "known", "phase": "prompt", "edges": [0.0, 1.0],
                           "shares": [0.5, 0.25, 0.25], "num_tokens": 9}]  # fmt: skip
    small["features"][0] |= {"label_source": "automatic", "source": {"a": "b"}}
    knots = {"method": "isotonic", "z": [0.0, 1.0], "p": [0.1, 0.9]}
    calibrated["signals"] = calibrated["signals"][:1]
    calibrated["signals"][0]["calibration"] = {"map": knots, "num_cases": 3, "split": "dev"}
    named = _document() | {"signals": []}
    named["policies"] = [{"name": "a\n", "interventions": CLAMP}]
    return {
        "ok-yaml": yaml.safe_dump(small, sort_keys=False),
        "ok-json": json.dumps(calibrated),
        "no-found-newline": json.dumps(named),
        **_hostile_yaml("schema: "),
    }


def _vectors() -> dict[str, Any]:
    found = {}
    for name in ("known", "unknown", "late"):
        found[f"{name}.W_enc"] = np.ones(4, np.float32)
        found[f"{name}.b_enc"] = np.zeros(1, np.float32)
        if name != "late":
            found[f"{name}.W_dec"] = np.ones(4, np.float32)
    return found


def catalog_tensors() -> Seeds:
    bad = np.array([1, np.nan, 1, 1], np.float32)
    return {
        "ok-small": save(_vectors()),
        "no-nan": save(_vectors() | {"known.W_enc": bad}),
        "no-cut": save(_vectors())[:-3],
    }


def _header(tree: Any, data: bytes = b"", size: int | None = None) -> bytes:
    text = json.dumps(tree).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def _tensor(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def tensors() -> Seeds:
    kinds = {
        "a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16), "c": np.ones((1, 2)),
        "d": np.ones(3, np.int64), "e": np.zeros((0, 3), np.float32), "f": np.ones((), np.float32),
    }  # fmt: skip
    overlap = {"a": _tensor("BF16", [2, 2], 0, 8), "b": _tensor("F32", [2], 0, 8)}
    one = {"a": _tensor("F32", [2], 0, 8)}
    return {
        "ok-kinds": save(kinds, metadata={"site": "resid_post", "layer": "3"}),
        "ok-overlap": _header(overlap, b"\0" * 8),
        "no-huge-header": _header(one, b"\0" * 8, 2**63),
        "no-header-past-end": _header(one, b"", 10**6),
        "no-past-end": _header(one, b"\0" * 7),
        "no-negative": _header({"a": _tensor("F32", [-2], 8, 0)}, b"\0" * 8),
        "no-empty": b"",
        "no-found-empty-and-huge": _header({"a": _tensor("F32", [10**30, 0], 0, 0)}),
        "no-found-dimensions": _header({"a": _tensor("F32", [1] * 65, 0, 4)}, b"\0" * 4),
    }


def directions() -> Seeds:
    two = {"x": np.ones(3, np.float32), "y": np.full((1, 3), 2, np.float16)}
    return {
        "ok-two": save(two, metadata={"site": "resid_post", "layer": "3"}),
        "no-zero": save({"x": np.zeros(3, np.float32)}),
        "no-found-infinite-layer": _header(
            {"__metadata__": {"layer": float("inf")}, "x": _tensor("F32", [1], 0, 4)}, b"\0\0\x80?"
        ),
    }


def linear_probe() -> Seeds:
    weight = np.ones((1, 3), np.float32)
    return {
        "ok-one": save({"weight": weight, "bias": np.ones(1, np.float32)}),
        "no-bias": save({"weight": weight, "bias": np.ones(2, np.float32)}),
    }


def npz() -> Seeds:
    plain, packed, pickled = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.savez(plain, W_enc=np.eye(2, 3, dtype=np.float32), b=np.ones(3), h=np.ones((), np.float16))
    np.savez_compressed(packed, a=np.eye(2))
    np.savez(pickled, a=np.array([{}], object))
    whole = plain.getvalue()
    end = whole.rindex(b"PK\5\6") + 16
    (at,) = struct.unpack("<I", whole[end : end + 4])
    astray = whole[:end] + struct.pack("<I", at + len(whole)) + whole[end + 4 :]
    return {
        "ok-three": plain.getvalue(),
        "no-compressed": packed.getvalue(),
        "no-pickle": pickled.getvalue(),
        "no-found-before-its-start": astray,
        "no-empty": b"",
    }


def gguf() -> Seeds:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def begin(*values: bytes, num_tensors: int = 0) -> bytes:
        return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, len(values)) + b"".join(values)

    told = text("general.architecture") + struct.pack("<I", 8) + text("controlvector")
    numbers = text("x") + struct.pack("<IIQ3i", 9, 5, 3, 1, 2, 3)
    texts = text("y") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")
    vector = text("direction.3") + struct.pack("<IQIQ", 1, 4, 0, 0)
    half = text("direction.4") + struct.pack("<IQIQ", 1, 4, 1, 32)
    header = begin(told, numbers, texts, num_tensors=2) + vector + half
    data = b"\0" * (-len(header) % 32) + struct.pack("<4f", 1, 1, 1, 1) + b"\0" * 16 + b"\0<" * 4
    empty = text("direction.3") + struct.pack("<IQQIQ", 2, 0, 2**63, 0, 0)
    alignment = text("general.alignment") + struct.pack("<II", 4, 0)
    return {
        "ok-two": header + data,
        "no-cut": (header + data)[:-9],
        "no-other": begin(text("general.architecture") + struct.pack("<I", 8) + text("llama")),
        "no-found-endless-array": begin(text("x") + struct.pack("<IIQ", 9, 0, 2**60)),
        "no-endless-values": b"GGUF" + struct.pack("<IQQ", 3, 2**62, 2**62),
        "no-empty-and-huge": begin(told, num_tensors=1) + empty,
        "no-alignment": begin(told, alignment),
    }


def dictionary_config() -> Seeds:
    saelens = {"architecture": "standard", "d_in": 3, "d_sae": 4,
               "metadata": {"hook_name": "blocks.3.hook_resid_post"}}  # fmt: skip
    old = {"activation_fn": "topk", "activation_fn_kwargs": {"k": 2}, "d_in": 3, "d_sae": 4,
           "hook_point": "blocks.{layer}.hook_resid_post", "hook_layer": 3}  # fmt: skip
    tracer = "model_kind: transcoder_set\nfeature_input_hook: hook_resid_post\n"
    return {
        "ok-saelens": json.dumps(saelens),
        "ok-old-topk": json.dumps(old),
        "ok-sparsify": '{"d_in": 3, "k": 2, "num_latents": 4, "activation": "topk"}',
        "ok-circuit-tracer": f"{tracer}feature_output_hook: hook_mlp_out\nscan: [a, b]\n",
        "ok-probe": '{"layer_idx": 3, "site": "resid_post", "probe_id": "p"}',
        "no-layer": '{"layer_idx": 4}',
        **_hostile_yaml("model_kind: "),
    }


def graph() -> Seeds:
    def node(at: int, index: int, position: int, **other: Any) -> dict[str, Any]:
        told = {"node_id": f"{at}_{index}_{position}", "feature": paired(at, index)}
        kind = {"layer": str(at), "feature_type": "cross layer transcoder", "clerp": "a"}
        return told | kind | other

    embedding = {"node_id": "E_1", "feature": None, "layer": "E", "feature_type": "embedding"}
    shown = {"pinnedIds": "1_5_2,2_7_1,E_1", "supernodes": [["group", "2_7_1"]],
             "clerps": [["1_5_2", "label"]]}  # fmt: skip
    nodes = [node(1, 5, 2), node(1, 5, 3), node(2, 7, 1), embedding]
    odd = {"nodes": [node(1, 5, 2, layer="2")], "qParams": {"pinnedIds": ["1_5_2"]}}
    return {
        "ok-pinned": json.dumps({"metadata": {"slug": "s"}, "nodes": nodes, "qParams": shown}),
        "no-contradiction": json.dumps(odd),
        "no-deep": '{"nodes":' + "[" * DEEP,
    }


def model() -> Seeds:
    sizes = {"hidden_size": 4, "num_hidden_layers": 2, "vocab_size": 8}
    llama, qwen = {"architectures": ["LlamaForCausalLM"]}, {"architectures": ["Qwen3ForCausalLM"]}
    return {
        "ok-llama": json.dumps(llama | sizes),
        "ok-text-config": json.dumps(qwen | {"text_config": sizes}),
        "no-layers": json.dumps(llama | sizes | {"num_hidden_layers": 3}),
        "no-found-text-config": json.dumps(qwen | sizes | {"text_config": [1]}),
        "no-found-many-layers": json.dumps(llama | sizes | {"num_hidden_layers": 10**12}),
    }


def _frames(*made: Any) -> bytes:
    return pack([msgspec.Raw(encode(each)) for each in made])


def frames() -> Seeds:
    world, edits = catalog(), _edits()
    begun = (start("r1", 2, external_id="id", policy="inline", interventions=edits),
             start("r2", 2, first_position=2))  # fmt: skip
    acts = [[1, 2, 0], [2, 0, 1], [0, 1, 1], [3, 3, 3]]
    one = frame(world, ("r1", 0, 3), ("r2", 2, 1), acts=acts, started=begun, edited={1: 0.5},
                monotonic_ns=NOW_NS)  # fmt: skip
    change = SteeringChange("r1", 3, "force-known", "d2", canonical_json(edits))
    two = frame(world, ("r1", 3, 1), acts=5.0, finished=("r1", "r2"), changed=(change,),
                monotonic_ns=NOW_NS)  # fmt: skip
    sites = (SiteActivations("resid_post.1", 2, np.ones((3, 2), np.float32).tobytes()),
             SiteActivations("resid_post.2", 1, np.ones((3, 1), np.float32).tobytes()))  # fmt: skip
    cached = RequestStart("r1", "id", 4, 3, "", "", b"", CachedActivations(b"\1\0\1", sites), 0)
    three = frame(world, ("r1", 3, 1), started=(cached,), monotonic_ns=NOW_NS)
    four = frame(world, ("r1", 4, 2), acts=[[np.nan, 1, 1], [1, 1, 1]], dropped=2, dropped_tokens=5,
                 monotonic_ns=NOW_NS)  # fmt: skip
    four = msgspec.structs.replace(four, finished=(RequestEnd("r1", 6),))

    def broken(**fields: Any) -> bytes:
        return encode(msgspec.structs.replace(one, **fields))

    long = msgspec.structs.replace(begun[0], num_prompt_tokens=2**31)
    last = msgspec.structs.replace(change, position=2**31)
    return {
        "ok-two": _frames(one, two),
        "ok-one": encode(two),
        "ok-cached": _frames(three, four),
        "no-empty": b"",
        "no-found-prompt-beyond-int32": broken(started=(long,)),
        "no-found-change-beyond-int32": broken(changed=(last,)),
        "no-found-negative-count": broken(dropped=-5),
        "no-found-tokens-without-sites": broken(sites=(), query_start_loc=(0, 3, 2**40)),
        "no-found-deep": encode(one)[:1] + b"\0\x12" + encode(one)[3:] + b"\x91" * DEEP + b"\x90",
    }


def control() -> Seeds:
    digest = catalog().digest
    hello = {"type": "Hello", "version": PROTOCOL_VERSION, "catalog_digest": digest, "pid": 1}
    admitted = {"type": "Admitted", "external_id": "id", "policy": "force-known", "digest": digest}
    rejected = {"type": "Rejected", "external_id": "id", "policy": "unknown", "field": "steering",
                "reason": "no policy 'x'"}  # fmt: skip
    ack = {"type": "Ack", "revision": 10**15}
    report = {"type": "ReportAsked", "external_id": "id", "wait_seconds": 0.5, "activations": True}
    metrics = {"type": "MetricsAsked", "accept": "text/plain"}
    asked = [{"type": "Question", "number": 1, "what": what} for what in (report, metrics)]
    endless = {"type": "Question", "number": 1, "what": report | {"wait_seconds": float("nan")}}
    return {
        "ok-talk": pack([hello, ack, admitted, rejected, {"type": "Goodbye"}]),
        "ok-other-version": pack([hello | {"version": 99}]),
        "ok-asked": pack([*asked, {"type": "Recalled", "digests": {"id": digest}}]),
        "no-found-nan": pack([endless]),
        "no-empty": b"\x90",
        "no-found-pid": pack([hello | {"pid": 2**63}]),
        "no-found-deep": b"\x82\xa4type\xa7Goodbye\xa1x" + b"\x91" * DEEP + b"\x90",
    }


def from_hub() -> Seeds:
    kept = [policies()["force-known"], Policy(name="p", interventions=_edits(), max_dose=0.5)]
    return {
        "ok-two": pack([{"type": "Policies", "revision": 3, "policies": kept}]),
        "ok-none": pack({"type": "Policies", "revision": 3, "policies": []}),
        "no-refused": pack({"type": "Refused", "reason": "x"}),
        "no-found-not-utf8": b"\x82\xa4type\xa7Refused\xa6reason\xa2\xff\xff",
        "no-found-deep": b"\x82\xa4type\xa7Refused\xa1x" + b"\x91" * DEEP + b"\x90",
    }


def engines() -> Seeds:
    present = {"type": "Present", "version": ORDERS_VERSION, "catalog_digest": catalog().digest,
               "engine": "0", "pid": 1}  # fmt: skip
    applied = {"type": "Applied", "order_id": 1, "request_id": "r1", "position": 7,
               "external_id": "id"}  # fmt: skip
    declined = {"type": "Declined", "order_id": 1, "request_id": "r2", "reason": "why"}
    return {
        "ok-talk": pack([present, applied, declined, applied | {"order_id": 9}]),
        "no-other-version": pack([present | {"version": 99}]),
        "no-found-position-beyond-int32": pack([applied | {"position": 2**31}]),
        "no-found-deep": b"\x82\xa4type\xa7Present\xa1x" + b"\x91" * DEEP + b"\x90",
    }


def orders() -> Seeds:
    def order(number: int, external_id: str, edits: Any, **other: Any) -> dict[str, Any]:
        told = {"type": "Order", "order_id": number, "external_id": external_id, "policy": "inline"}
        return told | {"interventions": edits, "max_dose": None, "ttl_seconds": 60.0} | other

    sent = [order(1, "id", EDITS, max_dose=0.5), order(2, "other", []), order(3, "gone", CLAMP)]
    return {
        "ok-talk": pack([*sent, {"type": "Withdraw", "order_id": 3}]),
        "no-unwelcome": pack({"type": "Unwelcome", "reason": "x"}),
        "no-found-not-utf8": b"\x82\xa4type\xa9Unwelcome\xa6reason\xa2\xff\xff",
        "no-found-nan": pack([order(1, "id", [CLAMP[0] | {"clamp": float("nan")}])]),
        "no-found-no-operation": pack([order(1, "id", [{"feature": "known"}])]),
        "no-found-never-expires": pack([order(1, "id", CLAMP, ttl_seconds=float("nan"))]),
    }


def _calls(*calls: tuple[int, Message]) -> bytes:
    sent = ((number, request.SerializeToString()) for number, request in calls)
    return b"".join(varint(number << 3 | 2) + varint(len(m)) + m for number, m in sent)


def rpcs() -> Seeds:
    pb = steering_pb2
    gated = pb.Intervention(feature="features/known", at_least=2.5, phase=2, only_if_active=True,
                            when=pb.When(feature="unknown", above=0.5),
                            span=pb.Span(start=3, end=9))  # fmt: skip
    edits = [gated, pb.Intervention(feature="unknown", ablate=True)]

    def policy(**fields: Any) -> pb.Policy:
        return pb.Policy(interventions=edits, max_dose=0.5, annotations={"team": "a"}, **fields)

    made = policy(description="d", ttl=Duration(seconds=60))
    create = (1, pb.CreatePolicyRequest(policy_id="made", policy=made, request_id=REQUEST_ID))
    change = pb.Policy(name="policies/made", description="new", interventions=edits[:1],
                       expire_time=Timestamp(seconds=4102444800, nanos=999999999))  # fmt: skip
    mask = FieldMask(paths=["description", "interventions", "expire_time"])
    shown = (5, pb.ListPolicyRevisionsRequest(name="policies/made", page_size=1))
    listed = pb.ListPoliciesRequest(page_size=1, page_token="a", filter="annotations.team = a")
    new = policy(name="policies/new")
    again = pb.UpdatePolicyRequest(policy=new, update_mask=FieldMask(paths=["*"]))
    steer = pb.SteerRequestRequest(name="requests/r1", interventions=edits, max_dose=0.5,
                                   ttl=Duration(seconds=3))  # fmt: skip
    found = catalog_pb2.ListFeaturesRequest(filter="layer >= 1 AND steerable = true")
    name = pb.UpdatePolicyRequest(policy=new, update_mask=FieldMask(paths=["name"]))
    nan = pb.SteerRequestRequest(name="requests/r", interventions=edits, max_dose=float("nan"))
    update = pb.UpdatePolicyRequest(policy=change, update_mask=mask)
    upsert = pb.UpdatePolicyRequest(policy=new, allow_missing=True)
    bound = pb.Binding(binding="b", match=pb.Match(model="m"), policy="policies/force-known")
    rules = pb.Rules(default_policy="policies/force-known", bindings=[bound],
                     override=pb.Override(mode=pb.OVERRIDE_MODE_OFF, reason="r"))  # fmt: skip
    ruled = pb.UpdateRulesRequest(rules=rules)
    lifted = pb.UpdateRulesRequest(update_mask=FieldMask(paths=["override"]))
    return {
        "ok-rules": _calls((7, ruled), (7, lifted)),
        "ok-create": _calls(create, create, (3, listed), shown),
        "ok-update": _calls(create, (2, update), shown),
        "ok-upsert": _calls((2, upsert), (2, again)),
        "ok-steer": _calls((4, steer)),
        "ok-find": _calls((6, found)),
        "no-mask": _calls((2, name)),
        "no-nan": _calls((4, nan)),
    }


def filters() -> Seeds:
    return {
        "ok-policy": 'name = "policies/force-known" AND origin != created AND feature:known '
        'AND annotations.team="a\\"b"',
        "ok-feature": "site = resid_post AND layer >= 1 AND kind = direction AND steerable=true",
        "no-or": "site = resid_post OR layer = 1",
        "no-open-quote": 'name = "' + "\\" * 1001,
    }


def _revision(**fields: Any) -> Revision:
    policy = Policy(name="kept", interventions=_edits()[:1], max_dose=0.5, revision=4)
    kept = Revision(policy=policy, create_time=AT, update_time=AT, expire_time=4 * 10**15,
                    annotations={"a": "b"}, features={"known": "0" * 64})  # fmt: skip
    return msgspec.structs.replace(kept, **fields)


def kept() -> Seeds:
    def document(**fields: Any) -> bytes:
        return msgspec.json.encode(Document(revisions=(_revision(**fields),)))

    text = document().decode()
    return {
        "ok-two": msgspec.json.encode(Document(revisions=(_revision(), _revision()))),
        "no-other": document(policy=Policy(name="other", interventions=())),
        "no-found-no-operation": text.replace('"at_least":2.5', '"at_least":null'),
        "no-found-time": document(create_time=10**24),
        "no-found-revision": text.replace('"revision":4', f'"revision":{2**63}'),
    }


def kept_answers() -> Seeds:
    def answer(**fields: Any) -> bytes:
        revision = _revision(**fields)
        return msgspec.json.encode(
            Answered(request_id=REQUEST_ID, fingerprint="f", at=AT, revision=revision)
        )

    return {
        "ok-answer": answer(),
        "ok-mark": "12:ab12cd34",
        "no-mark": "-1:x",
        "no-found-time": answer(update_time=10**24),
        "no-found-long-mark": "1" * 4096,
    }


def kept_rules() -> Seeds:
    match = {"model": "m", "headers": {"x-team": "a"}}
    binding = {"name": "b", "match": match, "policy": "force-known"}
    override = {"mode": "force", "policy": "force-known", "reason": "r"}
    rules = {"default_policy": "p", "bindings": [binding], "override": override}
    return {
        "ok-all": json.dumps({"rules": rules, "update_time": AT}),
        "no-rules": json.dumps({"update_time": AT}),
        "no-found-time": json.dumps({"rules": rules, "update_time": 10**18}),
        "no-found-newline": json.dumps({"rules": {"default_policy": "p\n"}, "update_time": AT}),
    }


def cursors() -> Seeds:
    reached = Reached(serial=1, stops=(3, 9), is_finished=False)
    return {
        "ok-feed": watch_cursors.encode(FeedCursor(hub="0" * 16, feed="requests", number=5)),
        "ok-request": watch_cursors.encode(RequestCursor(hub="0" * 16, completions=(reached,))),
        "no-empty": "",
        "no-padding": "a" * 5,
        "no-found-not-utf8": "k6FysDAwMDAwMDAMDCRkwGSAwnC",
    }


def audit() -> Seeds:
    plain = _log(None)
    dated = plain.decode().splitlines()
    dated[2] = dated[2].replace('"time":"2023-11-14', '"time":"2023-00-14')
    return {
        "ok-plain": plain,
        "no-keyed": _log(b"k" * 32),
        "ok-changed-in-the-middle": plain.replace(b"alice", b"mallory"),
        "ok-found-no-such-day": "\n".join(dated) + "\n",
        "no-found-no-such-day-last": plain.replace(b'"time":"2023-11-14', b'"time":"2023-99-14'),
        "no-found-deep": '{"event":{"a":' + "[" * DEEP + "]" * DEEP + "}}\n",
    }


def _log(key: bytes | None) -> bytes:
    """A log of five events, in which the clock was set back once."""
    times = iter([1.7e9 + n for n in (1, 2, 3, 0, 5, 6, 7)])
    with tempfile.TemporaryDirectory() as folder:
        path, key_file = Path(folder) / "audit.jsonl", Path(folder) / "key"
        if key is not None:
            key_file.write_bytes(key)
            key_file.chmod(0o600)
        log = AuditLog.open(path, key_file=key_file if key else None, clock=lambda: next(times))
        log.record(events.PolicyCreated("p", 1, "ab", events.edits(_edits()), 0.5), "alice")
        log.record(events.RequestRejected(external_id="x", field="steering", reason="no"))
        log.record(events.KillSwitch(events.KillMode.FORCE_POLICY, "p"), "bob")
        log.record(events.Denied("/a/B", "steer", "r"), "eve")
        log.close()
        return path.read_bytes()


def cases() -> Seeds:
    asked = {"question": "Which sport does Michael Jordan play?", "entity": "Michael Jordan",
             "template": "en-1", "expected": ["Basketball."], "labels": {"known": True},
             "form": "[A-Z].*\\."}  # fmt: skip
    talk = {"messages": [{"role": "user", "content": "Who?"}], "answerable": False, "split": "test"}
    lines = (asked, talk, {"prompt": "x", "split": "fit"})
    return {
        "ok-three": "".join(json.dumps(line) + "\n" for line in lines),
        "no-two-texts": '{"question": "a", "prompt": "b"}',
        "no-found-repetition": '{"question": "a", "form": "(?:x){99999999999}"}',
        "no-found-deep-form": '{"question": "a", "form": "' + "(" * DEEP + '"}',
    }


def requirements() -> Seeds:
    return {
        "ok-value": "known.auroc>=0.8",
        "ok-low": " known.auroc.low > -1e3 ",
        "no-path": "other>=1",
        "no-nan": "known.n<nan",
    }


SEEDS = (spec, admission, stamps, config, identities, catalog_yaml, catalog_tensors, tensors,
         directions, linear_probe, npz, gguf, dictionary_config, graph, model, frames, control,
         from_hub, engines, orders, rpcs, filters, kept, kept_answers, kept_rules, cursors, audit,
         cases, requirements)  # fmt: skip


def write(corpus: Path) -> None:
    """Write every seed, and nothing else there."""
    shutil.rmtree(corpus, ignore_errors=True)
    for seeds in SEEDS:
        folder = corpus / seeds.__name__
        folder.mkdir(parents=True)
        for name, content in seeds().items():
            data = content.encode() if isinstance(content, str) else content
            (folder / name).write_bytes(data)


if __name__ == "__main__":
    write(Path(__file__).parent / "corpus")
