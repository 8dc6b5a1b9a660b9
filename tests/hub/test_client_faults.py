"""Both clients while the hub is away, slow to come back, or cut off in the middle of a stream."""

import contextlib
import socket
import threading
from concurrent import futures

import grpc
import msgspec
import pytest
from hub_world import Worker, frame, start
from steerscope.api.v1 import steering_pb2 as pb
from steerscope.client import CallError, Client, watch
from steerscope.config import StateSettings
from steerscope.hub import launcher
from test_client import KINDS

pytestmark = pytest.mark.timeout(60)

CLAMP = {"feature": "known", "clamp": 6.0}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


class Relay(grpc.GenericRpcHandler):
    """In front of a hub: loses the answers to the first ``losses`` calls, and counts all of them.

    What is lost has been carried out.
    """

    def __init__(self, hub, losses, hub_hears=True):
        self.losses = losses
        self.hub_hears = hub_hears
        self.requests = []
        self._channel = grpc.insecure_channel(f"127.0.0.1:{hub.grpc_port}")
        self._server = grpc.server(futures.ThreadPoolExecutor(2), handlers=[self])
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def service(self, details):
        def relay(request, context):
            self.requests.append(request)
            is_lost = len(self.requests) <= self.losses
            answer = b""
            if self.hub_hears or not is_lost:
                try:
                    answer = self._channel.unary_unary(details.method)(request, timeout=5)
                except grpc.RpcError as error:
                    context.abort(error.code(), error.details())
            if is_lost:
                context.abort(grpc.StatusCode.UNAVAILABLE, "lost")
            return answer

        return grpc.unary_unary_rpc_method_handler(relay)

    def __enter__(self):
        self._server.start()
        return self

    def __exit__(self, *_):
        self._server.stop(None)
        self._channel.close()


class Wire:
    """A TCP connection to a hub, through here, that can be cut."""

    def __init__(self, port):
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._ends = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self):
        ends, self._ends = self._ends, []
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self):
        self._listener.close()
        self.cut()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._port))
                self._ends += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)


@pytest.fixture
def wire(hub):
    wire = Wire(hub.grpc_port)
    yield wire
    wire.close()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def lasting(settings, tmp_path):
    """Settings of a hub that comes back at the same address with the same policies."""
    hub = msgspec.structs.replace(settings.hub, grpc_address=f"127.0.0.1:{free_port()}")
    state = StateSettings(sqlite=str(tmp_path / "state.db"))
    return msgspec.structs.replace(settings, hub=hub, state=state)


def kill(hub):
    hub.process.kill()
    hub.process.wait()
    hub.stop()


@contextlib.contextmanager
def coming_back(settings, after=0.5):
    """A hub that starts while the block runs."""
    started = []
    timer = threading.Timer(after, lambda: started.append(launcher.start_hub(settings)))
    timer.start()
    try:
        yield
    finally:
        timer.join()
        for hub in started:
            hub.stop()


REPEATED = {
    "get": lambda client, etag: client.get_policy("kept"),
    "list": lambda client, etag: client.list_policies(),
    "features": lambda client, etag: client.list_features(),
    "rules": lambda client, etag: client.get_rules(),
    "create": lambda client, etag: client.create_policy("new", [CLAMP]),
    "update": lambda client, etag: client.update_policy("kept", description="x", etag=etag),
    "delete": lambda client, etag: client.delete_policy("kept", etag=etag),
}
ONCE = {
    "update": lambda client: client.update_policy("kept", description="x"),
    "delete": lambda client: client.delete_policy("kept"),
    "rules": lambda client: client.update_rules(default_policy="force-known"),
    "steer": lambda client: client.steer_request("chatcmpl-x", policy="force-known"),
    "release": lambda client: client.release_request("chatcmpl-x"),
}


@pytest.mark.parametrize("call", ["list", "create", "update"])
def test_a_call_that_may_be_repeated_outlasts_a_hub_that_is_killed_and_started_again(
    kind, lasting, call
):
    hub = launcher.start_hub(lasting)
    with kind(lasting.hub.grpc_address) as client:
        etag = client.create_policy("kept", [CLAMP]).etag
        kill(hub)
        with coming_back(lasting):
            REPEATED[call](client, etag)


