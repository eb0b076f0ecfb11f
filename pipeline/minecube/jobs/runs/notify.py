"""Send the summary of a run to a command or a webhook, as JSON.

A message is sent at the end of a run, at its first failure, and if no unit has ended for
`stall_minutes`. A notification that fails is a warning. It never fails the run.
"""

from __future__ import annotations

import logging
import queue
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import msgspec
import requests

from minecube.catalog import Dataset
from minecube.catalog.dataset import Notification
from minecube.jobs.failures import describe_failure, one_line
from minecube.jobs.runs.summary import Progress, Summary
from minecube.jobs.runs.units import Unit
from minecube.jobs.runs.worker import Result
from minecube.network import remove_secrets

log = logging.getLogger(__name__)

_MOST_FAILURES = 20
_WEBHOOK_S = 10.0
_COMMAND_S = 60.0


class Notifier:
    """Sends messages about one run, from its own thread: a slow receiver delays no unit."""

    def __init__(self, dataset: Dataset, settings: Notification, summary: Summary) -> None:
        self._dataset = dataset
        self._settings = settings
        self._summary = summary
        self._start = time.monotonic()
        self._has_failed = False
        self._reason = ""
        self._messages: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        """Events to send; None: a unit has ended."""
        self._thread = threading.Thread(target=self._send_all, name="notify", daemon=True)
        self._thread.start()

    def note(self, result: Result) -> None:
        """Note that a unit has ended. The first failure is sent."""
        is_first = not (self._has_failed or result.is_good)
        self._has_failed |= is_first
        self._messages.put("first failure" if is_first else None)

    def finish(self, event: str, reason: str = "") -> None:
        """Send the last event with its reason, and wait until it is sent."""
        self._reason = reason
        self._messages.put(event)
        self._messages.put("")
        self._thread.join()

    def _send_all(self) -> None:
        has_stalled = False
        while (event := self._wait(has_stalled)) != "":
            has_stalled = event == "stalled"
            if event is not None:
                self._send(event)

    def _send(self, event: str) -> None:
        try:
            send(self._settings, self._describe(event))
        except Exception as error:  # text that JSON cannot hold, for example
            log.warning("notify: no message for %r: %s", event, describe_failure(error))

    def _describe(self, event: str) -> dict[str, Any]:
        return {
            "event": event,
            "dataset": self._dataset.id,
            "time": datetime.now(tz=UTC).isoformat(timespec="seconds"),
            "machine": socket.gethostname(),
            "version": metadata.version("minecube"),
            "seconds": round(time.monotonic() - self._start, 1),
            "reason": remove_secrets(self._reason),
            **describe_summary(self._summary),
        }

    def _wait(self, has_stalled: bool) -> str | None:
        """Wait for the next event. A stall is an event, once until the next unit ends."""
        try:
            seconds = None if has_stalled else 60 * self._settings.stall_minutes
            return self._messages.get(timeout=seconds)
        except queue.Empty:
            return "stalled"


@contextmanager
def notifying(dataset: Dataset, summary: Summary, progress: Progress) -> Iterator[Progress]:
    """Send messages about the run of a block, if the dataset asks for them.

    Yields the progress function of the run.
    """
    if dataset.notify is None:
        yield progress
        return
    notifier = Notifier(dataset, dataset.notify, summary)

    def note_and_show(unit: Unit, result: Result, total: int) -> None:
        notifier.note(result)
        progress(unit, result, total)

    try:
        yield note_and_show
    except BaseException as error:
        notifier.finish("stopped", describe_failure(error))
        raise
    notifier.finish("finished")


def describe_summary(summary: Summary) -> dict[str, Any]:
    """Describe the present state of a run as plain JSON, without credentials."""
    results = dict(summary.results)  # a copy: the run goes on
    failures = {unit: result for unit, result in results.items() if not result.is_good}
    done = Counter(unit.step for unit, result in results.items() if result.is_good)
    return {
        "done": dict(done),
        "finished_before": dict(summary.kept),
        "failed": dict(Counter(unit.step for unit in failures)),
        "not_possible": dict(summary.blocked),
        "stale": len(summary.stale),
        "failures": [
            _describe_failure(unit, failures[unit]) for unit in list(failures)[:_MOST_FAILURES]
        ],
        "not_joined": {step: remove_secrets(reason) for step, reason in summary.unjoined.items()},
    }


def _describe_failure(unit: Unit, result: Result) -> dict[str, Any]:
    message = remove_secrets(result.message)
    return {**asdict(unit), "error_class": result.error_class, "message": message}


def send(settings: Notification, message: Mapping[str, Any]) -> None:
    """Send a message to the command and to the webhook. A failure is logged as a warning."""
    content = msgspec.json.encode(message)
    event = message["event"]
    if settings.command is not None:
        _run_command(settings.command, content, event)
    if settings.webhook is not None:
        _post(settings.webhook, content, event)


def _run_command(command: str, content: bytes, event: str) -> None:
    try:
        subprocess.run(  # noqa: S602  the user's own line in dataset.yaml
            command,
            shell=True,
            input=content,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_COMMAND_S,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        log.warning("notify: the command ended with code %d for %r", error.returncode, event)
    except subprocess.TimeoutExpired:
        log.warning("notify: the command was stopped after %g s for %r", _COMMAND_S, event)
    except OSError as error:
        log.warning("notify: the command did not start for %r: %s", event, one_line(error))


def _post(url: str, content: bytes, event: str) -> None:
    headers = {"Content-Type": "application/json"}
    try:
        # A redirect could lead to another host.
        answer = requests.post(
            url, data=content, headers=headers, timeout=_WEBHOOK_S, allow_redirects=False
        )
    except (requests.RequestException, ValueError) as error:
        # Its text has the URL, and the URL of a webhook is often a secret.
        log.warning("notify: the webhook failed for %r: %s", event, type(error).__name__)
        return
    if not 200 <= answer.status_code < 300:
        log.warning("notify: the webhook answered HTTP %d for %r", answer.status_code, event)
