"""How many requests a server runs is what has been seen: one at first, then one more on trial."""

from __future__ import annotations

import pytest

from pipeline.core.parallel import RunsAtOnce


class Server:
    """A server that runs so many requests and lets the others wait, in virtual time."""

    def __init__(self, runs: int, first_s: float = 0.5) -> None:
        self.runs, self.first_s = runs, first_s
        self.parallel = RunsAtOnce(4)
        self.now = 0.0
        self.running: list[str] = []
        self.waiting: list[str] = []
        self.number = 0

    def fill(self) -> None:
        while len(self.running) + len(self.waiting) < self.parallel.slots(self.now, measured=True):
            self.number += 1
            key = f"r{self.number}"
            self.parallel.begun(key, self.now)
            self.waiting.append(key)

    def step(self, seconds: float) -> None:
        """The running answers get parts for so long; waiting ones begin as far as the server runs them."""
        while self.waiting and len(self.running) < self.runs:
            self.running.append(self.waiting.pop(0))
        for _ in range(6):
            for key in self.running:
                self.parallel.part(key)
        self.now += seconds

    def end(self) -> None:
        self.parallel.ended(self.running.pop(0), self.now, self.first_s)


@pytest.mark.parametrize("runs", [1, 2, 3, 4, 8])
def test_the_number_is_found_and_never_exceeded_by_more_than_one(runs):
    server = Server(runs)
    for _ in range(40):
        server.fill()
        assert len(server.running) + len(server.waiting) <= runs + 1
        server.step(10.0)
        server.fill()
        server.step(10.0)
        server.end()
    assert server.parallel.known == min(runs, 4)


def test_a_server_that_lets_requests_wait_is_not_tried_again_for_a_while():
    server = Server(1)
    server.fill()
    server.step(1.0)
    assert server.parallel.slots(server.now, measured=True) == 2
    server.fill()
    server.step(10.0)
    server.end()
    server.step(1.0)
    assert server.parallel.slots(server.now, measured=True) == 1
    server.now += 700
    assert server.parallel.slots(server.now, measured=True) == 2


def test_a_request_sent_just_before_another_ended_proves_nothing():
    server = Server(1)
    server.fill()
    server.step(10.0)
    server.fill()
    server.now += 0.1
    server.end()
    server.step(1.0)
    assert server.parallel.slots(server.now, measured=True) == 2


def test_parts_that_are_read_late_are_not_taken_for_answers_side_by_side():
    parallel = RunsAtOnce(4)
    parallel.begun("a", 0.0)
    for _ in range(20):
        parallel.part("a")
    parallel.begun("b", 10.0)
    parallel.part("b")
    parallel.part("a")
    parallel.part("a")
    parallel.ended("a", 10.1, 0.5)
    for _ in range(20):
        parallel.part("b")
    assert parallel.known == 1


def test_nothing_is_tried_with_a_server_of_unknown_speed_or_beyond_the_most():
    parallel = RunsAtOnce(1)
    parallel.begun("a", 0.0)
    parallel.part("a")
    assert parallel.slots(0.0, measured=True) == 1
    parallel = RunsAtOnce(4)
    parallel.begun("a", 0.0)
    parallel.part("a")
    assert parallel.slots(0.0, measured=False) == 1


def test_a_server_can_say_it_and_a_restart_forgets_it():
    parallel = RunsAtOnce(4)
    parallel.told(9)
    assert parallel.slots(0.0, measured=False) == 4
    parallel.restarted()
    assert parallel.slots(0.0, measured=False) == 1
