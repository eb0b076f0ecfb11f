"""Answers that take much longer than the others are requested again, but never many."""

import functools
import math
import threading
import time

import pytest

from known_servers import Ranged, running
from minecube.catalog import Access
from minecube.reader import connections, remote
from minecube.reader.connections import Pace
from minecube.reader.remote import Remote
from minecube.reader.transfer import Tally

CONTENT = bytes(range(256)) * 256


class Slow(Ranged):
    """Calls `wait` with the number of each request before it answers."""

    wbufsize = 4096  # an answer in two packets would take 40 ms

    def __init__(self, wait, seen, *args, **kwargs):
        self.wait, self.seen = wait, seen
        super().__init__(*args, **kwargs)

    def do_GET(self):  # noqa: N802  named by http.server
        self.seen.append(self.path)
        self.wait(len(self.seen))
        super().do_GET()


def read_times(folder, times, wait):
    """Read two bytes so many times: the tally, and the number of requests that the server saw."""
    (folder / "x.bin").write_bytes(CONTENT)
    tally, seen = Tally(), []
    with running(functools.partial(Slow, wait, seen, directory=str(folder))) as url:
        source = Remote(Access())
        head = source.head(f"{url}/x.bin", tally)
        for n in range(1, times):
            start = remote.HEAD_BYTES + 7 * n
            assert source.fetch(f"{url}/x.bin", head, start, 2, tally) == CONTENT[start : start + 2]
    return tally, len(seen)


@pytest.fixture
def patient(monkeypatch):
    """No answer stalls: only its lateness can end a try."""
    monkeypatch.setattr(remote, "_STALL_S", 1000.0)


@pytest.mark.usefixtures("patient")
def test_a_late_answer_is_requested_again(tmp_path):
    """The hundredth request is never answered while the client waits; the next one is."""
    over = threading.Event()
    try:
        tally, seen = read_times(tmp_path, 100, lambda n: n == 100 and over.wait(60))
    finally:
        over.set()
    assert (tally.requests, tally.retried, seen) == (101, 1, 101)


@pytest.mark.usefixtures("patient")
def test_a_host_that_becomes_slow_gets_few_more_requests(tmp_path, monkeypatch):
    monkeypatch.setattr(connections, "_LEAST_LATE_S", 0.01)
    tally, seen = read_times(tmp_path, 130, lambda n: n > 100 and time.sleep(0.05))
    assert tally.requests == seen == 130 + tally.retried
    assert tally.retried <= 130 * 0.02


def test_few_answers_say_nothing():
    pace = Pace()
    for _ in range(49):
        pace.add(0.1)
    assert pace.late_s() == math.inf
    assert not pace.may_repeat()
    pace.add(0.1)
    assert pace.late_s() == pytest.approx(0.4)
    assert [pace.may_repeat() for _ in range(3)] == [True, False, False]


def test_the_slowest_answers_do_not_count_as_usual():
    pace = Pace()
    for n in range(200):
        pace.add(2.0 if n % 50 == 0 else 0.1)
    assert pace.late_s() == pytest.approx(0.4)


def test_a_slow_host_has_no_late_answers():
    pace = Pace()
    for seconds in [0.1] * 10_000 + [1.5] * 200:
        pace.add(seconds)
    assert pace.late_s() == pytest.approx(6.0)
    assert sum(pace.may_repeat() for _ in range(1000)) == 4


def test_one_answer_in_fifty_may_be_repeated():
    pace = Pace()
    repeated = 0
    for _ in range(10_000):
        pace.add(0.1)
        repeated += pace.may_repeat()
    assert repeated == 200
