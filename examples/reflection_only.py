"""The whole control plane with grpcio and server reflection only: no generated code.

The hub describes its own API, so any gRPC client can use it. This one lists the features,
creates a policy, uses it over HTTP, watches, steers a request while it is generating, reads the
report, and checks that the steering took effect in the middle of the generation.

    pip install grpcio grpcio-reflection
    python reflection_only.py --address 127.0.0.1:50051 --base-url http://127.0.0.1:8000
"""

from __future__ import annotations

import argparse
import contextlib
import json
import threading
import urllib.request
import uuid
from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

Json = dict[str, Any]

CHUNKS_BEFORE_STEERING = 5
ATTEMPTS = 3
"""A small model may be done before an order reaches it; then another request is tried."""


class Hub:
    """Every method that the hub says it has, with plain JSON in and out."""

    def __init__(self, channel: grpc.Channel) -> None:
        database = ProtoReflectionDescriptorDatabase(channel)
        self._channel = channel
        self._pool = DescriptorPool(database)
        services = [name for name in database.get_services() if name.startswith("steerscope.")]
        self._methods = {
            method.name: method
            for name in services
            for method in self._pool.FindServiceByName(name).methods
        }

    @property
    def methods(self) -> list[str]:
        """Their names."""
        return sorted(self._methods)

    def call(self, method: str, **request: Any) -> Json:
        """A call that has one answer."""
        return self._read(self._multicallable(method, "unary_unary")(request, timeout=30))

    def stream(self, method: str, **request: Any) -> tuple[grpc.Call, Iterator[Json]]:
        """A call that is answered by a stream, which is open when this returns; and the stream."""
        call = self._multicallable(method, "unary_stream")(request)
        call.initial_metadata()
        return call, map(self._read, call)

    def _multicallable(self, name: str, kind: str) -> Any:
        method = self._methods[name]
        request = message_factory.GetMessageClass(method.input_type)
        answer = message_factory.GetMessageClass(method.output_type)

        def encoded(tree: Json) -> bytes:
            message = json_format.ParseDict(tree, request(), descriptor_pool=self._pool)
            return message.SerializeToString()

        path = f"/{method.containing_service.full_name}/{name}"
        return getattr(self._channel, kind)(path, encoded, answer.FromString)

    def _read(self, answer: Any) -> Json:
        tree: Json = json_format.MessageToDict(
            answer, preserving_proto_field_name=True, descriptor_pool=self._pool
        )
        return tree