@pytest.fixture
def etag(shared_hub):
    """Of a policy named ``kept``; it and ``new`` are gone afterwards."""
    with Client(f"127.0.0.1:{shared_hub.grpc_port}") as client:
        yield client.create_policy("kept", [CLAMP]).etag
        for name in ("kept", "new"):
            client.delete_policy(name, allow_missing=True)
        client.update_rules(default_policy=None)


@pytest.mark.parametrize("call", ["get", "list", "create"])
def test_the_call_is_made_again_until_it_is_answered(kind, shared_hub, etag, call):
    with Relay(shared_hub, losses=2) as relay, kind(relay.address) as client:
        REPEATED[call](client, etag)
    assert len(relay.requests) == 3
    assert len(set(relay.requests)) == 1


def test_a_creation_whose_answer_was_lost_is_the_same_creation(kind, shared_hub, etag):
    with Relay(shared_hub, losses=1) as relay, kind(relay.address) as client:
        made = client.create_policy("new", [CLAMP])
        assert len(client.list_policy_revisions("new")) == 1
    first, second, _ = relay.requests
    assert pb.CreatePolicyRequest.FromString(first).request_id
    assert first == second
    assert made.revision_id


@pytest.mark.parametrize("call", ["update", "delete"])
def test_with_an_etag_a_change_is_made_again(kind, shared_hub, etag, call):
    with Relay(shared_hub, losses=2, hub_hears=False) as relay, kind(relay.address) as client:
        REPEATED[call](client, etag)
    assert len(relay.requests) == 3


@pytest.mark.parametrize("call", ONCE)
def test_what_is_not_safe_to_repeat_is_sent_once(kind, shared_hub, etag, call):
    with Relay(shared_hub, losses=1, hub_hears=False) as relay, kind(relay.address) as client:
        with pytest.raises(CallError) as caught:
            ONCE[call](client)
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert len(relay.requests) == 1


def test_a_call_is_not_repeated_for_ever(kind, shared_hub):
    with Relay(shared_hub, losses=1000, hub_hears=False) as relay, kind(relay.address) as client:
        with pytest.raises(CallError) as caught:
            client.get_policy("force-known")
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert len(relay.requests) == 5


def test_the_deadline_holds_for_all_repetitions_together(kind, shared_hub):
    with Relay(shared_hub, losses=1000, hub_hears=False) as relay, kind(relay.address) as client:
        with pytest.raises(CallError) as caught:
            client.get_policy("force-known", timeout=0.5)
        assert caught.value.code in (
            grpc.StatusCode.DEADLINE_EXCEEDED,
            grpc.StatusCode.UNAVAILABLE,
        )
    assert len(relay.requests) < 5


class Reader:
    """The events of a watch of either client, one at a time."""

    def __init__(self, client, watched):
        self._client = client
        self.watch = watched

    def next(self):
        if hasattr(self._client, "loop"):
            return self._client.loop.run_until_complete(anext(self.watch))
        return next(self.watch)

    def open(self):
        if hasattr(self._client, "loop"):
            self._client.loop.run_until_complete(self.watch.__aenter__())
        return self


def reading(client, name, *arguments, **options):
    inner = getattr(client, "client", client)
    return Reader(client, getattr(inner, name)(*arguments, **options)).open()


def told_of(worker, catalog, *names):
    for name in names:
        worker.send(frame(catalog, (name, 0, 1), started=(start(name, 1),)))


def test_a_watch_goes_on_where_it_was_cut_off(kind, hub, wire, worker, catalog):
    with kind(wire.address) as client:
        events = reading(client, "watch_requests")
        told_of(worker, catalog, "a")
        assert events.next().started.name == "requests/a"
        wire.cut()
        told_of(worker, catalog, "b", "c")
        assert [events.next().started.name for _ in "bc"] == ["requests/b", "requests/c"]
        assert (events.watch.missed, events.watch.gaps) == (0, 0)
        assert events.watch.cursor
        events.watch.close()


def test_another_watch_goes_on_from_a_cursor(kind, hub, worker, catalog):
    with kind(f"127.0.0.1:{hub.grpc_port}") as client:
        events = reading(client, "watch_requests")
        told_of(worker, catalog, "a", "b")
        cursor = events.next().cursor
        events.watch.close()
        later = reading(client, "watch_requests", cursor=cursor)
        assert later.next().started.name == "requests/b"
        later.watch.close()


