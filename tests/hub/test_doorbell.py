"""A ring is never lost, and nobody wakes for nothing."""

import threading
import time
from collections import deque

import zmq
from steerscope.hub.doorbell import Doorbell

NUM_THREADS, NUM_RINGS = 4, 3000


def test_what_many_threads_leave_is_all_found_without_waiting_for_the_clock():
    bell, queue = Doorbell(), deque()

    def leave(number):
        for i in range(NUM_RINGS):
            queue.append((number, i))
            bell.ring()
            if i % 100 == 0:
                time.sleep(0.0005)

    threads = [threading.Thread(target=leave, args=(n,)) for n in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    found = []
    while len(found) < NUM_THREADS * NUM_RINGS:
        before = len(found)
        bell.wait(20.0)
        while queue:
            found.append(queue.popleft())
        is_over = not any(thread.is_alive() for thread in threads)
        assert len(found) > before or not is_over, "woken by the clock: a ring was lost"
    for thread in threads:
        thread.join()
    assert sorted(found) == [(n, i) for n in range(NUM_THREADS) for i in range(NUM_RINGS)]


def test_rings_before_the_wait_count_once():
    bell = Doorbell()
    for _ in range(5):
        bell.ring()
    bell.wait(20.0)
    began = time.monotonic()
    bell.wait(0.2)
    assert time.monotonic() - began >= 0.19


def test_a_message_for_a_socket_wakes_too():
    with (
        zmq.Context() as context,
        context.socket(zmq.PAIR) as here,
        context.socket(zmq.PAIR) as far,
    ):
        here.bind("inproc://here")
        far.connect("inproc://here")
        bell = Doorbell()
        bell.watch(here)
        far.send(b"news")
        bell.wait(20.0)
        assert here.recv(zmq.DONTWAIT) == b"news"
