"""Summaries of runs reach a real command and a real server, and no credential is in them."""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from known_run_failures import make_dataset
from minecube.errors import CatalogError, UnansweredError
from minecube.jobs.runs import RunOptions, Summary, run
from minecube.jobs.runs.notify import notifying
from minecube.jobs.runs.units import Unit
from minecube.jobs.runs.worker import Result

BUILD = Unit("build", "pit", 2020)
LATER = Unit("build", "pit", 2022)
GOOD = Result(state="done")
BAD = Result(
    state="failed",
    error_class="network",
    message="https://me:word@host.example/a.tif?sig=SECRET answers HTTP 503",
)


class _Hook(BaseHTTPRequestHandler):
    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append((self.path, self.headers["Content-Type"], content))
        self.send_response(self.server.code)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def hook():
    server = HTTPServer(("127.0.0.1", 0), _Hook)
    server.received = []
    server.code = 204
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def url_of(hook):
    return f"http://127.0.0.1:{hook.server_port}/services/TOKEN"


def do_units(dataset, summary, *ends):
    shown = []
    with notifying(dataset, summary, lambda *end: shown.append(end)) as progress:
        for unit, result in ends:
            summary.results[unit] = result
            progress(unit, result, 2)
    return shown


def test_a_webhook_gets_the_first_failure_and_the_end(tmp_path, world, hook):
    dataset = make_dataset(tmp_path, world, notify={"webhook": url_of(hook)})
    units = (Unit("search", "pit", 2020), GOOD), (BUILD, BAD), (LATER, BAD)
    assert [end[0] for end in do_units(dataset, Summary(), *units)] == [unit for unit, _ in units]
    paths, kinds, contents = zip(*hook.received, strict=True)
    assert set(paths) == {"/services/TOKEN"}
    assert set(kinds) == {"application/json"}
    first, last = map(json.loads, contents)
    assert (first["event"], last["event"]) == ("first failure", "finished")
    assert (last["dataset"], last["done"], last["failed"]) == ("pits", {"search": 1}, {"build": 2})
    assert last["failures"][0] == {
        "step": "build",
        "site": "pit",
        "year": 2020,
        "error_class": "network",
        "message": "https://host.example/a.tif answers HTTP 503",
    }
    for content in contents:
        assert b"SECRET" not in content
        assert b"word" not in content


def test_a_command_reads_the_summary_of_a_real_run(tmp_path, world):
    command = f"cat > {tmp_path}/summary.json"
    dataset = make_dataset(tmp_path, world, notify={"command": command})
    summary = run(dataset, RunOptions(only=("search",)))
    sent = json.loads((tmp_path / "summary.json").read_text())
    assert (sent["event"], sent["done"], sent["failed"]) == ("finished", {"search": 2}, {})
    assert summary.exit_code == 0


def test_a_stall_is_told_once_until_a_unit_ends(tmp_path, world, hook):
    notify = {"webhook": url_of(hook), "stall_minutes": 0.1 / 60}
    dataset = make_dataset(tmp_path, world, notify=notify)
    summary = Summary()

    def wait_for(messages):
        while len(hook.received) < messages:
            time.sleep(0.01)

    with notifying(dataset, summary, lambda *_: None) as progress:
        wait_for(1)
        time.sleep(0.3)  # three times as long as a stall
        assert len(hook.received) == 1
        progress(BUILD, GOOD, 2)
        wait_for(2)
    events = [json.loads(content)["event"] for _, _, content in hook.received]
    assert events == ["stalled", "stalled", "finished"]


def test_an_error_stops_the_run_and_is_told(tmp_path, world, hook):
    dataset = make_dataset(tmp_path, world, notify={"webhook": url_of(hook)})
    with pytest.raises(KeyboardInterrupt), notifying(dataset, Summary(), lambda *_: None):
        raise KeyboardInterrupt
    ((_, _, content),) = hook.received
    assert json.loads(content)["event"] == "stopped"


@pytest.mark.parametrize(
    ("notify", "warning"),
    [
        ({"command": "exit 3"}, "the command ended with code 3 for 'finished'"),
        ({"webhook": "http://127.0.0.1:1/services/TOKEN"}, "the webhook failed for 'finished'"),
        ({"webhook": "HOOK"}, "the webhook answered HTTP 500 for 'finished'"),
    ],
)
def test_a_failing_notification_is_a_warning(tmp_path, world, hook, caplog, notify, warning):
    hook.code = 500
    if notify.get("webhook") == "HOOK":
        notify = {"webhook": url_of(hook)}
    dataset = make_dataset(tmp_path, world, notify=notify)
    with caplog.at_level(logging.WARNING, "minecube"):
        do_units(dataset, Summary(), (BUILD, GOOD))
    assert warning in caplog.text
    assert "TOKEN" not in caplog.text  # the address of a webhook is a secret


def test_an_error_before_the_first_unit_is_told(tmp_path, world, hook):
    dataset = make_dataset(tmp_path, world, notify={"webhook": url_of(hook)})
    with pytest.raises(CatalogError, match="atlantis"):
        run(dataset, RunOptions(sites="atlantis"))
    ((_, _, content),) = hook.received
    message = json.loads(content)
    assert message["event"] == "stopped"
    assert "atlantis" in message["reason"]


def test_sigterm_stops_the_run_and_is_told(tmp_path, world, hook):
    dataset = make_dataset(tmp_path, world, notify={"webhook": url_of(hook)})
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run(dataset, RunOptions(only=("search",)), lambda *_: signal.raise_signal(signal.SIGTERM))
    assert json.loads(hook.received[-1][2])["event"] == "stopped"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_message_that_cannot_be_written_stops_no_later_one(tmp_path, world, hook, caplog):
    """File names may hold bytes that are no text."""
    dataset = make_dataset(tmp_path, world, notify={"webhook": url_of(hook)})
    summary = Summary()
    with notifying(dataset, summary, lambda *_: None) as progress:
        summary.results[BUILD] = replace(BAD, message="\udcff.tif: no such file")
        progress(BUILD, BAD, 1)
        until = time.monotonic() + 60
        while "no message for 'first failure'" not in caplog.text and time.monotonic() < until:
            time.sleep(0.01)
        del summary.results[BUILD]
    assert [json.loads(content)["event"] for _, _, content in hook.received] == ["finished"]


def test_no_credentials_leave_the_driver(tmp_path, world):
    """Tracebacks show datasets, and events show messages."""
    hook = "https://hooks.example/services/TOKEN"
    assert "TOKEN" not in repr(make_dataset(tmp_path, world, notify={"webhook": hook}))
    result = Result.from_error(UnansweredError(BAD.message))
    assert result == Result(
        state="failed",
        error_class="network",
        message="https://host.example/a.tif answers HTTP 503",
    )


def test_nobody_is_told_without_notify(tmp_path, world):
    def progress(*_):
        pass

    with notifying(make_dataset(tmp_path, world), Summary(), progress) as same:
        assert same is progress
