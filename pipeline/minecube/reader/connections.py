"""HTTP connections under the rules of `network`: addresses are checked before any byte is sent."""

from __future__ import annotations

import functools
import math
import re
import socket
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import requests
import urllib3
from urllib3.util import wait_for_read

from minecube import network

_SHORT_BODY = 65536  # bytes; a shorter unwanted body is read, to keep the connection
# An answer is late after 4 times the longest of the quickest 95 % of the last 200 answers.
_RECENT = 200
_USUAL = 0.95
_LATE = 4
_LEAST_LATE_S = 0.2
_ANSWERS_PER_REPEAT = 50


class TroubleError(Exception):
    """A failed try with a temporary error."""

    def __init__(
        self, problem: str, *, wait_s: float = 0.0, resigned: bool = False, unreachable: str = ""
    ) -> None:
        super().__init__(problem)
        self.wait_s = wait_s
        """Seconds to wait at the server's request."""
        self.resigned = resigned
        """True if the next try has a new signature."""
        self.unreachable = unreachable
        """URL of an unreachable host."""


class Pace:
    """Times until a host's answers begin, for any thread.

    The few answers that take much longer than the others are late: another request is quicker. At
    most 2 % of the requests are repeated, and 4 at once if the whole host becomes slow.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._credit = 0
        self._lock = threading.Lock()

    def add(self, seconds: float) -> None:
        """Add the time of an answer."""
        with self._lock:
            self._recent.append(seconds)
            self._credit = min(self._credit + 1, _RECENT)

    def late_s(self) -> float:
        """Return the seconds after which an answer is late; infinite after too few answers."""
        with self._lock:
            if len(self._recent) < _ANSWERS_PER_REPEAT:
                return math.inf
            usual_s = sorted(self._recent)[int(_USUAL * len(self._recent))]
        return max(_LATE * usual_s, _LEAST_LATE_S)

    def may_repeat(self) -> bool:
        """Return whether a late request may be sent again, and count it."""
        with self._lock:
            is_allowed = self._credit >= _ANSWERS_PER_REPEAT
            if is_allowed:
                self._credit -= _ANSWERS_PER_REPEAT
        return is_allowed


class _CheckedConnection(urllib3.connection.HTTPConnection):
    """A connection with its address checked before any byte is sent, TLS included."""

    def __init__(
        self, *args: Any, check: Callable[[str, str], None], pace: Pace, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._check = check
        self._pace = pace

    def _new_conn(self) -> socket.socket:
        """Connect, and raise ForbiddenError if the host has a forbidden address."""
        connection = super()._new_conn()
        try:
            self._check(self.host, connection.getpeername()[0])
        except BaseException:
            connection.close()
            raise
        return connection

    def getresponse(self) -> urllib3.HTTPResponse:  # type: ignore[override]
        """Wait for an answer; raise TimeoutError if it is late and may be requested again."""
        began = time.monotonic()
        late_s = self._pace.late_s()
        may_be_late = late_s < (self.timeout or math.inf)
        if may_be_late and not wait_for_read(self.sock, late_s) and self._pace.may_repeat():
            raise TimeoutError(f"no answer in {late_s:.2f} s")
        answer = super().getresponse()
        if answer.status in (200, 206):
            self._pace.add(time.monotonic() - began)
        return answer


class _CheckedTlsConnection(_CheckedConnection, urllib3.connection.HTTPSConnection):
    """A checked connection over TLS."""


class CheckedPools(urllib3.PoolManager):
    """Pools of checked connections.

    `check` is called with host and address. It raises ForbiddenError for a forbidden address.
    """

    def __init__(self, check: Callable[[str, str], None], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._check = check
        self._paces: defaultdict[tuple[str | None, int | None], Pace] = defaultdict(Pace)

    def connection_from_host(
        self,
        host: str | None,
        port: int | None = None,
        scheme: str | None = "http",
        pool_kwargs: dict[str, Any] | None = None,
    ) -> urllib3.HTTPConnectionPool:
        """Return the pool of a host."""
        pool = super().connection_from_host(host, port, scheme, pool_kwargs)
        kind = _CheckedTlsConnection if scheme == "https" else _CheckedConnection
        pace = self._paces[host, port]
        pool.ConnectionCls = functools.partial(  # type: ignore[assignment]
            kind, check=self._check, pace=pace
        )
        return pool


class Session(requests.Session):
    """A session of requests with redirects under the rules of `network`."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """Return the target of a redirect; raise ForbiddenError if it must not be followed."""
        target = super().get_redirect_target(resp)
        if target is None:
            return None
        resp.close()  # the body is unwanted and may be endless
        return network.check_redirect(resp.url, target, network.origin_of(resp.url), resolve=True)


def read_body(answer: urllib3.BaseHTTPResponse, limit: int, patience_s: float) -> bytes:
    """Read the raw body of an answer, limited to `limit` bytes and `patience_s` seconds.

    Raises:
        TroubleError: The body takes longer.
    """
    parts: list[bytes] = []
    missing = limit
    deadline = time.monotonic() + patience_s
    try:
        while missing > 0 and (part := answer.read1(missing, decode_content=False)):
            parts.append(part)
            missing -= len(part)
            if time.monotonic() > deadline:
                raise TroubleError(f"{limit - missing} bytes of {limit} in {patience_s:.0f} s")
    finally:
        answer.close()  # after a full read, the connection is already back in its pool
    return b"".join(parts)


def drain(answer: urllib3.BaseHTTPResponse) -> None:
    """Free the connection of an unwanted answer.

    It is closed if the body is long or has no known length.
    """
    length = length_of(answer.headers.get("Content-Length"))
    if length is not None and length <= _SHORT_BODY:
        answer.drain_conn()
    else:
        answer.close()


def length_of(value: str | None) -> int | None:
    """Return the byte count of a Content-Length header, or None if it has no valid number."""
    if value and re.fullmatch(r"[0-9]{1,18}", value):
        return int(value)
    return None


def describe(error: BaseException) -> str:
    """Describe the innermost reason of an error of urllib3."""
    reason = getattr(error, "reason", None)
    if isinstance(reason, BaseException):
        return describe(reason)
    return f"{type(error).__name__}: {error}"
