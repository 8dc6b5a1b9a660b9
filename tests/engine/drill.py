"""A drill: hub, Redis and clients are killed at random times under load, and nothing may give.

`python tests/engine/drill.py [ROUNDS] [SEED]` kills ROUNDS times (60) and prints one JSON line
for each launch it drilled, the last with the sum. What must hold:

- every request gets exactly the tokens that its steering gives in plain Transformers, or is
  refused (HTTP 400, naming the field);
- a policy whose creation was answered is there and can be used, one that was deleted or has
  expired cannot, hub or no hub;
- the kill switch holds from its answer on, hub or no hub;
- a report that calls itself complete has every token, and the steering that was asked.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import tiny
from engine_process import HEALTHY_ENV, EngineProcess
from hf_reference import Reference
from steerscope.api.v1 import steering_pb2, telemetry_pb2
from steerscope.client import Client
from steerscope.errors import SteerscopeError
from steerscope.steering.rules import Override, OverrideMode

NUM_TOKENS = 24
PACE = 0.02
FOREVER = 100_000
RECOVERY_SECONDS = 60
TTL_SECONDS = 1.5
EDITS: tuple[dict[str, Any], ...] = (
    {"feature": "direction_1", "add": 8.0},
    {"feature": "direction_2", "add": -9.0},
    {"feature": "latent_1", "clamp": 9.0},
    {"feature": "unit_2", "clamp": 12.0, "phase": "generation"},
)
DECLARED = "push"
"""A policy of the catalog; it is ``EDITS[0]``."""
OFF = "off"
TELLING = "of those, with tokens that tell the difference"

Tokens = list[int]


@dataclass
class Asked:
    """One request, and what may become of it."""

    prompt: int
    edit: int | None
    """Which of ``EDITS``; None for none."""
    policy: str = ""
    is_live: bool = False
    """Steered over gRPC while it runs."""


@dataclass
class Book:
    """What the operator knows of its policies; ``moved`` says when it last touched a name."""

    acked: dict[str, int] = field(default_factory=dict)
    until: dict[str, tuple[float, float]] = field(default_factory=dict)
    """When it expires: not before, and not after."""
    gone: dict[str, int] = field(default_factory=dict)
    unsure: dict[str, int] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)
    switched: float = 0.0
    """When the kill switch was last touched, or answered."""
    switch: str | None = ""
    """``off``, or empty; None while that is not known."""


class Drill:
    """One launch under load. ``counts`` and ``violations`` are the outcome."""

    def __init__(self, folder: Path, redis: Redis | None = None, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.violations: list[str] = []
        self.outages: list[float] = []
        model = tiny.write_model(folder / "model")
        catalog = tiny.write_catalog(folder / "catalog", model)
        config = tiny.write_config(folder / "steerscope.yaml", catalog)
        tree = json.loads(config.read_text())
        if redis is not None:
            tree["state"] = {"redis": {"url": f"redis://127.0.0.1:{redis.port}/0"}}
            config.write_text(json.dumps(tree))
        self.redis = redis
        self.address = tree["hub"]["grpc_address"]
        self.prompts = tiny.prompts(8, seed=71, low=6, high=30)
        self.reference = Reference(model, catalog)
        self._known: dict[tuple[int, int | None, int], Tokens] = {}
        for prompt in range(len(self.prompts)):
            for edit in (None, *range(len(EDITS))):
                self.expected(prompt, edit)
        self.book = Book()
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.engine = EngineProcess(
            model,
            config,
            folder / "engine.log",
            environment={HEALTHY_ENV: "1"},  # else delays double with every kill
            enforce_eager=True,
        )
        self.num_asked = 0

    def run(self, rounds: int, targets: tuple[str, ...], enough: int = 0) -> dict[str, Any]:
        """Kill so often; all else goes on, also after, until so many requests were telling."""
        threads = [
            threading.Thread(target=self._told, args=(work,))
            for work in (self._operate, self._load)
        ]
        watcher = self._watcher()
        for thread in threads:
            thread.start()
        try:
            for round_ in range(rounds):
                target = targets[round_ % len(targets)]
                time.sleep(self.random.uniform(0.2, 2.5))
                if target == "client":
                    watcher.kill()
                    watcher.wait()
                    watcher = self._watcher()
                else:
                    self._kill(target)
                self.counts[f"kills of {target}"] += 1
            time.sleep(3.0)
            eventually(lambda: self.violations or self.counts[TELLING] >= enough, 90)
        finally:
            self.over.set()
            for thread in threads:
                thread.join(120)
            watcher.kill()
            watcher.wait()
        self._settle()
        return self.outcome()

    def _told(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self.violated(f"the drill itself failed: {error!r}")
            raise

    def outcome(self) -> dict[str, Any]:
        """All that was counted."""
        outages = sorted(self.outages)
        return {
            "state": "sqlite in the launch's folder" if self.redis is None else "redis",
            **self.counts,
            "hub away, median s": round(outages[len(outages) // 2], 2) if outages else None,
            "hub away, most s": round(outages[-1], 2) if outages else None,
            "violations": self.violations,
        }

    def close(self) -> None:
        """End the launch."""
        self.engine.stop()

    def expected(self, prompt: int, edit: int | None, start: int = 0) -> Tokens:
        """What plain Transformers says, edited from the position ``start`` on."""
        key = (prompt, edit, start)
        if key not in self._known:
            edits = [] if edit is None else [{**EDITS[edit], "span": [start, FOREVER]}]
            self._known[key] = self.reference.generate(self.prompts[prompt], NUM_TOKENS, edits)[0]
        return self._known[key]

    def violated(self, what: str) -> None:
        self.violations.append(what)

    # Killing.

    def hub(self) -> psutil.Process | None:
        """The hub of the launch, if it has one now."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.engine.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "steerscope.hub" in child.cmdline():
                        return child
        return None

    def _kill(self, target: str) -> None:
        if target == "redis":
            assert self.redis is not None
            self.redis.kill()
            time.sleep(self.random.uniform(0.1, 3.0))
            self.redis.start()
            return
        hub = eventually(self.hub)
        hub.send_signal(signal.SIGKILL)
        began = time.monotonic()
        eventually(lambda: _is_gone(hub))
        if self.random.random() < 0.2:  # and the next one too, while it starts
            with contextlib.suppress(psutil.Error, AssertionError):
                again = eventually(lambda: (h := self.hub()) and h.pid != hub.pid and h, 5)
                time.sleep(self.random.uniform(0.0, 0.8))
                again.send_signal(signal.SIGKILL)
                self.counts["kills of a hub that starts"] += 1
        if self.random.random() < 0.7:  # else the next kill comes while it is away
            eventually(lambda: _answers(self.address), RECOVERY_SECONDS)
            self.outages.append(time.monotonic() - began)

    def _watcher(self) -> subprocess.Popen[bytes]:
        """A client that watches, and changes policies of its own; it is there to be killed."""
        return subprocess.Popen([sys.executable, "-c", WATCHER, self.address], stderr=-3)

    # The operator: policies come and go, and the kill switch is turned.

    def _operate(self) -> None:
        with Client(self.address) as client:
            for i in range(1_000_000):
                if self.over.is_set():
                    return
                choice = random.Random(i).random()
                if self.book.switch and choice < 0.3:  # off is the exception
                    self._turn(client)
                elif choice < 0.5:
                    self._create(client, f"p-{i}", i % len(EDITS), None)
                elif choice < 0.65:
                    self._create(client, f"b-{i}", i % len(EDITS), TTL_SECONDS)
                elif choice < 0.85:
                    self._delete(client)
                elif choice < 0.92:
                    self._turn(client)
                else:
                    self._check_list(client)
                time.sleep(0.1)

    def _create(self, client: Client, name: str, edit: int, ttl: float | None) -> None:
        book = self.book
        with self.lock:
            book.unsure[name], book.moved[name] = edit, time.time()
        asked_at = time.time()
        try:
            client.create_policy(name, [EDITS[edit]], ttl=ttl)
            answer = "answered"
        except SteerscopeError:
            answer = "not answered"
        self.counts[f"policy changes {answer}"] += 1
        with self.lock:
            if answer == "answered":
                book.acked[name] = book.unsure.pop(name)
            if ttl is not None:
                book.until[name] = (asked_at + ttl, time.time() + ttl)

    def _delete(self, client: Client) -> None:
        book = self.book
        with self.lock:
            lasting = [name for name in book.acked if name not in book.until]
            if len(lasting) < 4:
                return
            name = lasting[0]
            edit = book.unsure[name] = book.acked.pop(name)
            book.moved[name] = time.time()
        try:
            client.delete_policy(name, allow_missing=True)
        except SteerscopeError:
            self.counts["policy changes not answered"] += 1
            return
        self.counts["policy changes answered"] += 1
        with self.lock:
            book.gone[name] = edit
            del book.unsure[name]

    def _turn(self, client: Client) -> None:
        """Turn the kill switch, and do not rest until that was answered."""
        wanted = "" if self.book.switch else OFF
        with self.lock:
            self.book.switch, self.book.switched = None, time.time()
        override = Override(mode=OverrideMode.OFF, reason="drill") if wanted else None
        while True:
            try:
                client.update_rules(override=override)
                break
            except SteerscopeError:
                self.counts["turns of the kill switch not answered"] += 1
                time.sleep(0.1)
                if self.over.is_set():
                    return
        self.counts["turns of the kill switch answered"] += 1
        with self.lock:
            self.book.switch, self.book.switched = wanted, time.time()

    def _check_list(self, client: Client) -> None:
        try:
            listed = client.list_policies("origin=created")
        except SteerscopeError:
            return
        names = {policy.name.removeprefix("policies/") for policy in listed}
        self.counts["lists compared"] += 1
        with self.lock:
            for name in self.book.acked:
                if name not in names and name not in self.book.until:
                    self.violated(f"policy {name} was acknowledged and is not listed")
            for name in self.book.gone:
                if name in names:
                    self.violated(f"policy {name} was deleted and is listed")

    def _settle(self) -> None:
        """In the end everything is there again, and the list is compared once more."""

        def is_listed() -> bool:
            with Client(self.address) as client:
                before = self.counts["lists compared"]
                self._check_list(client)
                return self.counts["lists compared"] > before

        eventually(lambda: _answers(self.address), RECOVERY_SECONDS)
        if self.redis is None:
            eventually(is_listed, RECOVERY_SECONDS)
        self.counts["policies acknowledged and kept"] = len(self.book.acked)

    # Requests.

    def _load(self) -> None:
        chance = random.Random(5)
        with Client(self.address, timeout=1.0) as client:
            while not self.over.is_set():
                self._batch(client, chance)

    def _batch(self, client: Client, chance: random.Random) -> None:
        asked = self._choose(chance)
        with self.lock:
            before = (self.book.switch, self.book.switched)
        began, first = time.time(), self.num_asked
        self.num_asked += len(asked)
        steered: list[tuple[str, int]] = []
        steerer = threading.Thread(
            target=self._steer, args=(client, f"req-{first}", chance.uniform(0.05, 0.5), steered)
        )
        steerer.start()
        results = self.engine.run(*(self._request(a) for a in asked))
        ended = time.time()
        steerer.join()
        with self.lock:
            is_steady = before == (self.book.switch, self.book.switched)
        is_steady = is_steady and before[0] is not None
        self.counts["batches"] += 1
        if _answers(self.address):
            for request, result in chance.sample(list(zip(asked, results, strict=True)), 4):
                self._judge_report(client, request, result)
        for request, result in zip(asked, results, strict=True):
            self.counts["requests"] += 1
            if not is_steady:
                self.counts["requests across a turn of the kill switch"] += 1
            elif request.is_live:
                self._judge_live(request, result, steered, is_off=bool(before[0]))
            else:
                self._judge(request, result, began, ended, is_off=bool(before[0]))

    def _choose(self, chance: random.Random) -> list[Asked]:
        with self.lock:
            book = self.book
            pools = (book.acked, book.gone, book.unsure)
            named = [chance.choice(list(pool.items())[-12:]) for pool in pools if pool]
            brief = [(n, e) for n, e in book.acked.items() if n in book.until][-2:]
            kept = list(book.acked.items())[:2]
        prompt = lambda: chance.randrange(len(self.prompts))  # noqa: E731
        asked = [Asked(prompt(), edit, name) for name, edit in (*named, *brief, *kept)]
        asked += [Asked(prompt(), 0, DECLARED), Asked(prompt(), chance.randrange(len(EDITS)))]
        asked += [Asked(prompt(), None), Asked(prompt(), None, is_live=True)]  # it is req-FIRST
        return asked

    def _request(self, asked: Asked) -> dict[str, Any]:
        request = {"prompt": self.prompts[asked.prompt], "max_tokens": NUM_TOKENS, "pace": PACE}
        if asked.policy:
            request["extra_args"] = {"steering": asked.policy}
        elif asked.edit is not None:
            inline = {"interventions": [EDITS[asked.edit]]}
            request["extra_args"] = {"steering": json.dumps(inline)}
        return request

    def _steer(
        self, client: Client, name: str, delay: float, steered: list[tuple[str, int]]
    ) -> None:
        """Steer it while it runs: ``EDITS[1]`` from a position that the answer names."""
        time.sleep(delay)
        try:
            told = client.steer_request(name, interventions=[EDITS[1]], ttl=5.0)
        except SteerscopeError:
            steered.append(("refused or not answered", 0))
            return
        if told.state == steering_pb2.STEER_STATE_APPLIED:
            steered.append(("applied", told.sequences[0].first_position))
        else:  # a hub that came meanwhile does not know it yet, but the engine does
            steered.append(("waiting", 0))

    def _judge(
        self, asked: Asked, result: dict[str, Any], began: float, ended: float, *, is_off: bool
    ) -> None:
        may_serve, may_refuse = self._may(asked, began, ended)
        if "error" in result:
            self.counts["requests refused"] += 1
            if result["parameter"] != "vllm_xargs.steering":
                self.violated(f"refused without naming the field: {result}")
            elif not may_refuse:
                self.violated(f"{asked} was refused: {result['error']}")
            elif not self._is_doubtful(asked, began, ended):
                self.counts["of those, since the hub started without Redis"] += 1
            return
        if not may_serve:
            self.violated(f"{asked} was served, and its policy is not there")
            return
        edit = None if is_off else asked.edit
        if result["tokens"][0] != self.expected(asked.prompt, edit):
            self.violated(f"{asked} was not served as asked; the kill switch is {is_off}")
        self._count(asked, is_off)

    def _count(self, asked: Asked, is_off: bool) -> None:
        if asked.edit is None:
            self.counts["unsteered requests compared"] += 1
        elif is_off:
            self.counts["requests under the kill switch compared"] += 1
        else:
            self.counts["steered requests compared"] += 1
        base = self.expected(asked.prompt, None)
        if asked.edit is not None and self.expected(asked.prompt, asked.edit) != base:
            self.counts[TELLING] += 1

    def _is_doubtful(self, asked: Asked, began: float, ended: float) -> bool:
        """Whether its policy was not there for certain."""
        name, book = asked.policy, self.book
        with self.lock:
            was_moved = book.moved.get(name, 0.0) >= began or name not in book.acked
            return was_moved or book.until.get(name, (FOREVER * ended,))[0] <= ended

    def _may(self, asked: Asked, began: float, ended: float) -> tuple[bool, bool]:
        """Whether it may be served, and whether it may be refused."""
        name, book = asked.policy, self.book
        if name in ("", DECLARED):
            return True, False
        with self.lock:
            not_before, not_after = book.until.get(name, (FOREVER * ended, FOREVER * ended))
            if book.moved.get(name, 0.0) >= began or name in book.unsure:
                return not_after > began, True
            if name in book.gone:
                return False, True
        if not_before <= ended:
            return not_after > began, True
        # A hub that starts while Redis is away has the declared policies only.
        return True, self.redis is not None

    def _judge_live(
        self, asked: Asked, result: dict[str, Any], steered: list[Any], *, is_off: bool
    ) -> None:
        tokens, prompt = result["tokens"][0], self.prompts[asked.prompt]
        outcome, position = steered[0]
        self.counts[f"live steers {outcome}"] += 1
        base = self.expected(asked.prompt, None)
        if is_off:
            allowed: Iterator[Tokens] = iter([base])
        elif outcome == "applied":
            allowed = iter([self.expected(asked.prompt, 1, position)])
        else:
            starts = range(len(prompt) - 1, len(prompt) + NUM_TOKENS)
            late = (self.expected(asked.prompt, 1, start) for start in starts)
            allowed = (each for group in ([base], late) for each in group)
        if all(tokens != each for each in allowed):
            self.violated(f"live steer of {asked} {outcome} at {position} is not what was served")

    def _judge_report(self, client: Client, asked: Asked, result: dict[str, Any]) -> None:
        """A report may say that it is not complete, or not be there; it may not lie."""
        if "error" in result:
            return
        try:
            report = client.get_request_report(result["request_id"], wait=0.2, timeout=1.0)
        except SteerscopeError:
            self.counts["reports not there"] += 1
            return
        for completion in report.completions:
            if not completion.complete:
                self.counts["reports not complete"] += 1
                continue
            self.counts["reports complete"] += 1
            whole = len(self.prompts[asked.prompt]) + len(result["tokens"][0]) - 1
            is_running = completion.state != telemetry_pb2.REQUEST_STATE_FINISHED
            if completion.num_observed_tokens != whole and not is_running:
                self.violated(f"complete with {completion.num_observed_tokens} of {whole} tokens")
            if completion.steering_digest != report.asked_steering_digest:
                self.violated(f"complete, but not steered as asked: {asked}")