def test_activations_of_a_request_are_whole_after_a_cut(kind, hub, wire, worker, catalog):
    with kind(wire.address) as client:
        events = reading(client, "watch_activations", "a", ["known"])
        worker.send(frame(catalog, ("a", 0, 3), started=(start("a", 3),), acts=1.0))
        (first,) = events.next().features
        wire.cut()
        worker.send(frame(catalog, ("a", 3, 1), acts=2.0, finished=("a",)))
        positions = list(range(first.first_position, len(first.activations)))
        values = list(first.activations)
        while True:
            event = events.next()
            for track in event.features:
                positions += range(
                    track.first_position, track.first_position + len(track.activations)
                )
                values += track.activations
            if event.finished:
                break
        with pytest.raises((StopIteration, StopAsyncIteration)):
            events.next()
    assert (positions, values) == ([0, 1, 2, 3], [1.0, 1.0, 1.0, 2.0])


def test_scores_are_watched_by_signal_and_band(kind, hub, worker, catalog):
    with kind(f"127.0.0.1:{hub.grpc_port}") as client:
        events = reading(client, "watch_signals", ["in_answer"], ["high"])
        for name, value in (("dull", 0.0), ("vivid", 9.0)):
            worker.send(
                frame(
                    catalog, (name, 0, 3), started=(start(name, 1),), acts=value, finished=(name,)
                )
            )
        event = events.next()
        assert event.request == "requests/vivid"
        assert [(s.signal, s.label) for s in event.signals] == [("in_answer", "high")]
        events.watch.close()


def test_a_watch_begins_anew_with_another_hub_and_says_that_it_missed_something(
    kind, lasting, catalog
):
    hub = launcher.start_hub(lasting)
    with kind(lasting.hub.grpc_address) as client:
        events = reading(client, "watch_requests")
        worker = Worker(hub.endpoint)
        told_of(worker, catalog, "a")
        events.next()
        worker.close()
        kill(hub)
        second = launcher.start_hub(lasting)
        try:
            found, stop = [], threading.Event()

            def keep_telling():
                worker = Worker(second.endpoint)
                i = 0
                while not stop.wait(0.05):
                    told_of(worker, catalog, f"b{i}")
                    i += 1
                worker.close()

            telling = threading.Thread(target=keep_telling)
            telling.start()
            found.append(events.next())
            stop.set()
            telling.join()
            assert found[0].started.name.startswith("requests/b")
            assert events.watch.gaps == 1
            events.watch.close()
        finally:
            second.stop()


def test_a_hub_that_never_comes_back_is_an_error(kind, monkeypatch):
    monkeypatch.setattr(watch, "LONGEST_PAUSE_SECONDS", 0.05)
    with kind(f"127.0.0.1:{free_port()}") as client, pytest.raises(CallError) as caught:
        reading(client, "watch_requests").next()
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE


def test_a_cursor_that_the_caller_brings_from_another_hub_is_an_error(
    kind, hub, settings, worker, catalog
):
    with kind(f"127.0.0.1:{hub.grpc_port}") as client:
        events = reading(client, "watch_requests")
        told_of(worker, catalog, "a")
        cursor = events.next().cursor
        events.watch.close()
    other = launcher.start_hub(settings)
    try:
        with kind(f"127.0.0.1:{other.grpc_port}") as client, pytest.raises(CallError) as caught:
            reading(client, "watch_requests", cursor=cursor).next()
        assert caught.value.code is grpc.StatusCode.OUT_OF_RANGE
    finally:
        other.stop()


def test_a_closed_watch_ends(kind, hub):
    with kind(f"127.0.0.1:{hub.grpc_port}") as client:
        events = reading(client, "watch_requests")
        events.watch.close()
        with pytest.raises((StopIteration, StopAsyncIteration)):
            events.next()


def test_a_watch_can_be_closed_while_it_waits(kind, hub):
    with kind(f"127.0.0.1:{hub.grpc_port}") as client:
        events = reading(client, "watch_requests")
        if hasattr(client, "loop"):
            client.loop.call_later(0.2, events.watch.close)
        else:
            threading.Timer(0.2, events.watch.close).start()
        with pytest.raises((StopIteration, StopAsyncIteration)):
            events.next()