class Server:
    """vLLM's OpenAI server, by the standard library."""

    def __init__(self, base_url: str) -> None:
        self._base_url = base_url.rstrip("/")
        with urllib.request.urlopen(f"{self._base_url}/v1/models", timeout=30) as response:
            self.model = json.load(response)["data"][0]["id"]

    def ask(self, question: str, **body: Any) -> Json:
        """One answer, whole."""
        with self._post(question, body) as response:
            answer: Json = json.load(response)
        return answer

    def stream(self, question: str, **body: Any) -> Iterator[Json]:
        """One answer, chunk by chunk."""
        with self._post(question, {**body, "stream": True}) as response:
            for line in response:
                if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                    yield json.loads(line[len(b"data: ") :])

    def _post(self, question: str, body: Json) -> Any:
        message = {"role": "user", "content": question}
        whole = {"model": self.model, "messages": [message], "temperature": 0, **body}
        request = urllib.request.Request(
            f"{self._base_url}/v1/chat/completions",
            json.dumps(whole).encode(),
            {"content-type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=120)


def main() -> None:
    """All steps, in order; an error in any of them ends it."""
    arguments = _arguments()
    server = Server(arguments.base_url)
    with grpc.insecure_channel(arguments.address) as channel:
        hub = Hub(channel)
        print(f"1. The hub says it has: {', '.join(hub.methods)}")
        list_features(hub)
        policy = create_policy(hub, arguments.feature, arguments.add)
        try:
            use_policy(hub, server, arguments.question, policy)
            for _ in range(ATTEMPTS):
                if steer_while_generating(hub, server, arguments, policy):
                    break
            else:
                raise SystemExit("the server was always done before it could be steered")
        finally:
            hub.call("DeletePolicy", name=policy)
            print(f"8. Deleted {policy}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--address", default="127.0.0.1:50051", help="the hub's gRPC")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", help="vLLM's HTTP")
    parser.add_argument("--feature", default="unknown_entity")
    parser.add_argument("--add", type=float, default=60.0, help="to its activation")
    parser.add_argument("--question", default="Tell me the birth year of Noah Moreau.")
    parser.add_argument("--max-tokens", type=int, default=200, help="of the long generation")
    return parser.parse_args()


def list_features(hub: Hub) -> None:
    """All of them, page by page."""
    found: list[Json] = []
    token = ""
    while True:
        page = hub.call("ListFeatures", page_size=20, page_token=token, filter="steerable = true")
        found += page.get("features", [])
        token = page.get("next_page_token", "")
        if not token:
            break
    print(f"2. {len(found)} features can be steered, e.g. {found[0]['name']}")


def create_policy(hub: Hub, feature: str, add: float) -> str:
    """A policy that lasts ten minutes; with a request_id it would be safe to ask again."""
    created = hub.call(
        "CreatePolicy",
        policy_id=f"example-{uuid.uuid4().hex[:8]}",
        request_id=str(uuid.uuid4()),
        policy={
            "description": "made by examples/reflection_only.py",
            "interventions": [{"feature": feature, "add": add, "phase": "PHASE_GENERATION"}],
            "ttl": "600s",
        },
    )["policy"]
    name: str = created["name"]
    print(f"3. Created {name}, which expires at {created['expire_time']}")
    return name


def use_policy(hub: Hub, server: Server, question: str, policy: str) -> None:
    """The same question without and with the policy, and what the report says of the latter."""
    asked = {"vllm_xargs": {"steering": policy.removeprefix("policies/")}}
    plain, steered = (server.ask(question, max_tokens=32, **body) for body in ({}, asked))
    for how, answer in (("unsteered", plain), ("steered", steered)):
        print(f"4. {how:>9}: {answer['choices'][0]['message']['content'].strip()!r}")
    name = f"requests/{steered['id']}"
    report = hub.call("GetRequestReport", name=name, wait="10s")["report"]
    (completion,) = report["completions"]
    assert completion["policy"] == policy.removeprefix("policies/"), completion
    assert completion["complete"], completion
    print(f"   {name}: steered by {completion['policy']}, {completion['steering']}")


def steer_while_generating(
    hub: Hub, server: Server, arguments: argparse.Namespace, policy: str
) -> bool:
    """Watch a request, steer it after its first chunks, read its report; False if too late."""
    events, seen = hub.stream("WatchRequests")
    chunks = server.stream(arguments.question, max_tokens=arguments.max_tokens, ignore_eos=True)
    request = f"requests/{next(chunks)['id']}"
    print(f"5. {request} is generating; watching it")
    tokens, watcher = _watched(hub, request, arguments.feature)
    for _ in range(CHUNKS_BEFORE_STEERING):
        next(chunks)
    told = hub.call("SteerRequest", name=request, policy=policy)
    num_chunks_after = sum(1 for _ in chunks)
    if told["state"] != "STEER_STATE_APPLIED":
        with contextlib.suppress(grpc.RpcError):  # NOT_FOUND: it met its request after all
            hub.call("ReleaseRequest", name=request)
        events.cancel()
        return False
    applied = told["sequences"][0]["first_position"]
    print(f"6. Steered from token {applied} on; {num_chunks_after} chunks came after that")
    _check_report(hub, request, applied)
    watcher.join(30)
    _check_watches(events, seen, request, tokens, applied)
    return True


def _check_report(hub: Hub, request: str, applied: int) -> None:
    report = hub.call("GetRequestReport", name=request, wait="10s")["report"]
    (completion,) = report["completions"]
    changed_at = completion["steering"]["changed_at"]
    last = completion["num_observed_tokens"] - 1
    assert changed_at == applied, completion
    assert completion["num_prompt_tokens"] < changed_at < last, completion
    assert completion["steering"]["first_position"] >= changed_at, completion
    assert completion["complete"], completion
    print(
        f"7. The report: prompt of {completion['num_prompt_tokens']}, steered from {changed_at} "
        f"to {completion['steering']['last_position']} of {last}, mean dose "
        f"{completion['steering']['dose_mean']:.2f}"
    )


def _watched(hub: Hub, request: str, feature: str) -> tuple[list[Json], threading.Thread]:
    """The activations of a request as they come, collected by a thread until it ends."""
    _, stream = hub.stream("WatchActivations", name=request, features=[feature])
    found: list[Json] = []
    thread = threading.Thread(target=lambda: found.extend(stream), daemon=True)
    thread.start()
    return found, thread


def _check_watches(
    events: grpc.Call, seen: Iterator[Json], request: str, tokens: list[Json], applied: int
) -> None:
    """Both watches saw the request; the activations say where it was edited."""
    kinds = []
    for event in seen:
        kind = "started" if "started" in event else "finished"
        if event[kind]["name"] == request:
            kinds.append(kind)
        if kinds == ["started", "finished"]:
            break
    events.cancel()
    tracks = [track for event in tokens for track in event.get("features", [])]
    edited = [
        track["first_position"] + i
        for track in tracks
        for i, delta in enumerate(track.get("deltas", []))
        if delta
    ]
    assert edited, "no edit was watched"
    assert min(edited) >= applied
    count = sum(len(track["activations"]) for track in tracks)
    print(f"   watched: {' and '.join(kinds)}; {count} activations, edited from {min(edited)} on")


if __name__ == "__main__":
    main()