class Redis:
    """A Redis that keeps what it acknowledged."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1"]
        self._command += ["--dir", str(folder), "--save", "", "--appendonly", "yes"]
        self._command += ["--appendfsync", "always"]
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        eventually(lambda: _answers(f"127.0.0.1:{self.port}"))

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


WATCHER = """
import sys, threading, itertools
from steerscope.client import Client
client = Client(sys.argv[1])
def change():
    for i in itertools.count():
        try:
            client.create_policy(f"w-{i % 5}", [{"feature": "direction_1", "add": 1.0}],
                                 ttl=600, validate_only=True)
            client.list_policies()
        except Exception:
            pass
threading.Thread(target=change, daemon=True).start()
while True:
    try:
        for event in client.watch_requests():
            pass
    except Exception:
        pass
"""


def eventually(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """The first true value; fails when there is none in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return value


def _is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1.0):
        return True
    return False


def main(rounds: int = 60, seed: int = 0) -> int:
    """Half of the rounds with the launch's own state, half with a Redis."""
    total: Counter[str] = Counter()
    num_violations = 0
    for kind, targets in (
        ("own", ("hub", "hub", "client")),
        ("redis", ("hub", "redis", "redis", "client")),
    ):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            redis = Redis(folder) if kind == "redis" else None
            drill = Drill(folder, redis, seed)
            try:
                line = drill.run(rounds // 2, targets)
            finally:
                drill.close()
                if redis is not None:
                    redis.kill()
        print(json.dumps(line), flush=True)
        total.update(drill.counts)
        num_violations += len(drill.violations)
    print(json.dumps({"total": total, "violations": num_violations}), flush=True)
    return int(num_violations > 0)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
